"""Train the small config and end this process with SIGKILL just before a given step of round 2.

Usage: killed_run.py FOLDER STEP [ERROR_FEEDBACK]
"""

import os
import signal
import sys
from pathlib import Path

from in_process import train_small

from fedpriv import experiment
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.optimizers.server import Server
from fedpriv.privacy import Ledger
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.training.memory_store import Memories, MemoryStore, RoundMemories

STEPS = {
    "draw the cohort": (PrivateFedAvg, "configure_train"),
    "ask the nodes": (PrivateFedAvg, "_exchange"),
    "add up": (PrivateFedAvg, "_sums"),
    "draw the noise": (PrivateFedAvg, "_noisy"),
    "charge the ledger": (Ledger, "append"),
    "half of the ledger's line": (Ledger, "_write"),
    "step the model": (Server, "step"),
    "record the round": (PrivateFedAvg, "_recorded"),
    "write the metrics": (RunDirectory, "append_metrics"),
    "collect the state": (Server, "state"),
    "write the checkpoint": (experiment, "save_checkpoint"),
    "rename the checkpoint": (Path, "replace"),
    # Where users keep memories; what follows a checkpoint happens to round 1.
    "open a journal": (Memories, "round"),
    "half of a journal": (RoundMemories, "write"),
    "seal a journal": (Path, "rename"),
    "commit the memories": (MemoryStore, "commit"),
    "half of a memory": (os, "pwrite"),
    "write the store's state": (MemoryStore, "_write_state"),
    "forget the journals": (MemoryStore, "_sweep"),
}


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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    kill_before(sys.argv[2], folder)
    train_small(folder, privacy__error_feedback=sys.argv[3] if len(sys.argv) > 3 else "none")
