"""Can silos find their clip bound themselves, and what does that ask of the learning rate?

`configs/vit_digits_silos.yaml` (12 silos, examples protected by ε = 8 at most) with bounds from a
hundred times too small to a hundred times too large: fixed, or adaptive from there (the median of
the gradients' norms, followed from step to step), at the same ε and two local learning rates.

Found: at the smaller learning rate silos come from a bound a hundred times too small to what the
best fixed one gives, and from one a hundred times too large most of the way. Noise grows with the
bound: at the learning rate that suits the best fixed bound, adaptive bounds diverge.

    python simulations/adaptive_silos.py         # a quarter of an hour; finished runs are kept
    python simulations/adaptive_silos.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/adaptive_silos; `bound` is that of the
start, `last_bound` that of the last round.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv

BOUNDS, RATES, SEEDS = [0.01, 1.0, 100.0], [0.1, 0.5], [17, 18]
KINDS = {"fixed": "global", "adaptive": "adaptive"}
COLUMNS = ["clipping", "bound", "lr", "seed", "accuracy", "last_bound", "epsilon"]


def measure() -> pd.DataFrame:
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / "vit_digits_silos.yaml",
        {"privacy.accountants": ["rdp"], "privacy.delta": 1e-3},
        name="adaptive-silos",
    )
    values = {
        "clipping": {name: {"privacy.clipping": {"kind": kind}} for name, kind in KINDS.items()},
        "privacy.clipping.bound": BOUNDS,
        "local.lr": RATES,
    }
    names = {"bound": "last_bound", "privacy.clipping.bound": "bound", "local.lr": "lr"}
    return fedpriv.sweep(experiment, values, SEEDS).rename(columns=names)[COLUMNS]


def figure(results: pd.DataFrame) -> Figure:
    plotted, panels = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True, layout="constrained")
    for axes, rate in zip(panels, RATES, strict=True):
        for clipping, colour in zip(KINDS, (study.BLACK, study.BLUE), strict=True):
            rows = results.query("clipping == @clipping and lr == @rate")
            axes.plot(rows.bound, rows.accuracy, "o", color=colour)
            axes.plot(rows.groupby("bound").accuracy.mean(), color=colour, label=clipping)
        axes.set(xscale="log", xlabel="clip bound at the start")
        axes.set_title(f"local learning rate {rate:g}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (each point a seed)")
    panels[1].legend()
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    return results.pivot(index=["lr", "clipping"], columns=["bound", "seed"], values="accuracy")


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
