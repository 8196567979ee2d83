"""The command line: what it prints, and one clear line with exit code 2 for wrong input."""

import ast
import errno
import gzip
import io
import json
import os
import re
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from in_process import SMALL, Silent, drive_on, train_small
from pydantic import BaseModel
from schema import sections_of
from typer.main import get_command

from fedpriv import __main__, cli, experiment
from fedpriv.config import ExperimentConfig
from fedpriv.disk import barred
from fedpriv.errors import ClientFault, InputError, Interrupted, WorkerLost
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

    def told(error, tell=cli.tell):
        tell(error)
        seen.append("error")

    monkeypatch.setattr(ray_cluster, "cluster", cluster)
    monkeypatch.setattr(ray_cluster, "ensure_started", lambda runtime: seen.append("Ray is up"))
    for module in (cli, cli.runs):
        monkeypatch.setattr(module, "tell", told)
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


@pytest.mark.parametrize(
    "override",
    [
        "data.name=digit",
        "model.heads=3",
        "privacy.delta=0.5",
        "privacy.sampling.expected_cohort=61",
        "privacy.noise_by=nobody",
    ],
)
def test_data_model_and_privacy_are_checked_before_ray_starts(override, fedpriv, config, events):
    fedpriv("run", config, "--set", override)
    assert events == ["error"]


@pytest.mark.parametrize("override", ["server.optimizer=lamp"])
def test_what_is_found_later_is_told_before_ray_is_waited_for(override, fedpriv, config, events):
    fedpriv("run", config, "--set", override)
    assert events == ["Ray starts", "error", "Ray ends"]


def images(config: Path, folder: Path) -> list[str]:
    document = yaml.safe_load(config.read_text())
    document["data"] = {"name": "idx_images", "users": 4, "path": str(folder)}
    config.write_text(yaml.safe_dump(document))
    return ["run", str(config)]


def test_what_others_print_in_a_run_is_not_on_standard_output(fedpriv, config, monkeypatch):
    def prints(*_):
        print("(raylet) A worker died")
        raise Interrupted("stopped")

    monkeypatch.setattr(experiment, "train", prints)
    code, out, err = fedpriv("run", config)
    assert (code, out) == (130, "")
    assert "(raylet) A worker died" in err


def test_a_run_whose_workers_are_lost_says_how_to_go_on(fedpriv, config, monkeypatch):
    def loses(*_):
        raise WorkerLost("Ray itself has died")

    monkeypatch.setattr(experiment, "train", loses)
    code, out, err = fedpriv("run", config)
    assert (code, out) == (1, "")
    assert f"Ray itself has died; continue with: fedpriv resume {config.parent / 'run'}" in err


def test_ctrl_c_does_not_wait_for_ray_to_start(fedpriv, config, events, monkeypatch):
    def ended(code: int) -> None:
        events.append("the process ends")
        raise SystemExit(code)

    def hangs(runtime):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", ended)
    monkeypatch.setattr(ray_cluster, "ensure_started", hangs)
    code, out, err = fedpriv("run", config)
    assert (code, out, err.strip()) == (130, "", "abandoned")
    assert events[:2] == ["Ray starts", "the process ends"]
    assert not (config.parent / "run").exists()


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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["run", "c.yaml", "rounds=3"], "(rounds=3); write --set rounds=3"),
        (
            ["config", "show", "c.yaml", "rounds=3", "data.users=2"],
            "; write --set rounds=3 --set data.users=2",
        ),
        (["run", "c.yaml", "other"], "(other)"),
        (["runs"], "No such command 'runs'. Did you mean 'run'?"),
        (["data", "describ"], "No such command 'describ'. Did you mean 'describe'?"),
    ],
)
def test_what_cannot_be_read_is_said_once_with_what_to_write(given, said, fedpriv):
    code, out, err = fedpriv(*given)
    line = next(line for line in err.splitlines() if said.split()[0] in line)
    assert (code, out) == (2, "")
    assert line.strip("│ ").endswith(said)
    assert err.count("Did you mean") == said.count("Did you mean")


def test_usage_errors_exit_with_2(fedpriv):
    assert fedpriv("run")[0] == 2
    assert fedpriv("fly")[0] == 2


def test_ray_is_up_before_there_is_a_run_directory(fedpriv, config, tmp_path, monkeypatch, events):
    def down(runtime):
        raise InputError("Ray does not start")

    monkeypatch.setattr(ray_cluster, "ensure_started", down)
    assert_one_line(fedpriv("run", config), "Ray does not start")
    assert not (tmp_path / "run").exists()
    assert events == ["Ray starts", "error", "Ray ends"]


FULL = {
    "no space": OSError(errno.ENOSPC, "No space left on device", "ledger.jsonl"),
    "no quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "mounted anew": OSError(errno.EROFS, "Read-only file system"),
    "of a worker": ClientFault("<class 'OSError'>:<'[Errno 28] No space left on device'>"),
}


def raising(error: Exception):
    def call(*arguments, **options):
        raise error

    return call


@pytest.mark.parametrize("case", FULL)
@pytest.mark.parametrize("stage", ["training", "the report"])
def test_a_full_disk_is_a_line_and_an_interruption(
    case, stage, fedpriv, config, tmp_path, monkeypatch
):
    if stage == "training":
        monkeypatch.setattr(experiment, "train", raising(FULL[case]))
    else:
        monkeypatch.setattr(experiment, "train", lambda *arguments: None)
        monkeypatch.setattr(cli.runs, "_conclude", raising(FULL[case]))
    code, out, err = fedpriv("run", config)
    assert (code, out) == (130, "")
    assert "a disk is full" in err
    assert f"continue with: fedpriv resume {tmp_path / 'run'}" in err
    assert len(err.strip().splitlines()) == 1


def test_a_full_disk_where_nothing_can_be_resumed_is_a_line(fedpriv, config, monkeypatch):
    monkeypatch.setattr(experiment, "create", raising(FULL["no space"]))
    code, out, err = fedpriv("run", config)
    assert (code, out) == (1, "")
    assert "error: a disk is full (ledger.jsonl: No space left on device)" in err
    assert "resume" not in err
    assert len(err.strip().splitlines()) == 1


def test_another_failure_of_a_disk_is_no_full_disk(fedpriv, config, monkeypatch):
    monkeypatch.setattr(experiment, "create", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        fedpriv("run", config)


def test_a_finished_run_that_is_resumed_says_so_and_starts_nothing(fedpriv, tmp_path, monkeypatch):
    directory, _ = train_small(tmp_path / "run", runtime__profile=True)
    before = {p: p.read_bytes() for p in directory.path.rglob("*.json*")}
    monkeypatch.setattr(experiment, "simulated_nodes", raising(AssertionError("started")))
    code, _, err = fedpriv("resume", directory.path)
    assert code == 0, err
    assert "nothing is left to train: 4 rounds finished" in err
    assert "resuming" not in err
    assert directory.report.exists()
    assert before == {p: p.read_bytes() for p in directory.path.rglob("*.json*")}


def test_the_folder_above_a_run_offers_the_newest(fedpriv, tmp_path):
    for name in ("b", "a [2]"):
        train_small(tmp_path / "runs" / "small" / name, rounds=1)
    (tmp_path / "runs" / "small" / "no run").mkdir()
    for folder in (tmp_path / "runs", tmp_path / "runs" / "small"):
        for command in (["report"], ["resume"], ["ledger", "verify"]):
            newest = f"the newest run in it is '{tmp_path}/runs/small/a [2]'"
            assert_one_line(fedpriv(*command, folder), newest)


@pytest.mark.parametrize("command", ["show", "verify", "merge"])
def test_another_file_is_no_ledger_and_not_an_edited_one(command, fedpriv, tmp_path):
    train_small(tmp_path / "run", rounds=1)
    (tmp_path / "run" / "text").write_text("plain words\n")
    (tmp_path / "run" / "number").write_text("3\n")
    for name in ("metrics.jsonl", "environment.json", "config.yaml", "text", "number", ".lock"):
        result = fedpriv("ledger", command, tmp_path / "run" / name)
        assert_one_line(result, "not a fedpriv ledger", f"{tmp_path}/run/ledger.jsonl")
        assert "edited" not in result[2]
    ledger = tmp_path / "run" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"header"', '"heeder"', 1))
    assert_one_line(fedpriv("ledger", command, ledger), "line 1", "edited")


def commands(group, *names: str):
    """Yield every command with its name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield [*names, name], command


COMMANDS = {" ".join(names): command for names, command in commands(get_command(cli.app))}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_says_what_its_arguments_are(name, fedpriv):
    code, out, _ = fedpriv(*name.split(), "--help")
    assert code == 0
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "argument":
            assert f"{parameter.metavar}: " in out
        else:
            assert parameter.help.split()[0] in out


def strings() -> str:
    """All text in fedpriv's source, with `{}` for what is filled in."""
    found = []
    for path in Path(cli.__file__).parents[1].rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        getattr(part, "value", "{}") if isinstance(part, ast.Constant) else "{}"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [] if id(node) in inner else [node.value]
    return "\n".join(found)


def test_every_command_and_option_that_a_message_names_exists():
    # After a backquote, `with:` and the like nothing but a command follows.
    told = re.findall(r"(?:`|with:? |shown by )fedpriv ([a-z]+)(?: ([a-z-]+))?", strings())
    assert ("resume", "") in told
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    for first, second in told:
        assert (f"{first} {second}" if first in groups else first) in COMMANDS
    options = {o for c in COMMANDS.values() for p in c.params for o in p.opts}
    mentioned = set(re.findall(r"(?<![\w(-])--[a-z][a-z-]+(?![a-z-]*:)", strings()))
    others = {"--run-config", "--node-config", "--porcelain"}  # Flower's, and git's
    assert mentioned <= options | others | {"--help", "--version"}, mentioned - options


def test_every_key_that_a_message_names_exists():
    def exists(path: str) -> bool:
        sections: list[type[BaseModel]] = [ExperimentConfig]
        for part in path.split("."):
            if not sections:
                return True  # below it the optimizer's own options
            fields = [s.model_fields[part] for s in sections if part in s.model_fields]
            if not fields:
                return False
            sections = [each for field in fields for each in sections_of(field)]
        return True

    roots = "|".join(name for name, field in ExperimentConfig.model_fields.items())
    named = set(re.findall(rf"(?<![\w./{{])((?:{roots})(?:\.[a-z_0-9]+)+)(?![\w(])", strings()))
    endings = ("py", "yaml", "json", "safetensors", "pt", "onnx")
    modules = {name for name in named if name.split(".")[-1] in endings}
    # A progress bar's, and what stands in code.
    named -= {"algorithm.shared", *(f"task.{part}" for part in ("completed", "fields", "total"))}
    unknown = sorted(name for name in named - modules if not exists(name))
    assert not unknown


def test_output_that_was_closed_ends_no_command(monkeypatch, config):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "argv", ["fedpriv", "config", "show", str(config)])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 0


NO_NAME = "x" * 300  # root may do anything: here is a path that no file system has


@pytest.mark.parametrize(
    "asked",
    [
        ("run", "configs/vit_digits.yaml", f"--set=seed_model.path={NO_NAME}"),
        ("run", "configs/vit_digits.yaml", f"--set=run_dir={NO_NAME}"),
        ("run", NO_NAME),
        ("resume", NO_NAME),
        ("report", NO_NAME),
        ("predict", NO_NAME, "x.png"),
        ("export", NO_NAME, "--to=torch"),
        ("ledger", "verify", NO_NAME),
        ("deploy", "prepare", "configs/vit_digits.yaml", f"--out={NO_NAME}"),
    ],
    ids=lambda asked: " ".join(asked)[:20],
)
def test_a_path_that_cannot_be_followed_is_one_line(fedpriv, asked):
    """Wherever it is first asked about; a folder that may not be searched is another cause."""
    code, _, err = fedpriv(*asked)
    assert code == 2
    assert err.startswith("error: ")
    assert "File name too long" in err
    assert "Traceback" not in err


def test_whoever_may_not_search_a_folder_is_told_which_path_it_is():
    refused = PermissionError(errno.EACCES, "Permission denied", "/locked/config.yaml")
    assert "/locked/config.yaml: cannot be reached (Permission denied)" in str(barred(refused))
    assert barred(OSError(errno.ENOENT, "gone", "x")) is None
    assert barred(OSError(errno.EACCES, "Permission denied")) is None


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EPIPE, None)])
def test_output_that_finds_no_room_is_told(tmp_path, monkeypatch, capsys, number, code):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(number, os.strerror(number))

        def fileno(self) -> int:
            return opened.fileno()

    monkeypatch.setattr(cli, "app", lambda: None)
    with open(tmp_path / "output", "w") as opened:
        monkeypatch.setattr(sys, "stdout", Full())
        if code is None:
            cli.main()
        else:
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == code
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == (0 if code is None else 1)
