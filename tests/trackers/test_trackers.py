"""Trackers get the numbers of each round, private ones only if asked, and never cost a round."""

import json
import math
import os
import struct
import sys
import time

import pytest
from in_process import Silent, drive_on, resume_small, small_config, train_small

from fedpriv import experiment
from fedpriv.errors import InputError
from fedpriv.federation.messages import query_message
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.trackers.base import numbers_of
from fedpriv.trackers.mlflow import MlflowTracker

ROUNDS = 4


def expected(directory, private):
    """The numbers of each round, written plainly from metrics.jsonl."""
    found = {}
    for line in directory.metrics.read_text().splitlines():
        row, flat = json.loads(line), {}

        def walk(prefix, value, flat=flat):
            if isinstance(value, dict):
                for key, inner in value.items():
                    walk([*prefix, key], inner)
            elif (
                isinstance(value, int | float)
                and prefix != ["round"]
                and (private or prefix[0] != "simulation_only")
            ):
                flat["/".join(prefix)] = float(value)

        walk([], row)
        found[row["round"]] = flat
    return found


def by_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for scalar in events.Scalars(name):
            found.setdefault(scalar.step, {})[name] = scalar.value
    return found


def by_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'small'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["rounds"] == str(ROUNDS)
    found = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            found.setdefault(metric.step, {})[name] = metric.value
    return found


def records_of(data):
    """The records of LevelDB's log format, in which wandb writes: blocks of 32 KiB."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def wandb_records(path):
    from wandb.proto import wandb_internal_pb2

    for data in records_of(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def is_whole(path):
    return any(record.HasField("exit") for record in wandb_records(path))


def by_wandb(folder):
    paths = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    # Its own process writes on for a moment after the run has finished.
    until = time.monotonic() + 20
    while time.monotonic() < until and not all(map(is_whole, paths)):
        time.sleep(0.1)
    found = {}
    for path in paths:
        for record in wandb_records(path):
            items = {each.key or "/".join(each.nested_key): each for each in record.history.item}
            if items:
                own = {name: each for name, each in items.items() if not name.startswith("_")}
                step = int(json.loads(items["_step"].value_json))
                found[step] = {
                    name: float(json.loads(each.value_json)) for name, each in own.items()
                }
    return found


READERS = {"tensorboard": by_tensorboard, "mlflow": by_mlflow, "wandb": by_wandb}


@pytest.fixture(autouse=True)
def _nothing_of_the_user(tmp_path, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in [each for each in os.environ if each.startswith("MLFLOW")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_every_round_is_there_and_what_is_private_only_if_asked(name, private, tmp_path):
    tracker = {"name": name, "simulation_only": private}
    directory, _ = train_small(tmp_path / "run", name="small", rounds=ROUNDS, tracker=tracker)
    found, wanted = READERS[name](directory.path), expected(directory, private)
    assert found.keys() == wanted.keys() == set(range(1, ROUNDS + 1))
    for round_, numbers in wanted.items():
        assert found[round_] == pytest.approx(numbers, rel=1e-6)
    names = {each for numbers in found.values() for each in numbers}
    assert any(each.startswith("simulation_only/") for each in names) == private
    assert {"epsilon/rdp", "held_out/accuracy"} <= names


@pytest.mark.parametrize("name", READERS)
def test_a_resumed_run_goes_on_in_the_same_place(name, tmp_path):
    directory, _ = train_small(
        tmp_path / "run", name="small", rounds=ROUNDS, tracker={"name": name}
    )
    (directory.checkpoints / f"round-{ROUNDS:06d}.safetensors").unlink()
    resume_small(directory.path)
    found = READERS[name](directory.path)
    assert found.keys() == set(range(1, ROUNDS + 1))


def test_a_tracker_is_no_part_of_a_run_and_nodes_do_not_hear_of_it():
    plain, tracked = small_config(), small_config(tracker={"name": "tensorboard"})
    assert plain.fingerprint("") == tracked.fingerprint("")
    asked = query_message(1, tracked).content["config"]["experiment"]
    assert "tracker" not in json.loads(asked)


def test_a_tracker_of_ones_own_that_fails_costs_no_round(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    def __init__(self, run, fails_at: int = 2):\n"
        "        self.file, self.fails_at = run.folder / 'heard.txt', fails_at\n"
        "    def log(self, numbers, round_):\n"
        "        if round_ == self.fails_at:\n"
        "            raise OSError('the server is\\naway')\n"
        "        with self.file.open('a') as file:\n"
        "            file.write(f'{round_} {sorted(numbers)}\\n')\n"
        "    def close(self):\n"
        "        self.file.write_text('closed')\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {"code": str(tmp_path), "tracker": {"name": "mine:Mine"}}
    prepared = experiment.prepare(small_config(run_dir=str(tmp_path / "run"), **own))
    directory, silent = experiment.create(prepared), Silent()
    experiment.train(prepared, directory, silent, drive_on(None))
    assert len(directory.read_metrics()) == ROUNDS
    heard = (directory.path / "heard.txt").read_text()
    assert heard.startswith("1 ")
    assert "simulation_only" not in heard
    assert "\n2 " not in heard
    (sentence,) = [each for each in silent.sentences if each.startswith("tracker: ")]
    assert "mine:Mine failed" in sentence


def test_a_server_that_is_away_is_found_before_anything_is_trained(tmp_path, monkeypatch):
    def away(self, options, run):
        raise ConnectionError("refused")

    monkeypatch.setattr(MlflowTracker, "__init__", away)
    with pytest.raises(InputError, match=r"tracker\.name: mlflow"):
        train_small(tmp_path / "run", tracker={"name": "mlflow"})
    assert not RunDirectory.open(tmp_path / "run").read_metrics()


@pytest.mark.parametrize("name", READERS)
def test_a_package_that_is_missing_is_named_with_its_command(name, tmp_path, monkeypatch):
    for each in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, each)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    command = rf"tracker\.name: {name} needs {name}: pip install 'fedpriv\[{name}\]'"
    with pytest.raises(InputError, match=command):
        train_small(tmp_path / "run", tracker={"name": name})
    assert not RunDirectory.open(tmp_path / "run").read_metrics()


def test_numbers_that_are_none_are_left_out():
    row = {"round": 3, "epsilon": {"rdp": None, "pld": 1}, "noise_only": True, "lr": math.nan}
    assert dict(numbers_of(row, private=False)) == {"epsilon/pld": 1.0, "noise_only": 1.0}
