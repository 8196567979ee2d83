"""Whole runs through the command line and Ray workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from in_process import Silent, resume_small, small_config, train_small

from fedpriv import experiment
from fedpriv.privacy import Ledger, PldAccountant
from fedpriv.training.memory_store import Journal, Memories


def write_config(folder: Path, **changes) -> Path:
    config = small_config(run_dir=str(folder / "run"), **changes)
    path = folder / "config.yaml"
    path.write_text(config.to_yaml())
    return path


def start(*arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "fedpriv", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def wait_for_rounds(process: subprocess.Popen, folder: Path, rounds: int) -> None:
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < rounds:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_over_ray_equals_the_run_in_one_process_to_the_bit(tmp_path):
    code, out, err = finish(start("run", write_config(tmp_path), "--profile"))
    assert code == 0, err
    assert out.startswith("small: accuracy ")
    assert "where the time of 4 rounds went" in err
    assert (tmp_path / "run" / "trace.json").exists()
    assert "ε" in err
    assert "accuracy" in err
    assert (tmp_path / "run" / "report.html").exists()
    _, over_ray = experiment.reopen(tmp_path / "run")
    local = experiment.prepare(small_config(run_dir=str(tmp_path / "local"), runtime__grid="local"))
    directory = experiment.create(local)
    experiment.train(local, directory, Silent())
    assert over_ray.server.parameters().equal(local.server.parameters())
    releases = list(Ledger.open(tmp_path / "run" / "ledger.jsonl"))
    assert releases == list(Ledger.open(directory.ledger))
    assert all(release.digest for release in releases)


def stop(process: subprocess.Popen, folder: Path, number: signal.Signals, after: int) -> None:
    """Send a run a signal after so many rounds; it says how to go on."""
    wait_for_rounds(process, folder, after)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err
    assert f"fedpriv resume {folder / 'run'}" in err


def test_ctrl_c_and_a_polite_kill_leave_a_run_that_resumes_to_the_same_end(tmp_path):
    stop(start("run", write_config(tmp_path, rounds=40)), tmp_path, signal.SIGINT, after=2)
    charged = len(Ledger.open(tmp_path / "run" / "ledger.jsonl"))
    assert 2 <= charged < 38
    stop(start("resume", tmp_path / "run"), tmp_path, signal.SIGTERM, after=charged + 1)
    assert charged < len(Ledger.open(tmp_path / "run" / "ledger.jsonl")) < 40

    directory, resumed = resume_small(tmp_path / "run")
    other, uninterrupted = train_small(tmp_path / "reference", rounds=40)
    assert resumed.server.parameters().equal(uninterrupted.server.parameters())
    assert directory.read_metrics()[-1]["epsilon"] == other.read_metrics()[-1]["epsilon"]


def test_a_second_ctrl_c_ends_at_once_and_what_is_finished_resumes(tmp_path):
    slow = {"steps": 1000, "batch_size": 4}
    process = start("run", write_config(tmp_path, rounds=3, local=slow))
    # It is written, whole, while nodes work at the next round.
    checkpoint = tmp_path / "run" / "checkpoints" / "round-000001.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = next(line for line in process.stderr if "Ctrl-C again" in line)
    process.send_signal(signal.SIGINT)
    err = said + process.stderr.read()
    code = process.wait(timeout=180)
    assert code == 130, err
    assert "abandoned" in err
    assert len(Ledger.open(tmp_path / "run" / "ledger.jsonl")) == 1
    _, reopened = experiment.reopen(tmp_path / "run")
    assert reopened.finished_rounds == 1


def test_kill_9_of_everything_tears_no_users_memory(tmp_path):
    feedback = {"rounds": 20, "privacy__error_feedback": "user"}
    process = start("run", write_config(tmp_path, **feedback))
    wait_for_rounds(process, tmp_path, 3)
    os.killpg(process.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert "what users keep takes" in err
    _, resumed = resume_small(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.npy"))  # exact sums
    _, uninterrupted = train_small(tmp_path / "reference", **feedback)
    assert resumed.server.parameters().equal(uninterrupted.server.parameters())
    memories = [folder / "memory" for folder in (tmp_path / "run", tmp_path / "reference")]
    assert everybodys(memories[0]).equal(everybodys(memories[1]))


def everybodys(folder: Path) -> torch.Tensor:
    with Memories(folder, 0).round(Journal(10_000, 0, 0, 0)) as memories:
        return memories.read(list(range(60)))


def test_a_killed_worker_costs_its_contributions_and_the_run_goes_on(tmp_path):
    process = start("run", write_config(tmp_path, rounds=12, local={"steps": 30, "batch_size": 4}))
    wait_for_rounds(process, tmp_path, 2)
    os.kill(_a_worker_of(process.pid), signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    directory, _ = experiment.reopen(tmp_path / "run")
    rows = directory.read_metrics()
    assert [row["round"] for row in rows] == list(range(1, 13))
    assert sum(row["nodes_lost"] for row in rows) >= 1
    assert len(Ledger.open(directory.ledger)) == 12


def _a_worker_of(pid: int) -> int:
    """Return the process id of a Ray worker that trains, among the descendants of `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry.name)] = (int(stat[1]), (entry / "cmdline").read_text())
            except OSError:
                continue
    for child, (_, command) in parents.items():
        ancestor = child
        while ancestor in parents and ancestor != pid:
            ancestor = parents[ancestor][0]
        if ancestor == pid and command.startswith("ray::RayNode"):
            return child
    raise AssertionError("no Ray worker found")


def test_a_budget_stop_exits_with_3_and_keeps_the_model(tmp_path):
    config = write_config(
        tmp_path, rounds=30, privacy__budget={"epsilon": 2.0}, runtime__grid="local"
    )
    code, out, err = finish(start("run", config))
    assert code == 3, err
    assert "is not run" in err
    assert "the budget of ε = 2 will stop the run after round" in err
    directory, kept = experiment.reopen(tmp_path / "run")
    assert kept.finished_rounds == len(Ledger.open(directory.ledger)) > 0
    assert directory.read_metrics()[-1]["epsilon"]["rdp"] <= 2.0
    ledger = Ledger.open(directory.ledger)
    tight = PldAccountant(ledger.adjacency)
    ledger.compose_into(tight)
    assert tight.epsilon(1e-3) <= 2.0
    assert out.startswith("small: accuracy ")


def test_what_data_cannot_give_is_the_users_one_line(tmp_path):
    code, out, err = finish(start("run", write_config(tmp_path), "--set", "data.users=1501"))
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["config", "--help"]])
def test_help(arguments):
    code, out, _ = finish(start(*arguments))
    assert code == 0
    assert "Usage" in out
