"""Do silos that arrive in groups learn more in the same time than silos that wait for the slowest?

Claim examined: FedCompass reaches an accuracy sooner than synchronous FedAvg where silos differ in
speed (Li et al. 2024). Twelve silos of `configs/vit_digits_silos.yaml`, whose steps take 1 to 8
seconds of virtual time, for 640 seconds: ten rounds of FedAvg, which waits for the slowest, or
whoever has come by FedCompass. Without noise, and where the silo that takes most steps has ε = 8:
under FedCompass fast silos take up to eight times as many, and their noise pays for it.

What came out is in docs/results.md, "Silos of different speed".

    python simulations/silos_of_different_speed.py         # finished runs are kept
    python simulations/silos_of_different_speed.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/silos_of_different_speed; each point of
the figure is the best of four local learning rates, in the mean over seeds.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv
from fedpriv.algorithms.fedcompass import Compass

SECONDS = [1.0] * 4 + [2.0] * 4 + [4.0] * 3 + [8.0]
STEPS, FEWEST, UNTIL = 8, 2, 640
COMPASS = Compass(tuple(SECONDS), FEWEST, STEPS, 1.2)
COME = sum(1 for each in COMPASS.arrivals(2000) if each.seconds <= UNTIL)
ROUNDS = UNTIL // int(STEPS * max(SECONDS))
HOW: dict[str, dict[str, Any]] = {
    "fedavg": {"rounds": ROUNDS, "evaluation.every": 1},
    "fedcompass": {
        "algorithm": {"name": "fedcompass", "seconds": SECONDS, "min_steps": FEWEST},
        "rounds": COME,
        "evaluation.every": COME // ROUNDS,
    },
}
RATES = [0.1, 0.3, 1.0, 3.0]
CELL = ["algorithm", "noise"]
COLUMNS = [*CELL, "rate", "seed", "seconds", "accuracy", "epsilon"]
STYLES = {"fedavg": study.BLACK, "fedcompass": study.BLUE}


def measure() -> pd.DataFrame:
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / "vit_digits_silos.yaml",
        {"privacy.sampling": {"kind": "all"}, "runtime.workers": 1},
        name="silos-of-different-speed",
    )
    values = {"how": HOW, "noise": study.NOISES, "local.lr": RATES}
    swept = fedpriv.sweep(experiment, values, [17, 18])
    return pd.concat([curve(one) for _, one in swept.iterrows()])[COLUMNS]


def curve(one: pd.Series) -> pd.DataFrame:
    """Return the accuracy of a run at each time that it was measured."""
    seen = one.run.metrics.dropna(subset=["held_out.accuracy"])
    waited = seen.index.to_series() * STEPS * max(SECONDS)
    found = pd.DataFrame({"seconds": seen.get("virtual_seconds", waited)})
    found["accuracy"] = seen["held_out.accuracy"]
    told = {"algorithm": one.how, "noise": one.noise, "rate": one["local.lr"], "seed": one.seed}
    return found.assign(**told, epsilon=one.epsilon)


def last(results: pd.DataFrame) -> pd.DataFrame:
    return results.loc[results.groupby([*CELL, "rate", "seed"]).seconds.idxmax()]


def figure(results: pd.DataFrame) -> Figure:
    plotted, panels = plt.subplots(1, 2, figsize=(7.5, 3.2), sharey=True, layout="constrained")
    chosen = study.best(last(results), CELL, "accuracy")
    for axes, noise in zip(panels, study.NOISES, strict=True):
        for of in chosen[chosen.noise == noise].itertuples():
            rows = results.query(
                "algorithm == @of.algorithm and noise == @noise and rate == @of.rate"
            )
            colour = STYLES[of.algorithm]
            for _, seed in rows.groupby("seed"):
                axes.plot(seed.seconds, seed.accuracy, ".-", color=colour, linewidth=0.8)
            axes.plot([], [], ".-", color=colour, label=f"{of.algorithm}, local.lr {of.rate:g}")
        axes.set(xlabel="virtual seconds")
        axes.set_title(f"noise: {noise}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    panels[0].set_ylabel("accuracy (each line a seed)")
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    return last(results).pivot(index=CELL, columns=["rate", "seed"], values="accuracy").round(3)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
