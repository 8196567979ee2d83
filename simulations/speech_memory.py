"""What a speech worker's memory is made of, and what grows with the number of users.

One process does what a worker does: it builds the data set and the model of
`configs/asr_digits.yaml`, trains a stack of users, then prepares and keeps 1,000 users. Resident
memory is read after each part; recordings are memory-mapped, so their pages count as resident
while the system has no better use for them, and are given apart.

    python simulations/speech_memory.py [USERS]
    python simulations/speech_memory.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/speech_memory; all numbers are MiB.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
import torch
from matplotlib.figure import Figure

import fedpriv
from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.training.cohort import train_cohort
from fedpriv.training.user_cache import UserCache

STEPS = 4
COLUMNS = {"own": "RssAnon", "files": "RssFile", "peak": "VmHWM"}


def memory(after: str, cache: UserCache) -> dict[str, Any]:
    """Return resident memory that is the process's own, that maps files, and the peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {name: int(status[key].split()[0]) for name, key in COLUMNS.items()}
    parts = {name: size / 1024 for name, size in kib.items()}
    return {"after": after, **parts, "cache": cache.bytes / 2**20}


def measure(users: str = "1000") -> pd.DataFrame:
    torch.set_num_threads(1)
    cache, number = UserCache(2**40), int(users)
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / "asr_digits.yaml", seed_model=None, privacy=None, cohort=256
    )
    rows = [memory("imports", cache)]
    trainer = replace(build_trainer(experiment.config), cache=cache)
    rows.append(memory("data set and model", cache))
    parameters = Layout.of(trainer.model).join(parameters_of(trainer.model))
    train_cohort(trainer, parameters, list(range(4 * trainer.stack)), 1)
    rows.append(memory(f"training {4 * trainer.stack} users, {trainer.stack} at once", cache))
    for step in range(1, STEPS + 1):
        for user in range(number * (step - 1) // STEPS, number * step // STEPS):
            trainer.prepared(user)
        rows.append(memory(f"preparing {number * step // STEPS:,} users", cache))
    train_cohort(trainer, parameters, list(range(64)), 2)
    rows.append(memory("training 64 of them", cache))
    return pd.DataFrame(rows)


def figure(results: pd.DataFrame) -> Figure:
    plotted, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    others = results.own - results.cache
    axes.barh(results.after, results.cache, color=study.BLUE, label="prepared users")
    axes.barh(results.after, others, left=results.cache, color=study.SKY, label="other memory")
    label = "mapped recordings and libraries"
    axes.barh(results.after, results.files, left=results.own, color="#DDDDDD", label=label)
    axes.plot(results.peak, results.after, "|", color=study.BLACK, markersize=12, label="peak")
    axes.set(xlabel="resident memory of one process after it, MiB")
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    return results.set_index("after").round(0).astype(int)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
