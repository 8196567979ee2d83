import os
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import soundfile
import torch
from held_out import held_out
from sounds import tone, write_tone

from fedpriv.data.audio import AudioFile
from fedpriv.data.speech import FederatedSpeech, SpeechConfig, choose_alphabet
from fedpriv.data.text import ENGLISH, Alphabet
from fedpriv.errors import FedprivError, InputError


@dataclass(frozen=True)
class Beep:
    """A recording that is not in a file: as many seconds as its text has characters."""

    text: str

    def read(self, sample_rate, max_seconds):
        return tone(len(self.text), sample_rate).astype(np.float32)


def speech_of(*recordings, **settings):
    """One user, whose recordings are held out and public too."""
    return FederatedSpeech(
        users=[recordings],
        user_ids=["anna"],
        held_out=recordings,
        public=recordings[:1],
        public_held_out=recordings[1:],
        alphabet=Alphabet(ENGLISH),
        speech=SpeechConfig(**settings),
        description="somebody",
    )


def test_a_user_is_read_as_utterances():
    dataset = speech_of(Beep("Yes, sir!"), Beep("no"), sample_rate=4_000)
    utterances = dataset.user(0)
    assert utterances.inputs.dtype == torch.float32
    assert utterances.inputs.shape == (2, 9 * 4_000)
    assert utterances.lengths.tolist() == [9 * 4_000, 2 * 4_000]
    texts = [
        dataset.alphabet.decode(target.tolist())
        for target in utterances.take(torch.arange(2)).targets
    ]
    assert texts == ["yes sir", "no"]
    assert utterances.skipped == 0
    assert (dataset.population, dataset.classes, dataset.input_shape) == (1, 29, (4_000,))


def test_the_parts_are_kept_apart():
    dataset = speech_of(Beep("yes"), Beep("no"), Beep("never"))
    assert len(held_out(dataset)) == 3
    assert dataset.pretraining(0).target_lengths.tolist() == [3]
    assert [len(part) for part in dataset.pretraining_evaluation()] == [2]


@pytest.mark.parametrize("index", [-1, 1])
def test_user_outside_the_population(index):
    with pytest.raises(IndexError, match=r"outside 0\.\.0"):
        speech_of(Beep("yes")).user(index)


def test_a_user_is_read_up_to_a_sum_of_seconds():
    beeps = [Beep("aa"), Beep("bbb"), Beep("cc"), Beep("d")]
    dataset = speech_of(*beeps, max_seconds_per_user=6.5)
    assert dataset.user(0).target_lengths.tolist() == [2, 3]
    assert len(held_out(dataset)) == 4


def zero_bytes(folder):
    (folder / "empty.wav").touch()
    return AudioFile(str(folder / "empty.wav"), "text"), "empty, 0 bytes"


def wrong_header(folder):
    (folder / "header.wav").write_text("not a sound")
    return AudioFile(str(folder / "header.wav"), "text"), "its header is damaged"


def too_long(folder):
    path = write_tone(folder / "long.wav", seconds=1)
    with path.open("r+b") as file:  # of two hours by its header, which is a sparse file's
        for at, value in ((4, 36), (40, 0)):
            file.seek(at)
            file.write((7_200 * 16_000 + value).to_bytes(4, "little"))
    os.truncate(path, 7_200 * 16_000 + 44)
    return AudioFile(str(path), "text"), "longer than data.speech.max_seconds (36)"


def silent(folder):
    soundfile.write(folder / "silent.wav", np.zeros(8_000), 8_000)
    return AudioFile(str(folder / "silent.wav"), "text"), "silent"


def without_samples(folder):
    soundfile.write(folder / "none.wav", np.zeros(0), 8_000)
    return AudioFile(str(folder / "none.wav"), "text"), "silent"


def without_transcript(folder):
    return AudioFile(str(write_tone(folder / "untold.wav")), None), "no transcript"


def with_empty_transcript(folder):
    return AudioFile(str(write_tone(folder / "mute.wav")), " ... "), "the transcript is empty"


def with_unknown_characters(folder):
    recording = AudioFile(str(write_tone(folder / "number.wav")), "Agent 007")
    return recording, "the transcript 'agent 007' has unknown characters '07'"


BAD = [
    zero_bytes,
    wrong_header,
    too_long,
    silent,
    without_samples,
    without_transcript,
    with_empty_transcript,
    with_unknown_characters,
]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_recording_stops_the_run_in_one_line(tmp_path, bad):
    recording, reason = bad(tmp_path)
    with pytest.raises(InputError) as stopped:
        speech_of(recording, on_bad="stop").user(0)
    assert str(stopped.value).startswith(f"{recording.path}: ")
    assert reason in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_bad_recordings_are_skipped_and_counted(tmp_path):
    good = [
        AudioFile(str(write_tone(tmp_path / "low.wav", rate=8_000)), "low"),
        AudioFile(str(write_tone(tmp_path / "high.flac", rate=48_000)), "high"),
    ]
    bad = [make(tmp_path)[0] for make in BAD]
    dataset = speech_of(good[0], *bad, good[1])
    for utterances in (dataset.user(0), held_out(dataset)):
        assert utterances.lengths.tolist() == [1_600, 1_600]
        assert utterances.target_lengths.tolist() == [3, 4]
        assert utterances.skipped == len(BAD)


def test_a_missing_soundfile_is_no_bad_recording(tmp_path, monkeypatch):
    dataset = speech_of(AudioFile(str(write_tone(tmp_path / "fine.wav")), "fine"))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(FedprivError, match="pip install soundfile"):
        dataset.user(0)


def test_the_alphabet_is_the_files_or_the_public_one_or_english(tmp_path):
    public = [Beep("Bad cab"), AudioFile("x.wav", None)]
    path = tmp_path / "alphabet.txt"
    path.write_text("x\ny\n")
    assert choose_alphabet(SpeechConfig(alphabet=path), public).characters == "xy"
    assert choose_alphabet(SpeechConfig(), public).characters == " abcd"
    assert choose_alphabet(SpeechConfig(), [Beep("...")]).characters == ENGLISH
    assert choose_alphabet(SpeechConfig(), []).characters == ENGLISH
