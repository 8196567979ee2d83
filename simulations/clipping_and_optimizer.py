"""Which clipping and which server optimizer serve a small private ViT best?

Claim examined: with user-level privacy, per-layer clipping with LAMB does at least as well as
global clipping with Adam. Found: not at this size (23 blocks, 2,762 parameters), where the two
clippings do not differ beyond their seeds and LAMB is below Adam. Every
cell is a whole run of configs/vit_digits.yaml with two seeds; learning rates were chosen on the
development split (`data.evaluation: development`, seed 1) from 0.01, 0.02 and 0.04, with privacy.

    python simulations/clipping_and_optimizer.py         # finished runs are kept
    python simulations/clipping_and_optimizer.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/clipping_and_optimizer.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv

CLIPPING = {
    "no privacy": {"privacy": None, "cohort": 370},
    "global": {"privacy.clipping.kind": "global"},
    "per layer, dim": {"privacy.clipping.kind": "per_layer", "privacy.clipping.split": "dim"},
}
COLUMNS = ["clipping", "optimizer", "seed", "accuracy", "epsilon", "delta"]
STYLES = {"adam": (-0.12, "o", study.BLUE), "lamb": (0.12, "s", study.RED)}


def measure() -> pd.DataFrame:
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / "vit_digits.yaml", {"server.lr": 0.02}, name="clipping-and-optimizer"
    )
    values = {"clipping": CLIPPING, "server.optimizer": list(STYLES)}
    table = fedpriv.sweep(experiment, values, seeds=[17, 18])
    return table.rename(columns={"server.optimizer": "optimizer"})[COLUMNS]


def figure(results: pd.DataFrame) -> Figure:
    plotted, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for optimizer, (offset, marker, colour) in STYLES.items():
        rows = results[results.optimizer == optimizer]
        places = rows.clipping.map(list(CLIPPING).index) + offset
        axes.plot(places, rows.accuracy, marker, color=colour, label=optimizer)
    axes.set_xticks(range(len(CLIPPING)), list(CLIPPING))
    axes.set_ylabel("held-out accuracy")
    private = results[results.clipping != "no privacy"].iloc[0]
    axes.set_title(
        f"Digits, 750 users of 2 images: private runs at ε = {private.epsilon:.3f} by PLD, "
        f"δ = {private.delta:g}; each point a seed",
        fontsize=9,
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    index = ["clipping", "optimizer"]
    return results.pivot(index=index, columns="seed", values="accuracy").round(3)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
