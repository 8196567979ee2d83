"""Memories of 10,000 users of a 0.2M-parameter model under a RAM budget of 1 GiB.

Two worker processes do with the store what they do in a run, without the training between: each
round they read the memories of their users of a cohort and write new ones, and the server makes the
round part of the store. Once, between, everything is killed with SIGKILL in the middle of a round
and goes on from the round that was finished last. At the end every user's memory is compared with
what it must be.

Found: workers stay below 0.9 GiB each and the server below 0.4, 7.45 GiB lie on the disk, and no
memory of the 10,000 is torn, lost or of another round.

    python simulations/memory_store.py [FOLDER] [float32|bfloat16]
    python simulations/memory_store.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/memory_store. FOLDER, which is made and
removed again, needs 8 GiB (float32) or 4 GiB.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import study
import torch
from matplotlib.figure import Figure

from fedpriv.training.memory_store import (
    Journal,
    Memories,
    MemoryFormat,
    MemorySizes,
    MemoryStore,
)

USERS, PARAMETERS, COHORT, WORKERS, STACK = 10_000, 200_000, 1_000, 2, 16
RAM = 2**30
ROUNDS, KILLED_IN = 12, 11


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


@cache
def memories(folder: Path) -> Memories:
    """Return what this worker process reads and writes, with its share of the RAM."""
    torch.set_num_threads(1)
    return Memories(folder, RAM // WORKERS)


def peak() -> float:
    """Return the most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def work(folder: Path, journal: Journal) -> float:
    """Read and write the memories of a partition's users in a worker; return its peak memory."""
    users = cohort_of(journal.round)
    users = users[users % WORKERS == journal.partition]
    with memories(folder).round(journal) as access:
        for stack in np.array_split(users, range(STACK, len(users), STACK)):
            access.read(stack.tolist())
            access.write(stack.tolist(), vectors(stack, journal.round))
            if journal.partition == 0 and (folder.parent / "kill").exists():
                os.killpg(0, signal.SIGKILL)
    return peak()


def serve(folder: Path, dtype: str, kill: bool) -> None:
    """Be the server: run the rounds that are left; a file says which are finished."""
    os.setpgid(0, 0)
    store = MemoryStore(folder / "memory", MemoryFormat(USERS, PARAMETERS, dtype, "study"))
    finished = folder / "finished.json"
    round_, journals = json.loads(finished.read_text()) if finished.exists() else (0, [])
    store.restore(round_, [Journal(*each) for each in journals])
    # One process each: a worker keeps what it has read of its own partition.
    workers = [ProcessPoolExecutor(1) for _ in range(WORKERS)]
    for round_ in range(store.round + 1, ROUNDS + 1):
        if kill and round_ == KILLED_IN:
            (folder / "kill").touch()
        began = time.perf_counter()
        journals = [Journal(round_, 0, p, store.session) for p in range(WORKERS)]
        asked = [
            worker.submit(work, store.folder, journal)
            for worker, journal in zip(workers, journals, strict=True)
        ]
        peaks = [each.result() for each in asked]
        written = time.perf_counter()
        (folder / "next.json").write_text(json.dumps([round_, journals]))
        (folder / "next.json").replace(finished)
        store.commit(round_, journals)
        row = {
            "round": round_,
            "exchange_seconds": written - began,
            "worker_mib": max(peaks),
            "commit_seconds": time.perf_counter() - written,
            "server_mib": peak(),
        }
        with (folder / "rows.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
    for worker in workers:
        worker.shutdown()


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


def measure(name: str = "runs/memory-store", dtype: str = "float32") -> pd.DataFrame:
    folder = Path(name)
    folder.mkdir(parents=True)
    try:
        sizes = MemorySizes.of(MemoryFormat(USERS, PARAMETERS, dtype, "study"), COHORT, ROUNDS, RAM)
        print(sizes.sentence())
        print(sizes.check_space(folder) or "the disk is large enough")
        for kill in (True, False):
            server = multiprocessing.Process(target=serve, args=(folder, dtype, kill))
            server.start()
            server.join()
            if kill:
                assert server.exitcode == -signal.SIGKILL
                (folder / "kill").unlink()
        used = sum(path.stat().st_blocks * 512 for path in (folder / "memory").glob("*"))
        wrong = check(folder, dtype)
        print(f"on disk: {used / 2**30:.2f} GiB")
        print(f"memories that are torn, lost or of another round: {wrong} of {USERS:,}")
        return pd.read_json(folder / "rows.jsonl", lines=True)
    finally:
        shutil.rmtree(folder)


def figure(results: pd.DataFrame) -> Figure:
    plotted, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    exchange, commit = results.exchange_seconds, results.commit_seconds
    left.bar(results["round"], exchange, color=study.BLUE, label="read and written")
    label = "made part of the store"
    left.bar(results["round"], commit, bottom=exchange, color=study.SKY, label=label)
    left.set_ylabel("seconds")
    right.plot(results["round"], results.worker_mib, "o", color=study.BLUE, label="a worker")
    right.plot(results["round"], results.server_mib, "s", color=study.SKY, label="the server")
    right.set(ylabel="peak resident memory, MiB", ylim=(0, 1100))
    for axes in (left, right):
        axes.axvline(KILLED_IN - 0.5, color=study.RED, linestyle=":", label="all killed")
        axes.set(xlabel=f"round of {COHORT:,} users", xticks=results["round"])
        axes.legend(frameon=False, fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    return results.set_index("round").round(1)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
