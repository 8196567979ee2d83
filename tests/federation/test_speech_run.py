"""Whole runs on speech, in this process: bad recordings, seed models, both engines."""

import errno
import json
import os
import threading

import pytest
import soundfile
import torch
from in_process import Silent, drive_on, resume_small, small_config, train_small
from sounds import tone, write_tone

from fedpriv import experiment
from fedpriv.config import ExperimentConfig
from fedpriv.errors import InputError
from fedpriv.privacy.ledger import Ledger
from fedpriv.seed_model import read_seed_model, seed_path, with_seed_model

LETTERS = "abcd"
RATE = 8_000


class Listener:
    def __init__(self):
        self.steps = []

    def begin(self, steps, done, what):
        pass

    def step(self, step, loss):
        self.steps.append(step)

    def measured(self, step, measures):
        pass


def write_speaker(folder, speaker, utterances=3, text="ab cd"):
    place = folder / str(speaker) / "1"
    lines = []
    for number in range(utterances):
        name = f"{speaker}-1-{number:04}"
        write_tone(place / f"{name}.wav", 0.6, RATE, 200 + 40 * speaker + number)
        lines.append(f"{name} {text}")
    write_lines(place, speaker, lines)
    # The released files are flac; the name says what is inside.
    for path in place.glob("*.wav"):
        soundfile.write(path.with_suffix(".flac"), soundfile.read(path)[0], RATE)
        path.unlink()
    return place


def write_lines(place, speaker, lines):
    (place / f"{speaker}-1.trans.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    for speaker in range(1, 9):
        write_speaker(folder / "train-clean-360", speaker)
    for speaker in range(11, 15):
        write_speaker(folder / "train-clean-100", speaker)
    write_speaker(folder / "test-clean", 21)
    (tmp_path / "alphabet.txt").write_text("\n".join(" abcd"))
    return folder


def speech_config(corpus, **changes):
    return small_config(
        run_dir=str(corpus.parent / "run"),
        data={
            "name": "librispeech",
            "path": str(corpus),
            "partition": {"kind": "natural"},
            "speech": {
                "sample_rate": RATE,
                "alphabet": str(corpus.parent / "alphabet.txt"),
                "train_subsets": ["train-clean-360"],
                "public_subsets": ["train-clean-100"],
                "max_seconds": 5,
            },
        },
        model={"name": "speech", "dim": 8, "depth": 1, "heads": 2, "mels": 16, "mlp_ratio": 1.0},
        local__batch_size=2,
        privacy__sampling__expected_cohort=6,
        **changes,
    )


def run(config):
    prepared = experiment.prepare(with_seed_model(config, Listener(), threading.Event()))
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, Silent(), drive_on(None))
    return directory


def test_a_run_reports_word_and_character_errors(corpus):
    rows = run(speech_config(corpus)).read_metrics()
    held_out = rows[-1]["held_out"]
    assert held_out["words"] == 6
    edits = held_out["substitutions"] + held_out["insertions"] + held_out["deletions"]
    assert held_out["wer"] == pytest.approx(edits / 6)
    assert all(row["simulation_only"]["skipped"] == 0 for row in rows)


def test_both_engines_release_the_same(corpus, monkeypatch):
    # The fingerprint, which differs, decides who is drawn and what the noise is.
    monkeypatch.setattr(ExperimentConfig, "fingerprint", lambda *_: "0" * 64)
    released = []
    for engine in ("stacked", "sequential"):
        config = speech_config(
            corpus,
            runtime__engine=engine,
            local__spec_augment={"freq_width": 4, "time_width": 10},
            rounds=2,
        )
        config = config.model_copy(update={"run_dir": corpus.parent / engine})
        directory = run(config)
        checkpoint = sorted(directory.checkpoints.glob("*.safetensors"))[-1]
        released.append(read_seed_model(checkpoint))
    for name, block in released[0].items():
        if name.startswith("parameter/"):
            torch.testing.assert_close(block, released[1][name], rtol=0, atol=1e-5)


def spoil(corpus, kind):
    """Make one recording of speaker 1 unusable; return what the error must name."""
    place = corpus / "train-clean-360" / "1" / "1"
    path = place / "1-1-0000.flac"
    lines = [f"1-1-{number:04} ab cd" for number in range(3)]
    if kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "wrong header":
        path.write_bytes(b"fLaX" + bytes(200))
    elif kind == "silent":
        soundfile.write(path, 0 * tone(0.6, RATE), RATE)
    elif kind == "2 hours":
        soundfile.write(path, 0 * tone(7200, 100), 100, format="WAV", subtype="PCM_U8")
    elif kind == "unknown characters":
        lines[0] = "1-1-0000 ab xyz"
    elif kind == "no transcript":
        lines = lines[1:]
    elif kind == "empty transcript":
        lines[0] = "1-1-0000 --"
    elif kind == "impossible alignment":
        lines[0] = "1-1-0000 " + "abcd " * 30
    write_lines(place, 1, lines)
    return "1-1-0000"


BAD = [
    "zero bytes",
    "wrong header",
    "silent",
    "2 hours",
    "unknown characters",
    "no transcript",
    "empty transcript",
]


@pytest.mark.parametrize("kind", [*BAD, "impossible alignment"])
def test_a_bad_recording_is_skipped_and_counted(corpus, kind):
    spoil(corpus, kind)
    config = speech_config(corpus, rounds=2, privacy=None)
    rows = run(config).read_metrics()
    assert [row["simulation_only"]["skipped"] for row in rows] == [1, 1]
    assert [row["simulation_only"]["examples"] for row in rows] == [23, 23]
    assert all(row["simulation_only"]["non_finite"] == 0 for row in rows)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_recording_stops_the_run_where_asked(corpus, kind):
    named = spoil(corpus, kind)
    config = speech_config(corpus, rounds=2, privacy=None)
    speech = config.data.speech.model_copy(update={"on_bad": "stop"})
    data = config.data.model_copy(update={"speech": speech})
    with pytest.raises(InputError, match=named) as error:
        run(config.model_copy(update={"data": data}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_eight_channels_at_any_rate_are_heard(corpus, rate):
    path = corpus / "train-clean-360" / "1" / "1" / "1-1-0000.flac"
    channels = tone(0.6, rate)[:, None].repeat(8, axis=1)
    soundfile.write(path, channels, rate)
    rows = run(speech_config(corpus, rounds=1, privacy=None)).read_metrics()
    assert rows[0]["simulation_only"]["skipped"] == 0
    assert rows[0]["simulation_only"]["examples"] == 24


def test_a_speaker_of_whom_nothing_can_be_used_contributes_nothing(corpus):
    for path in (corpus / "train-clean-360" / "3").rglob("*.flac"):
        path.write_bytes(b"")
    rows = run(speech_config(corpus, rounds=1, privacy=None)).read_metrics()
    seen = rows[0]["simulation_only"]
    assert (seen["cohort"], seen["non_finite"], seen["skipped"]) == (8, 1, 3)
    assert seen["examples"] == 21


def test_the_machines_fault_ends_a_run_before_it_costs_anything(corpus):
    prepared = experiment.prepare(speech_config(corpus, runtime__cache_mib=0))
    directory = experiment.create(prepared)
    (corpus / "train-clean-360").rename(corpus / "unmounted")
    for subset in ("train-clean-360/1/1", "train-clean-100/11/1"):
        (corpus / subset).mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=r"train-clean-360 holds no recordings"):
        experiment.train(prepared, directory, Silent(), drive_on(None))
    assert len(Ledger.open(directory.ledger)) == 0
    assert directory.read_metrics() == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_fails_between_rounds_costs_no_round_of_noise(corpus, monkeypatch, code):
    prepared = experiment.prepare(speech_config(corpus, runtime__cache_mib=0))
    directory = experiment.create(prepared)

    class Breaking(Silent):
        def finished(self, row):
            super().finished(row)
            monkeypatch.setattr(os, "pread", self.fail)

        def fail(self, *_):
            raise OSError(code, os.strerror(code))

    expected = rf"cannot be read \({os.strerror(code)}\): a fault of the disk or of permissions"
    with pytest.raises(InputError, match=expected) as stopped:
        experiment.train(prepared, directory, watching := Breaking(), drive_on(None))
    assert "\n" not in str(stopped.value)
    charged = {release.round for release in Ledger.open(directory.ledger)}
    assert charged == {row["round"] for row in watching.rows}


def test_a_population_of_whom_nothing_can_be_read_is_refused(corpus):
    for path in (corpus / "train-clean-360").rglob("*.flac"):
        path.unlink()
    config = speech_config(corpus)
    expected = (
        r"none of the users' recordings can be used; .*the first: .*1-1-0000\.flac: cannot be"
    )
    with pytest.raises(InputError, match=expected):
        experiment.prepare(config)
    deployed = config.runtime.model_copy(update={"deployment": True, "engine": "sequential"})
    data = config.data.model_copy(update={"users": 8})
    experiment.prepare(config.model_copy(update={"runtime": deployed, "data": data}))


def test_held_out_recordings_of_which_none_can_be_used_are_refused_with_the_reason(corpus):
    (corpus / "test-clean" / "21" / "1" / "21-1-0000.flac").write_bytes(b"")
    for number in (1, 2):
        (corpus / "test-clean" / "21" / "1" / f"21-1-000{number}.flac").unlink()
    expected = "none of the held-out recordings can be used; .*the first: .*21-1-0000.flac: empty"
    with pytest.raises(InputError, match=expected):
        experiment.prepare(speech_config(corpus))


def test_a_round_in_which_nobody_was_trained_has_no_loss(tmp_path):
    directory, _ = train_small(
        tmp_path / "run", rounds=12, privacy__sampling={"kind": "poisson", "expected_cohort": 0.7}
    )
    means = ("loss", "norm", "clipped")
    empty = 0
    for row in directory.read_metrics():
        seen = row["simulation_only"]
        nobody = seen["cohort"] == 0
        empty += nobody
        blocks = [*seen["block_norms"].values(), *seen["block_clipped"].values()]
        assert all((value is None) == nobody for value in [*map(seen.get, means), *blocks])
    assert 0 < empty < 12


PRETRAIN = {"steps": 4, "batch_size": 4, "every": 2}


def test_a_run_starts_from_the_seed_model_and_resumes_without_it(corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    config = speech_config(corpus, seed_model={"pretrain": PRETRAIN}, rounds=3)
    listener = Listener()
    config = with_seed_model(config, listener, threading.Event())
    assert listener.steps == [1, 2, 3, 4]
    assert with_seed_model(config, listener, threading.Event()) == config
    assert listener.steps == [1, 2, 3, 4]
    prepared = experiment.prepare(config)
    blocks = read_seed_model(seed_path(config))
    for name, parameter in prepared.trainer.model.named_parameters():
        assert parameter.equal(blocks[name])

    directory = experiment.create(prepared)
    experiment.train(prepared, directory, Silent(), drive_on(None))
    metrics = directory.metrics.read_text()
    checkpoints = sorted(directory.checkpoints.glob("*.safetensors"))
    checkpoints[-1].unlink()
    seed_path(config).unlink()
    resume_small(directory.path)
    again = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    first = [json.loads(line) for line in metrics.splitlines()]
    assert [row["released_block_norms"] for row in again] == [
        row["released_block_norms"] for row in first
    ]


def test_another_seed_model_gives_other_noise(corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    fingerprints = set()
    for steps in (1, 2):
        pretrain = {**PRETRAIN, "steps": steps}
        config = speech_config(corpus, seed_model={"pretrain": pretrain})
        fingerprints.add(with_seed_model(config, Listener(), threading.Event()).fingerprint(""))
    assert len(fingerprints) == 2


def test_speakers_can_be_silos_whose_recordings_are_protected_one_by_one(corpus):
    config = speech_config(
        corpus,
        local__steps=2,
        local__spec_augment={"time_masks": 1},
        privacy__unit="example",
        privacy__example={"sampling_rate": 0.5, "silo_size": 3},
        privacy__delta=0.1,
    )
    prepared = experiment.prepare(config)
    before = prepared.server.parameters().clone()
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, Silent(), drive_on(None))
    last = directory.read_metrics()[-1]
    assert last["epsilon"]["rdp"] >= last["silos"]["median"] > 0
    assert "wer" in last["held_out"]
    assert not prepared.server.parameters().equal(before)
    assert last["simulation_only"]["non_finite"] == 0
