"""Where should a transformer's blocks normalise, if its update is clipped and gets noise?

Claim examined: Peri-LN trains more stably than pre-LN, and pre-LN than post-LN, in models without
privacy (Kim et al. 2025; Xiong et al. 2020). Here a ViT of four blocks: `configs/vit_digits.yaml`,
40 rounds, without noise and at ε = 8: pre, post, peri and mix with LayerNorm, and pre with RMSNorm.

What came out is in docs/results.md, "Where blocks normalise".

    python simulations/norm_placement.py         # finished runs are kept
    python simulations/norm_placement.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/norm_placement; table and figure have the
best server rate of each cell, over all seeds.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv

MODELS: dict[str, dict[str, Any]] = {
    "pre": {"model.norm_placement": "pre"},
    "post": {"model.norm_placement": "post"},
    "peri": {"model.norm_placement": "peri"},
    "mix": {"model.norm_placement": "mix"},
    "pre, rmsnorm": {"model.norm_placement": "pre", "model.norm": "rmsnorm"},
}
RATES = [0.005, 0.01, 0.02, 0.04]
CELL = ["placement", "noise"]
COLUMNS = [*CELL, "rate", "seed", "accuracy", "epsilon"]


def measure() -> pd.DataFrame:
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / "vit_digits.yaml",
        {"runtime.workers": 1, "evaluation.every": 40, "model.depth": 4},
        rounds=40,
        name="norm-placement",
    )
    values = {"placement": MODELS, "noise": study.NOISES, "server.lr": RATES}
    swept = fedpriv.sweep(experiment, values, [17, 18, 19])
    return swept.rename(columns={"server.lr": "rate"})[COLUMNS]


def best(results: pd.DataFrame) -> pd.DataFrame:
    return study.best(results, CELL, "accuracy")


def figure(results: pd.DataFrame) -> Figure:
    plotted, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    study.beside(axes, best(results), "placement", list(MODELS))
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    found = best(results).pivot(index="placement", columns="noise", values=["mean", "rate"])
    return found.loc[list(MODELS)].round(3)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
