"""The thin app under Flower's own command line."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from in_process import small_config, train_small

from fedpriv import experiment
from fedpriv.privacy import Ledger

APP = Path(__file__).parents[2] / "simulations" / "flower_app"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def flower(tmp_path):
    """Flower's command line with a home and a SuperLink of its own, which is ended afterwards."""
    port = str(_free_port())
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "PATH": binaries + os.pathsep + os.environ["PATH"],
    }

    def flwr(*arguments: str) -> str:
        done = subprocess.run(
            ["flwr", *arguments], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield flwr
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if any("superlink" in part for part in command[:3]) and any(
                port in part for part in command
            ):
                os.kill(int(entry.name), signal.SIGTERM)


def test_flwr_run_completes_and_the_list_of_runs_says_finished(flower, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(small_config(rounds=2).to_yaml())
    app = tmp_path / "app"
    shutil.copytree(APP, app)
    overrides = f"run_dir={tmp_path / 'run'} evaluation.every=1"
    flower("run", str(app), "--run-config", f"config='{config}' set='{overrides}'", "--stream")
    runs = json.loads(flower("ls", "--format", "json"))["runs"]
    assert [run["status"] for run in runs] == ["finished:completed"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
    # The same as in one process, to the bit.
    directory, here = train_small(tmp_path / "here", rounds=2, evaluation__every=1)
    _, there = experiment.reopen(tmp_path / "run")
    assert there.server.parameters().equal(here.server.parameters())
    ledgers = [list(Ledger.open(d / "ledger.jsonl")) for d in (tmp_path / "run", directory.path)]
    assert ledgers[0] == ledgers[1]
    assert len(ledgers[0]) == 2
    assert all(release.digest for release in ledgers[0])
