"""A Ray cluster of containers that share nothing trains what one process trains, to the bit.

Nor does it stop where a machine is lost, and the machine has work again when it returns.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from federation import ROOT, SMALL
from safetensors.numpy import load_file

FILES = ("-f", str(ROOT / "docker" / "compose.ray.yaml"))
ROUNDS = 2
#: More rounds than are run while a machine goes and returns; then the run is told to stop.
_MANY = 100_000
_DRIVER = "trial-ray-driver"


@pytest.fixture
def compose(tmp_path):
    """Run `docker compose` on the cluster, whose results come into a folder `runs`."""
    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, 10001, 10001)
    for folder in [tmp_path, *tmp_path.parents[:2]]:
        folder.chmod(0o755)
    environment = {**os.environ, "FEDPRIV_RUNS": str(runs), "COMPOSE_PROJECT_NAME": "trial-ray"}

    def run(*asked: str) -> str:
        done = subprocess.run(
            ["docker", "compose", *FILES, *asked],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        yield run
    finally:
        run("down", "--volumes", "--timeout", "2")


def lines(path: Path) -> list[dict]:
    """The lines of a file that are whole."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def awaited(run: Path, what: Callable[[list[dict]], bool], seconds: float = 240) -> list[dict]:
    """The rounds of a run, once they are as they are waited for."""
    metrics, until = run / "metrics.jsonl", time.monotonic() + seconds
    while time.monotonic() < until:
        rows = lines(metrics) if metrics.exists() else []
        if what(rows):
            return rows
        time.sleep(0.2)
    raise AssertionError(rows[-3:])


def test_machines_that_share_nothing_train_the_run_of_one_process(compose, tmp_path):
    changes = {**SMALL, "rounds": ROUNDS, "runtime.workers": 2}
    config = ["/configs/vit_digits.yaml"]
    config += [f"--set={key}={value}" for key, value in changes.items()]

    def here() -> None:
        alone = ["run", "--rm", "--no-deps", "--entrypoint", "fedpriv", "run", "run", *config]
        compose(*alone, "--set=runtime.grid=local", "--set=run_dir=runs/here")

    compose("up", "--detach", "--wait", "head", "worker-1", "worker-2")
    with ThreadPoolExecutor(1) as beside:
        waited = beside.submit(here)
        compose("run", "--rm", "run", *config, "--set=run_dir=runs/cluster")
        waited.result()
    cluster, alone = tmp_path / "runs" / "cluster", tmp_path / "runs" / "here"
    assert [row["nodes_lost"] for row in lines(cluster / "metrics.jsonl")] == [0] * ROUNDS
    assert lines(cluster / "ledger.jsonl") == lines(alone / "ledger.jsonl")
    newest = Path("checkpoints") / f"round-{ROUNDS:06d}.safetensors"
    found, expected = load_file(cluster / newest), load_file(alone / newest)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_machine_that_is_lost_costs_a_round_of_its_users_and_has_work_when_it_returns(
    compose, tmp_path
):
    changes = {**SMALL, "rounds": _MANY, "evaluation.every": _MANY, "runtime.workers": 2}
    config = ["/configs/vit_digits.yaml", "--set=run_dir=runs/lost"]
    config += [f"--set={key}={value}" for key, value in changes.items()]
    directory = tmp_path / "runs" / "lost"
    compose("up", "--detach", "--wait", "head", "worker-1", "worker-2")

    def works() -> bool:
        """Say whether the second machine has a node of the run."""
        there = compose("exec", "-T", "worker-2", "sh", "-c", "cat /proc/[0-9]*/cmdline")
        return "RayNode" in there

    compose("run", "--detach", "--name", _DRIVER, "run", *config)
    try:
        awaited(directory, lambda rows: len(rows) >= 5)
        assert works()
        compose("kill", "worker-2")
        awaited(directory, lambda rows: any(row["nodes_lost"] for row in rows))
        rounds = len(awaited(directory, lambda rows: not any(r["nodes_lost"] for r in rows[-5:])))
        compose("start", "worker-2")
        awaited(directory, lambda rows: len(rows) > rounds and works())
        again = len(awaited(directory, bool))
        awaited(directory, lambda rows: len(rows) > again + 5)
    finally:
        subprocess.run(["docker", "kill", "--signal", "INT", _DRIVER], check=True)
        subprocess.run(["docker", "wait", _DRIVER], check=True)
    rows, (_, *releases) = lines(directory / "metrics.jsonl"), lines(directory / "ledger.jsonl")
    assert sum(row["nodes_lost"] for row in rows) == 1
    assert all(row["nodes_lost"] == 0 for row in rows[again:])
    assert [one["round"] for one in releases] == list(range(1, len(rows) + 1))
