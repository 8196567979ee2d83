"""Which layer-wise normaliser of the averaged update survives the noise of privacy?

Claims examined: SCALE, SinkGD, SWAN, ROOT and LANTON each match or beat Adam with less memory, on
gradients without added noise (see their files in fedpriv/optimizers/normalizers). Here each is the
whole server step, `sgd` with rates of its own, on `configs/vit_digits.yaml`, 40 rounds, without
noise and at ε = 8; beside them Adam, plain `sgd`, and DP-AdamBC, which takes the noise's variance
out of its second moment.

What came out is in docs/results.md, "Normalisers under noise".

    python simulations/normalizers_under_noise.py         # finished runs are kept
    python simulations/normalizers_under_noise.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/normalizers_under_noise; table and figure
have the best server rate of each cell, over all seeds.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv

SGD = {"server.optimizer": "sgd"}
#: Each with the smallest of its five rates, of which each is three times the one before.
STEPS: dict[str, tuple[dict[str, Any], float]] = {
    "adam": ({"server.optimizer": "adam"}, 0.003),
    "sgd": (SGD, 3.0),
    "dp_adam_bc": ({**SGD, "server.normalize": "dp_adam_bc"}, 0.003),
    "layer_norm_l2": ({**SGD, "server.normalize": "layer_norm_l2"}, 0.01),
    "scale": ({**SGD, "server.normalize": "scale"}, 0.003),
    "sinkgd": ({**SGD, "server.normalize": "sinkgd"}, 0.001),
    "swan": ({**SGD, "server.normalize": "swan"}, 0.003),
    "root": ({**SGD, "server.normalize": "root"}, 0.003),
    "lanton": ({**SGD, "server.normalize": "lanton"}, 0.001),
}
CELL = ["step", "noise"]
COLUMNS = [*CELL, "rate", "seed", "accuracy", "epsilon"]


def measure() -> pd.DataFrame:
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / "vit_digits.yaml",
        {"runtime.workers": 1, "evaluation.every": 40},
        rounds=40,
        name="normalizers-under-noise",
    )
    rates = {
        f"{step} {smallest * 3**n:.2g}": (step, changes | {"server.lr": smallest * 3**n})
        for step, (changes, smallest) in STEPS.items()
        for n in range(5)
    }
    values = {
        "at": {label: changes for label, (_, changes) in rates.items()},
        "noise": study.NOISES,
    }
    swept = fedpriv.sweep(experiment, values, [17, 18])
    swept[["step", "rate"]] = [label.split() for label in swept["at"]]
    return swept[COLUMNS]


def best(results: pd.DataFrame) -> pd.DataFrame:
    return study.best(results, CELL, "accuracy")


def figure(results: pd.DataFrame) -> Figure:
    plotted, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    study.beside(axes, best(results), "step", list(STEPS))
    axes.tick_params(axis="x", labelrotation=30)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    found = best(results).pivot(index="step", columns="noise", values=["mean", "rate"])
    return found.loc[list(STEPS)].round(3)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
