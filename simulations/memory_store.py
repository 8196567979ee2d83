"""Memories of 10,000 users of a 0.2M-parameter model under a RAM budget of 1 GiB.

Two worker processes do with the store what they do in a run, without the training between: each
round they read the memories of their users of a cohort and write new ones, and the server makes the
round part of the store. Once, between, everything is killed with SIGKILL in the middle of a round
and goes on from the round that was finished last. At the end every user's memory is compared with
what it must be.

    python simulations/memory_store.py [FOLDER] [float32|bfloat16]

FOLDER, which is made and removed again, needs 8 GiB (float32) or 4 GiB.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fedpriv.training.memory_store import (
    Journal,
    Memories,
    MemoryFormat,
    MemorySizes,
    MemoryStore,
)

USERS, PARAMETERS, COHORT, WORKERS, STACK = 10_000, 200_000, 1_000, 2, 16
RAM = 2**30
ROUNDS = 12
KILLED_IN = 11


def cohort_of(round_: int) -> np.ndarray:
    """Ten rounds visit every user once; then cohorts are random."""
    if round_ <= USERS // COHORT:
        return np.arange(COHORT) + (round_ - 1) * COHORT
    return np.sort(np.random.default_rng(round_).choice(USERS, COHORT, replace=False))


def vectors(users: np.ndarray, round_: int) -> torch.Tensor:
    """What users keep after a round: numbers that name user and round, exact in bfloat16."""
    base = torch.zeros(len(users), PARAMETERS)
    base[:, 0::4] = torch.from_numpy(users // 100).float()[:, None]
    base[:, 1::4] = torch.from_numpy(users % 100).float()[:, None]
    base[:, 2::4] = float(round_)
    return base


def work(folder: Path, pipe: Connection) -> None:
    """Be a worker: for each journal, read and write its users' memories."""
    torch.set_num_threads(1)
    memories = Memories(folder, RAM // WORKERS)
    while (journal := pipe.recv()) is not None:
        users = cohort_of(journal.round)
        users = users[users % WORKERS == journal.partition]
        with memories.round(journal) as access:
            for stack in np.array_split(users, range(STACK, len(users), STACK)):
                access.read(stack.tolist())
                access.write(stack.tolist(), vectors(stack, journal.round))
                if journal.partition == 0 and (folder.parent / "kill").exists():
                    os.killpg(0, signal.SIGKILL)
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def serve(folder: Path, dtype: str, kill: bool) -> None:
    """Be the server: run the rounds that are left; a file says which are finished."""
    os.setpgid(0, 0)
    store = MemoryStore(folder / "memory", MemoryFormat(USERS, PARAMETERS, dtype, "study"))
    finished = folder / "finished.json"
    round_, journals = json.loads(finished.read_text()) if finished.exists() else (0, [])
    store.restore(round_, [Journal(*each) for each in journals])
    pipes = []
    for _ in range(WORKERS):
        ours, theirs = multiprocessing.Pipe()
        multiprocessing.Process(target=work, args=(store.folder, theirs), daemon=True).start()
        pipes.append(ours)
    for round_ in range(store.round + 1, ROUNDS + 1):
        if kill and round_ == KILLED_IN:
            (folder / "kill").touch()
        began = time.perf_counter()
        asked = [Journal(round_, 0, p, store.session) for p in range(WORKERS)]
        for pipe, journal in zip(pipes, asked, strict=True):
            pipe.send(journal)
        peaks = [pipe.recv() for pipe in pipes]
        written = time.perf_counter()
        (folder / "next.json").write_text(json.dumps([round_, asked]))
        (folder / "next.json").replace(finished)
        store.commit(round_, asked)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(
            f"round {round_}: read and written in {written - began:.1f} s, made part of the store "
            f"in {time.perf_counter() - written:.1f} s; peak RSS {peaks[0]:.0f} and "
            f"{peaks[1]:.0f} MiB (workers), {own:.0f} MiB (server)",
            flush=True,
        )


def check(folder: Path, dtype: str) -> int:
    """Return how many users' memories are not those of the last round that they took part in."""
    store = MemoryStore(folder / "memory", MemoryFormat(USERS, PARAMETERS, dtype, "study"))
    last = np.zeros(USERS, int)
    for round_ in range(1, ROUNDS + 1):
        last[cohort_of(round_)] = round_
    wrong = 0
    with Memories(store.folder, 0).round(Journal(ROUNDS + 1, 0, 0, 0)) as access:
        for user in range(USERS):
            expected = vectors(np.array([user]), int(last[user]))
            wrong += not access.read([user]).equal(expected)
    return wrong


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/memory-store")
    dtype = sys.argv[2] if len(sys.argv) > 2 else "float32"
    folder.mkdir(parents=True)
    say = Console(highlight=False, soft_wrap=True).print
    try:
        sizes = MemorySizes.of(MemoryFormat(USERS, PARAMETERS, dtype, "study"), COHORT, ROUNDS, RAM)
        say(sizes.sentence())
        say(sizes.check_space(folder) or "the disk is large enough")
        for kill in (True, False):
            server = multiprocessing.Process(target=serve, args=(folder, dtype, kill))
            server.start()
            server.join()
            if kill:
                assert server.exitcode == -signal.SIGKILL
                say(f"killed in round {KILLED_IN}, with journals half written; going on")
                (folder / "kill").unlink()
        used = sum(path.stat().st_blocks * 512 for path in (folder / "memory").glob("*"))
        say(f"on disk: {used / 2**30:.2f} GiB")
        say(
            f"memories that are torn, lost or of another round: {check(folder, dtype)} of {USERS:,}"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
