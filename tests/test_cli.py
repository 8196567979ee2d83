"""The command line: what it prints, and one clear line with exit code 2 for wrong input."""

import errno
import gzip
import json
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from in_process import SMALL, Silent, drive_on, train_small

from fedpriv import cli, experiment
from fedpriv.federation import ray_cluster
from fedpriv.privacy import Ledger


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, standard output and error."""
    monkeypatch.setattr(sys, "argv", ["fedpriv", *(str(argument) for argument in arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def events(monkeypatch) -> list[str]:
    """What happens in turn; Ray, which takes seconds to start and to end, does neither."""
    seen = []

    @contextmanager
    def cluster(runtime):
        seen.append("Ray starts")
        try:
            yield
        finally:
            seen.append("Ray ends")

    def told(error, tell=cli._tell):
        tell(error)
        seen.append("error")

    monkeypatch.setattr(ray_cluster, "cluster", cluster)
    monkeypatch.setattr(cli, "_tell", told)
    return seen


@pytest.fixture
def fedpriv(monkeypatch, capsys):
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "run_dir": str(tmp_path / "run")}))
    return path


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


def idx_folder(folder: Path, truncate: bool = False, label: int = 3) -> Path:
    """A folder of 40 tiny images in MNIST's format, optionally damaged."""
    folder.mkdir()
    for split in ("train", "t10k"):
        images = struct.pack(">IIII", 2051, 40, 8, 8) + bytes(40 * 64)
        labels = struct.pack(">II", 2049, 40) + bytes([label] * 40)
        if truncate:
            images = images[:-100]
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder


OVERRIDES = {
    "an unknown key": (["privacy.detla=1"], ["privacy.detla", "did you mean delta?"]),
    "negative noise": (["privacy.noise_multiplier=-1"], ["privacy.noise_multiplier", "-1"]),
    "an impossible delta": (["privacy.delta=1.5"], ["privacy.delta", "1.5"]),
    "delta above 1/N": (["privacy.delta=0.5"], ["privacy.delta must be below 1/population"]),
    "a cohort above the population": (
        ["privacy.sampling.expected_cohort=61"],
        ["privacy.sampling.expected_cohort", "population of 60"],
    ),
    "an unknown optimizer": (["server.optimizer=lamp"], ["server.optimizer", "lamb"]),
    "an impossible option": (["server.options.beta=1"], ["server.options.beta"]),
    "an unknown normaliser": (["server.normalize=whiten"], ["server.normalize"]),
    "an unknown data set": (["data.name=digit"], ["data.name", "digits"]),
    "more users than examples": (["data.users=5000"], ["data.users"]),
    "an unknown model": (["model.name=vitt"], ["model.name", "vit"]),
    "heads that do not fit": (["model.heads=3"], ["model.heads"]),
    "patches that do not fit": (["model.patch=3"], ["model.patch"]),
    "a device that is not there": (["runtime.device=cuda:77"], ["runtime.device"]),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_wrong_values_are_one_line_and_nothing_is_written(case, fedpriv, config, tmp_path):
    overrides, words = OVERRIDES[case]
    options = [part for override in overrides for part in ("--set", override)]
    assert_one_line(fedpriv("run", config, *options), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override", ["data.name=digit", "model.heads=3", "privacy.delta=0.5"])
def test_data_model_and_privacy_are_checked_before_ray_starts(override, fedpriv, config, events):
    fedpriv("run", config, "--set", override)
    assert events == ["error"]


def test_what_is_found_later_is_told_before_ray_is_waited_for(fedpriv, config, events):
    fedpriv("run", config, "--set", "server.optimizer=lamp")
    assert events == ["Ray starts", "error", "Ray ends"]


def images(config: Path, folder: Path) -> list[str]:
    document = yaml.safe_load(config.read_text())
    document["data"] = {"name": "idx_images", "users": 4, "path": str(folder)}
    config.write_text(yaml.safe_dump(document))
    return ["run", str(config)]


def test_a_missing_folder_names_the_files_and_where_they_come_from(fedpriv, config, tmp_path):
    assert_one_line(fedpriv(*images(config, tmp_path / "nowhere")), "data.path", "idx3-ubyte")


def test_a_truncated_idx_file(fedpriv, config, tmp_path):
    folder = idx_folder(tmp_path / "images", truncate=True)
    assert_one_line(fedpriv(*images(config, folder)), "idx3-ubyte")


def test_a_wrong_label(fedpriv, config, tmp_path):
    folder = idx_folder(tmp_path / "images", label=99)
    assert_one_line(fedpriv(*images(config, folder)), "label", "99")


def test_a_run_directory_that_cannot_be_written(fedpriv, config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_one_line(fedpriv("run", config, "--set", f"run_dir={tmp_path}/file/run"), "run_dir")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_run_directory_in_use_is_not_overwritten(fedpriv, config, tmp_path):
    train_small(tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert_one_line(fedpriv("run", config), "run_dir", "not empty", "fedpriv resume")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_corrupt_checkpoint(fedpriv, tmp_path):
    train_small(tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    assert_one_line(fedpriv("resume", tmp_path / "run"), "corrupt checkpoint", newest.name)


def test_the_ledger_of_another_config(fedpriv, tmp_path):
    train_small(tmp_path / "run")
    train_small(tmp_path / "other", seed=6)
    ledger = tmp_path / "run" / "ledger.jsonl"
    other = (tmp_path / "other" / "ledger.jsonl").read_bytes()
    ledger.write_bytes(other)
    assert_one_line(fedpriv("resume", tmp_path / "run"), "another configuration")
    assert ledger.read_bytes() == other


@pytest.mark.parametrize("line", [b"\xff\xfe", b"5", b"[]", b'{"x": 1}'])
def test_damaged_metrics(fedpriv, tmp_path, line):
    directory, _ = train_small(tmp_path / "run")
    directory.metrics.write_bytes(line + b"\n" + directory.metrics.read_bytes())
    assert_one_line(fedpriv("resume", tmp_path / "run"), "metrics.jsonl", "line 1")


def test_a_torn_ledger_line_is_dropped_and_said(tmp_path):
    directory, _ = train_small(tmp_path / "run")
    with directory.ledger.open("ab") as file:
        file.write(b'{"kind": "release", "rou')
    observer = Silent()
    reopened, prepared = experiment.reopen(tmp_path / "run")
    experiment.train(prepared, reopened, observer, drive_on(None))
    (sentence,) = observer.sentences
    assert "dropped a torn last line of 24 bytes" in sentence
    assert "4 are charged" in sentence


def test_a_ledger_that_is_gone(fedpriv, tmp_path):
    train_small(tmp_path / "run")
    (tmp_path / "run" / "ledger.jsonl").unlink()
    assert_one_line(fedpriv("resume", tmp_path / "run"), "ledger.jsonl is missing")
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_an_edited_ledger(fedpriv, tmp_path):
    train_small(tmp_path / "run")
    ledger = tmp_path / "run" / "ledger.jsonl"
    text = ledger.read_text().replace('"noise_multiplier": 1.0', '"noise_multiplier": 9.0', 1)
    ledger.write_text(text)
    assert_one_line(fedpriv("resume", tmp_path / "run"), "line 2", "edited")


def test_a_folder_that_is_no_run(fedpriv, tmp_path):
    assert_one_line(fedpriv("resume", tmp_path), "not a run directory")


def test_two_processes_cannot_run_one_directory(fedpriv, tmp_path):
    directory, _ = train_small(tmp_path / "run")
    with directory.lock():
        assert_one_line(fedpriv("resume", tmp_path / "run"), "another process")


def test_a_finished_run_resumes_to_its_report_and_charges_nothing(fedpriv, tmp_path):
    directory, _ = train_small(tmp_path / "run")
    before = directory.ledger.read_bytes()
    code, out, err = fedpriv("report", tmp_path / "run")
    assert code == 0, err
    assert "small" in out
    assert directory.report.exists()
    assert directory.ledger.read_bytes() == before
    assert len(Ledger.open(directory.ledger)) == 4


def test_config_commands(fedpriv, config):
    code, out, _ = fedpriv("config", "show", config, "--set", "privacy.delta=1e-6")
    assert code == 0
    assert yaml.safe_load(out)["privacy"]["delta"] == 1e-6
    code, out, _ = fedpriv("config", "validate", config)
    assert code == 0
    assert "valid; 4 rounds cost ε = " in out
    code, out, _ = fedpriv("config", "schema")
    assert code == 0
    assert json.loads(out)["additionalProperties"] is False
    assert_one_line(fedpriv("config", "validate", config, "--set", "rounds=0"), "rounds")


def test_usage_errors_exit_with_2(fedpriv):
    assert fedpriv("run")[0] == 2
    assert fedpriv("fly")[0] == 2


def test_a_full_disk_is_one_line(fedpriv, config, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "ledger.jsonl")

    monkeypatch.setattr(experiment, "create", full)
    code, out, err = fedpriv("run", config)
    assert (code, out) == (1, "")
    assert "the disk is full" in err
    assert "resume" in err
    assert "Traceback" not in err

    def other(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(experiment, "create", other)
    with pytest.raises(OSError, match="Input/output error"):
        fedpriv("run", config)
