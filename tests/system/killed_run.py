"""Train the small config in a process for each STEP, which SIGKILL ends just before it.

Round 1 is on the disk by then.

Usage: killed_run.py KIND FOLDER STEP [KIND FOLDER STEP ...]; KIND is users, memories or silos.
Exit code 1 where a run came to another end.
"""

import os
import signal
import sys
from pathlib import Path

from in_process import SILOS, train_small

from fedpriv import recorder
from fedpriv.federation.nodes import Nodes
from fedpriv.federation.round_record import RoundRecord
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.optimizers.server import Server
from fedpriv.privacy import ExampleLevel, Ledger
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.training.memory_store import Memories, MemoryStore, RoundMemories

STEPS = {
    "draw the cohort": (PrivateFedAvg, "configure_train"),
    "ask the nodes": (Nodes, "replies"),
    "add up": (Nodes, "sums"),
    "draw the noise": (PrivateFedAvg, "_noisy"),
    "charge the ledger": (Ledger, "append"),
    "half of the ledger's line": (Ledger, "_write"),
    "step the model": (Server, "step"),
    "record the round": (RoundRecord, "of"),
    "write the metrics": (RunDirectory, "append_metrics"),
    "collect the state": (Server, "state"),
    "write the checkpoint": (recorder, "save_checkpoint"),
    "rename the checkpoint": (Path, "replace"),
    # Where users keep memories; what follows a checkpoint happens to round 1.
    "open a journal": (Memories, "round"),
    "half of a journal": (RoundMemories, "write"),
    "seal a journal": (Path, "rename"),
    "commit the memories": (MemoryStore, "commit"),
    "half of a memory": (os, "pwrite"),
    "write the store's state": (MemoryStore, "_write_state"),
    "forget the journals": (MemoryStore, "_sweep"),
    # Inside a silo: other steps, and other silos, are done.
    "add the noise of a step": (ExampleLevel, "release"),
}

KINDS = {"users": {}, "memories": {"privacy__error_feedback": "user"}, "silos": SILOS}


def kill_before(step: str, folder: Path) -> None:
    owner, name = STEPS[step]
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if _finished(folder) == 1:
            if step == "half of the ledger's line":
                with (folder / "ledger.jsonl").open("ab") as file:
                    file.write(b'{"kind": "release", "round": 2, "att')
            if step == "half of a journal":
                original(*args, **kwargs)
                args[0]._file.write(b"half a record")
                args[0]._file.flush()
            if step == "half of a memory":
                file, numbers, offset = args
                original(file, numbers[: len(numbers) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _finished(folder: Path) -> int:
    return len(list((folder / "checkpoints").glob("*.safetensors")))


def killed(kind: str, folder: Path, step: str) -> bool:
    """Fork, so that imports, which take most of the time, are done once; say how the run ended."""
    child = os.fork()
    if child == 0:
        try:
            kill_before(step, folder)
            train_small(folder, **KINDS[kind])
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    runs = sys.argv[1:]
    survived = [
        step
        for kind, folder, step in zip(runs[::3], runs[1::3], runs[2::3], strict=True)
        if not killed(kind, Path(folder), step)
    ]
    sys.exit(f"not killed: {survived}" if survived else 0)
