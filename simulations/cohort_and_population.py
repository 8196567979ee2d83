"""What do a larger cohort and a larger population buy at one ε?

Claim examined: at a given ε utility grows with the population, since noise for a given sampling
rate is spread over more users (McMahan et al. 2018). Users have made-up images
(`synthetic_images`), four a user, so that there are as many as one likes, all alike; a ViT, 40
rounds, ε = 2 and δ = 1e-6 in every run, so that z follows from cohort and population.

What came out is in docs/results.md, "Cohort and population".

    python simulations/cohort_and_population.py         # finished runs are kept
    python simulations/cohort_and_population.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/cohort_and_population; table and figure
have the best server rate of each cell, over all seeds; `noise` is z over the cohort: that on an
average in which each user is bounded by 1.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv

COHORTS, POPULATIONS = [50, 100, 200], [500, 2_000, 8_000, 32_000]
COLOURS = dict(zip(COHORTS, (study.BLACK, study.BLUE, study.GREEN), strict=True))
CELL = ["cohort", "population"]
COLUMNS = [*CELL, "rate", "seed", "accuracy", "noise", "epsilon"]


def measure() -> pd.DataFrame:
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / "vit_digits.yaml",
        {
            "runtime.workers": 1,
            "evaluation.every": 40,
            "privacy.target_epsilon": 2.0,
            "privacy.delta": 1e-6,
            "privacy.clipping.bound": 0.1,
        },
        rounds=40,
        name="cohort-and-population",
        data={"name": "synthetic_images", "examples_per_user": 4, "synthetic": {"side": 8}},
    )
    values = {
        "privacy.sampling.expected_cohort": COHORTS,
        "data.users": POPULATIONS,
        "server.lr": [0.005, 0.01, 0.02, 0.04, 0.08],
    }
    names = {"expected_cohort": "cohort", "users": "population", "server.lr": "rate"}
    names |= {f"{section}.{name}": names[name] for section, name in (
        ("privacy.sampling", "expected_cohort"), ("data", "users"))}  # fmt: skip
    swept = fedpriv.sweep(experiment, values, [17, 18])
    swept["noise"] = [run.ledger.noise_multiplier.iloc[0] for run in swept.run]
    swept = swept.drop(columns="cohort", errors="ignore").rename(columns=names)
    return swept.assign(noise=swept.noise / swept.cohort)[COLUMNS]


def best(results: pd.DataFrame) -> pd.DataFrame:
    return study.best(results, CELL, "accuracy")


def figure(results: pd.DataFrame) -> Figure:
    plotted, axes = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
    for cohort, rows in best(results).groupby("cohort"):
        low, high = rows["mean"] - rows["min"], rows["max"] - rows["mean"]
        axes.errorbar(
            rows.population, rows["mean"], (low, high), fmt="o-", color=COLOURS[cohort],
            capsize=2, label=f"{cohort} users a round",
        )  # fmt: skip
    axes.set(xscale="log", xlabel="users", ylabel="accuracy (mean and range of seeds)")
    axes.grid(alpha=0.3)
    axes.legend()
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    noise = results.groupby(CELL).noise.first()
    found = best(results).set_index(CELL)[["mean", "min", "max", "rate"]].assign(noise=noise)
    return found.round(4)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
