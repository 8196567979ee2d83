import dataclasses
import pickle
import shutil
import sys

import numpy as np
import pytest
from held_out import held_out
from schema import data_options

from fedpriv.data import PartitionConfig, build_dataset, espeak, synthetic_speech
from fedpriv.data.espeak import ACCENTS, Espeak
from fedpriv.data.synthetic_speakers import DIGITS, Split
from fedpriv.data.synthetic_speech import HELD_OUT, PUBLIC, PUBLIC_HELD_OUT
from fedpriv.errors import EnvironmentFault, FedprivError, InputError

pytest.importorskip(
    "espeakng_loader", reason="espeak-ng is not installed: pip install 'fedpriv[synthetic-speech]'"
)

RATE = 8000
POPULATION = Split("population", synthetic_speech.POPULATION_STREAM, utterances=2)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Fewer speakers in the splits whose sizes are fixed, and in each chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_speech, "HELD_OUT_SPEAKERS", 16)
        patch.setattr(synthetic_speech, "PUBLIC_HELD_OUT_SPEAKERS", 8)
        patch.setattr(synthetic_speech, "SPEAKERS_PER_CHUNK", 4)
        yield


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A cache that has all that `config` asks for; not to be changed."""
    cache = tmp_path_factory.mktemp("recorded")
    build_dataset(config(cache), seed=1)
    return cache


@pytest.fixture
def cache(recorded, tmp_path):
    """A copy of `recorded`, to be changed."""
    return shutil.copytree(recorded, tmp_path / "cache")


@pytest.fixture
def no_espeak(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)


def config(cache, speech=None, **changes):
    settings = {"sample_rate": RATE, "public_speakers": 2, "cache": cache, **(speech or {})}
    return data_options(
        name="synthetic_speech",
        speech=dict(**settings),
        **{"users": 16, "examples_per_user": 2, **changes},
    )


def files(cache):
    return {file.name: file.read_bytes() for file in cache.rglob("*") if file.is_file()}


def speak(speakers):
    with Espeak() as process:
        return [np.concatenate(process.speak(speaker, RATE)) for speaker in speakers]


def test_users_say_strings_of_digits(recorded):
    dataset = build_dataset(config(recorded), seed=1)
    assert dataset.population == 16
    assert dataset.user_ids[:2] == ("speaker-0", "speaker-1")
    assert dataset.alphabet.characters == " efghinorstuvwxz"
    for index in range(16):
        user = dataset.user(index)
        assert len(user) == 2
        assert user.skipped == 0
        for target, length in zip(user.targets, user.target_lengths, strict=True):
            words = dataset.alphabet.decode(target[:length].tolist()).split(" ")
            assert 3 <= len(words) <= 7
            assert set(words) <= set(DIGITS)


def test_the_description_says_that_it_is_synthetic(recorded):
    dataset = build_dataset(config(recorded), seed=1)
    seconds = sum(one.seconds for user in dataset.users for one in user)
    assert dataset.description.startswith(
        "synthetic speech (espeak-ng): 16 users of 8 accents, 2 digit strings each; test: 96 in "
        "all ("
    )
    assert dataset.sizes == f"32 in all ({seconds:.0f} s)"
    facts = dataset.facts
    assert {facts.users, facts.held_out, facts.public} == {"made_up"}
    assert dataset.description.endswith("of 2 others (en-us)")


def test_the_sound_is_neither_silent_nor_clipped_and_lasts_as_long_as_its_digits(recorded):
    dataset = build_dataset(config(recorded), seed=1)
    for recording in [*dataset.held_out, *dataset.public, *dataset.public_held_out]:
        sound = recording.read(RATE, max_seconds=10)
        assert sound.dtype == np.float32
        assert abs(sound).max() == pytest.approx(0.7, abs=1e-3)
        assert sound.std() > 0.05
        assert abs(sound.mean()) < 0.01
        assert (abs(sound) > 0.69).mean() < 0.01
        assert len(sound) / RATE == recording.seconds
        assert 0.2 < recording.seconds / len(recording.text.split()) < 0.65


def test_most_of_the_sound_is_where_speech_has_it(recorded):
    recordings = build_dataset(config(recorded), seed=1).held_out[:48]
    sounds = [one.read(RATE, max_seconds=10) for one in recordings]
    energies = np.zeros(4)
    for sound in sounds:
        power = abs(np.fft.rfft(sound)) ** 2
        bands = np.searchsorted([60, 1200, 3500], np.fft.rfftfreq(len(sound), 1 / RATE))
        energies += np.bincount(bands, weights=power, minlength=4)
    below, vowels, upper, above = energies / energies.sum()
    assert below < 0.01
    assert vowels > 0.5
    assert 0.01 < upper < 0.5
    assert above < 0.05


def test_everything_is_made_again_bit_for_bit_whatever_the_seed(recorded, tmp_path):
    build_dataset(config(tmp_path), seed=2)
    assert files(tmp_path) == files(recorded)


def test_a_speaker_sounds_the_same_whoever_spoke_before():
    speakers = [POPULATION.speaker(number) for number in range(6)]
    backwards = reversed(speak(reversed(speakers)))
    for one, other in zip(speak(speakers), backwards, strict=True):
        assert np.array_equal(one, other)


def test_a_speaker_who_says_more_begins_with_the_same():
    short, long = POPULATION.speaker(3), dataclasses.replace(POPULATION, utterances=4).speaker(3)
    assert long.texts[:2] == short.texts
    (said,), (more,) = speak([short]), speak([long])
    assert np.array_equal(more[: len(said) // 2], said[: len(said) // 2])


def test_another_build_makes_nothing_and_says_nothing(recorded, capfd, no_espeak):
    before = {file: file.stat().st_mtime_ns for file in recorded.rglob("*")}
    dataset = build_dataset(config(recorded), seed=3)
    assert {file: file.stat().st_mtime_ns for file in recorded.rglob("*")} == before
    assert len(held_out(dataset)) == 16 * 6
    assert len(dataset.pretraining(0)) == 1
    assert capfd.readouterr() == ("", "")


def test_populations_of_other_sizes_share_their_speakers(cache, recorded, capfd):
    larger = build_dataset(config(cache, users=17), seed=1)
    assert larger.population == 17
    assert "synthetic speech: recording 4 speakers in" in capfd.readouterr().err
    assert len(files(cache)) == len(files(recorded)) + 2
    smaller = build_dataset(config(cache, users=3), seed=1)
    assert [one.text for one in smaller.users[2]] == [one.text for one in larger.users[2]]


def test_development_evaluates_on_others(cache):
    test = build_dataset(config(cache), seed=1)
    development = build_dataset(config(cache, evaluation="development"), seed=1)
    assert [one.text for one in test.held_out] != [one.text for one in development.held_out]
    assert [one.text for one in test.users[0]] == [one.text for one in development.users[0]]


def test_nobody_is_in_two_splits():
    splits = [PUBLIC, PUBLIC_HELD_OUT, *HELD_OUT.values(), POPULATION]
    voices = [split.speaker(number).voice for split in splits for number in range(256)]
    assert len(set(voices)) == len(voices)


def test_speakers_have_eight_accents_but_public_ones_a_single_one():
    for split in (*HELD_OUT.values(), POPULATION):
        assert [split.speaker(number).accent for number in range(16)] == [*ACCENTS, *ACCENTS]
    assert {PUBLIC.speaker(number).accent for number in range(16)} == {"en-us"}
    assert {PUBLIC_HELD_OUT.speaker(number).accent for number in range(16)} == {"en-us"}


def test_every_accent_sounds_different():
    one = POPULATION.speaker(0)
    sounds = speak([dataclasses.replace(one, accent=accent) for accent in ACCENTS])
    assert len({sound.tobytes() for sound in sounds}) == len(ACCENTS) == 8


def test_speakers_of_one_accent_are_told_apart_by_their_sound():
    """The nearest average spectrum, of other words, is mostly that of the same speaker."""
    people = [Split("any", stream=99, utterances=1).speaker(8 * number) for number in range(12)]
    words = [f"{one} {other}" for one in DIGITS for other in DIGITS]
    spectra = [
        [
            average_spectrum(sound)
            for sound in speak([dataclasses.replace(person, texts=texts) for person in people])
        ]
        for texts in (tuple(words[::20]), tuple(words[7::20]))
    ]
    first, second = np.array(spectra)
    distances = ((first[:, None] - second[None]) ** 2).sum(axis=-1)
    assert (distances.argmin(axis=1) == range(12)).mean() > 0.8


def average_spectrum(sound):
    """The logarithms of the mean energy in bands of 125 Hz."""
    frames = sound[: len(sound) // 256 * 256].reshape(-1, 256) * np.hanning(256)
    power = (abs(np.fft.rfft(frames)) ** 2).mean(axis=0)
    return np.log(power[:128].reshape(32, 4).sum(axis=1) + 1)


def test_a_sample_rate_has_recordings_of_its_own(cache):
    slow = build_dataset(config(cache), seed=1)
    fast = build_dataset(config(cache, speech={"sample_rate": 16_000}), seed=1)
    one, other = slow.held_out[0], fast.held_out[0]
    assert one.seconds == pytest.approx(other.seconds, abs=1e-3)
    # Every other sample is what 8 kHz has, but for what lies above 4 kHz, and the loudness.
    thinned = other.read(16_000, max_seconds=10)[::2]
    wave = one.read(8_000, max_seconds=10)
    assert np.corrcoef(thinned[: len(wave)], wave[: len(thinned)])[0, 1] > 0.95
    with pytest.raises(ValueError, match="recorded at 8000 Hz, asked for at 16000 Hz"):
        one.read(16_000, max_seconds=10)


def test_recordings_travel_light(recorded):
    dataset = build_dataset(config(recorded), seed=1)
    pickled = pickle.dumps(dataset.users)
    assert len(pickled) < 20_000
    sounds = [users[15][1].read(RATE, 10) for users in (dataset.users, pickle.loads(pickled))]
    assert np.array_equal(*sounds)


def test_too_long_recordings_are_refused_one_by_one(recorded):
    dataset = build_dataset(config(recorded, speech={"max_seconds": 2.0}), seed=1)
    lengths = [one.seconds for one in dataset.held_out]
    assert held_out(dataset).skipped == sum(length > 2 for length in lengths) > 0


def test_an_alphabet_may_be_given(recorded, tmp_path):
    characters = tmp_path / "characters.txt"
    characters.write_text("\n".join("zyxwvutsrqponmlkjihgfedcba "))
    dataset = build_dataset(config(recorded, speech={"alphabet": characters}), seed=1)
    assert dataset.classes == 28


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"half"])
def test_a_truncated_chunk_is_named(cache, damage):
    chunk = next(cache.rglob("population-2x-000000.npy"))
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    with pytest.raises(FedprivError, match=r"^\S*/population-2x-000000\.npy is damaged: remove it"):
        build_dataset(config(cache), seed=1)
    chunk.unlink()
    build_dataset(config(cache), seed=1)
    assert chunk.read_bytes() == whole


def test_a_cache_out_of_reach_is_not_called_damaged(cache, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(EnvironmentFault, match=r"\.npy: cannot be read \(Permission denied\)"):
        build_dataset(config(cache), seed=1)


@pytest.mark.parametrize(
    "index", ["", "{", "{}", "[]", '{"texts": [], "samples": [], "crc32": []}']
)
def test_a_damaged_index_is_named(cache, index):
    next(cache.rglob("test-6x-000000.json")).write_text(index)
    with pytest.raises(FedprivError, match=r"test-6x-000000\.json is damaged: remove it"):
        build_dataset(config(cache), seed=1)


def test_a_changed_sample_is_noticed_and_not_skipped(cache):
    chunk = next(cache.rglob("population-2x-000000.npy"))
    content = bytearray(chunk.read_bytes())
    content[-1000] ^= 1
    chunk.write_bytes(content)
    dataset = build_dataset(config(cache), seed=1)
    assert len(dataset.user(0)) == 2
    with pytest.raises(FedprivError, match=r"population-2x-000000\.npy is damaged"):
        dataset.user(3)


def test_a_changed_transcript_is_noticed(cache):
    index = next(cache.rglob("population-2x-000000.json"))
    index.write_text(index.read_text().replace("nine", "five"))
    dataset = build_dataset(config(cache), seed=1)
    with pytest.raises(FedprivError, match=r"population-2x-000000\.npy is damaged"):
        [dataset.user(number) for number in range(16)]


def test_what_was_finished_before_an_interruption_is_kept(tmp_path, monkeypatch):
    finished = []

    def interrupted(path, sounds, texts, write=synthetic_speech.write_chunk):
        if finished:
            raise KeyboardInterrupt
        finished.append(path)
        write(path, sounds, texts)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic_speech, "write_chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(config(tmp_path), seed=1)
    assert len(files(tmp_path)) == 2
    made = finished[0].stat().st_mtime_ns
    build_dataset(config(tmp_path), seed=1)
    assert finished[0].stat().st_mtime_ns == made


def test_without_espeak_it_says_what_to_install(tmp_path, no_espeak, capfd):
    with pytest.raises(InputError, match=r"pip install 'fedpriv\[synthetic-speech\]'$"):
        build_dataset(config(tmp_path / "cache"), seed=1)
    assert not (tmp_path / "cache").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "worker",
    [
        "",
        "print(1 / 0)",
        "print('{\"sample_rate\": 22050, \"samples\": [3, 4]}\\n1234', end='')",
    ],
)
def test_a_process_that_ends_early_is_an_error(monkeypatch, tmp_path, worker):
    (tmp_path / "worker.py").write_text(worker)
    monkeypatch.setattr(espeak, "WORKER", tmp_path / "worker.py")
    with Espeak() as process, pytest.raises(FedprivError, match="espeak-ng ended before"):
        process.speak(POPULATION.speaker(0), RATE)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data\.speech\.cache: cannot make recordings in"):
        build_dataset(config(tmp_path / "file"), seed=1)


def test_the_cache_is_in_the_users_cache_folder_unless_named(recorded, tmp_path, monkeypatch):
    shutil.copytree(recorded, tmp_path / "fedpriv")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dataset = build_dataset(config(None), seed=1)
    folder = tmp_path / "fedpriv" / "synthetic-speech-v1-8000"
    assert dataset.users[0][0].chunk.path.parent == folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": None}, r"data\.users must be set for synthetic_speech"),
        (
            {"partition": PartitionConfig(kind="dirichlet")},
            r"data\.partition\.kind must be natural for synthetic_speech.*, got dirichlet",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        build_dataset(config(tmp_path, **changes), seed=1)
