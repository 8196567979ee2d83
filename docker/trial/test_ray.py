"""A Ray cluster of containers that share nothing trains what one process trains, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from federation import ROOT, SMALL
from safetensors.numpy import load_file

FILES = ("-f", str(ROOT / "docker" / "compose.ray.yaml"))
ROUNDS = 2


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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
