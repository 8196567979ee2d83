"""What a speech worker's memory is made of, and what grows with the number of users.

One process does what a worker does: it builds the data set and the model of
`configs/asr_digits.yaml`, trains a stack of users, then prepares and keeps 1,000 users. Resident
memory is read after each part; recordings are memory-mapped, so their pages count as resident
while the system has no better use for them, and are given apart.

    python simulations/speech_memory.py [USERS]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from one_process import resolved
from rich.console import Console
from rich.table import Table

from fedpriv.federation.parts import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.training.cohort import train_cohort
from fedpriv.training.user_cache import UserCache

STEPS = 4


def memory() -> tuple[float, float, float]:
    """Return resident memory that is the process's own, that maps files, and the peak, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files, peak = (
        int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile", "VmHWM")
    )
    return own, files, peak


def main() -> None:
    users = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    torch.set_num_threads(1)
    shown = Table("after", "own, MiB", "mapped files, MiB", "peak, MiB", "kept by the cache, MiB")
    cache = UserCache(2**40)

    def note(what: str) -> None:
        own, files, peak = memory()
        kept = f"{cache.bytes / 2**20:.0f}"
        shown.add_row(what, f"{own:.0f}", f"{files:.0f}", f"{peak:.0f}", kept)

    config = resolved("asr_digits.yaml", ["seed_model=null", "privacy=null", "cohort=256"])
    note("imports")
    trainer = replace(build_trainer(config), cache=cache)
    note("data set and model")
    parameters = Layout.of(trainer.model).join(parameters_of(trainer.model))
    train_cohort(trainer, parameters, list(range(4 * trainer.stack)), 1)
    note(f"training {4 * trainer.stack} users, {trainer.stack} at once")
    for step in range(1, STEPS + 1):
        for user in range(users * (step - 1) // STEPS, users * step // STEPS):
            trainer.prepared(user)
        note(f"preparing {users * step // STEPS:,} users")
    train_cohort(trainer, parameters, list(range(64)), 2)
    note("training 64 of them")
    Console().print(shown)


if __name__ == "__main__":
    main()
