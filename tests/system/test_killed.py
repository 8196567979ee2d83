"""Kill -9 between any two steps of a round: the run resumes, and no release goes uncharged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from in_process import SILOS, resume_small, train_small

from fedpriv.privacy import Ledger
from fedpriv.training.memory_store import Journal, Memories

HERE = Path(__file__).parent
STEPS = [
    "draw the cohort",
    "ask the nodes",
    "add up",
    "draw the noise",
    "charge the ledger",
    "half of the ledger's line",
    "step the model",
    "record the round",
    "write the metrics",
    "collect the state",
    "write the checkpoint",
    "rename the checkpoint",
]
WITH_MEMORIES = [
    "charge the ledger",
    "step the model",
    "rename the checkpoint",
    "open a journal",
    "half of a journal",
    "seal a journal",
    "commit the memories",
    "half of a memory",
    "write the store's state",
    "forget the journals",
]
IN_SILOS = [
    "add the noise of a step",
    "charge the ledger",
    "step the model",
    "rename the checkpoint",
]
CHARGED_BEFORE_THE_KILL = STEPS.index("step the model")
# Round 1 is reported when round 2 has been asked for: this is in round 3, and round 2, which is
# charged and used, has not reached the disk.
IN_ROUND_3 = ("draw the cohort",)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """One killed run for each kind and step, all out of one process, whose imports take longest."""
    base = tmp_path_factory.mktemp("killed")
    folders = {
        (kind, step): base / f"{kind}-{step}".replace(" ", "-").replace("'", "")
        for kind, steps in (("users", STEPS), ("memories", WITH_MEMORIES), ("silos", IN_SILOS))
        for step in steps
    }
    runs = [part for (kind, step), folder in folders.items() for part in (kind, str(folder), step)]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_run.py"), *runs],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def whole_with_memories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train_small(folder, privacy__error_feedback="user")


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_run_resumes_to_the_same_end(step, killed, whole):
    folder = killed["users", step]
    before = len(_whole_releases(folder))
    # Round 1 is finished; round 2's release may have been used from the step of the model on.
    used = STEPS.index(step) >= CHARGED_BEFORE_THE_KILL or step in IN_ROUND_3
    assert before == (2 if used else 1)

    directory, resumed = resume_small(folder)
    whole_directory, uninterrupted = whole
    assert resumed.server.parameters().equal(uninterrupted.server.parameters())
    rows, expected = directory.read_metrics(), whole_directory.read_metrics()
    assert [row["epsilon"] for row in rows] == [row["epsilon"] for row in expected]
    releases = [(r.round, r.digest) for r in Ledger.open(directory.ledger)]
    assert releases == [(r.round, r.digest) for r in Ledger.open(whole_directory.ledger)]


@pytest.mark.parametrize("step", WITH_MEMORIES)
def test_no_memory_is_torn_by_a_kill(step, killed, whole_with_memories):
    """Parameters, releases and every user's memory come out to the same bits."""
    directory, resumed = resume_small(killed["memories", step])
    whole_directory, uninterrupted = whole_with_memories
    assert resumed.server.parameters().equal(uninterrupted.server.parameters())
    releases = [(r.round, r.digest) for r in Ledger.open(directory.ledger)]
    assert releases == [(r.round, r.digest) for r in Ledger.open(whole_directory.ledger)]
    found, expected = (_memories(each.memory) for each in (directory, whole_directory))
    assert found.equal(expected)
    assert found.any()


@pytest.fixture(scope="module")
def whole_silos(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("whole") / "run", **SILOS)


@pytest.mark.parametrize("step", IN_SILOS)
def test_silos_of_a_killed_round_send_the_same_again_and_pay_once(step, killed, whole_silos):
    folder = killed["silos", step]
    charged = len(_whole_releases(folder))
    assert charged == (1 if step in ("add the noise of a step", "charge the ledger") else 2)
    directory, resumed = resume_small(folder)
    whole_directory, uninterrupted = whole_silos
    assert resumed.server.parameters().equal(uninterrupted.server.parameters())
    releases = list(Ledger.open(directory.ledger))
    # The same silos, and a digest of the same noisy changes.
    assert releases == list(Ledger.open(whole_directory.ledger))
    assert len(releases[1].silos) > 0
    rows, expected = directory.read_metrics(), whole_directory.read_metrics()
    assert [row["silos"] for row in rows] == [row["silos"] for row in expected]


def _memories(folder: Path) -> torch.Tensor:
    with Memories(folder, 0).round(Journal(10_000, 0, 0, 0)) as memories:
        return memories.read(list(range(60)))


def _whole_releases(folder: Path) -> list[str]:
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return [line for line in lines[1:] if line.endswith("}")]
