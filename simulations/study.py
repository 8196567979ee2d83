"""What all studies do: measure, or read what was measured, draw it and print the table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fedpriv

CONFIGS = Path(__file__).parents[1] / "configs"
#: Colours that colour-blind readers tell apart.
COLOURS = BLACK, SKY, BLUE, GREEN, RED = "#222222", "#56B4E9", "#0072B2", "#009E73", "#D55E00"
GREY, ORANGE = "#999999", "#E69F00"
#: What a sweep changes for no noise, and for that of ε = 8.
NOISES: dict[str, dict[str, Any]] = {
    "none": {"privacy.target_epsilon": None, "privacy.noise_multiplier": 0.0},
    "ε = 8": {"privacy.target_epsilon": 8.0},
}


def results_of(study: str, name: str = "results.csv") -> Path:
    """Return the path of a file of results."""
    return Path(__file__).parent / "results" / study / name


def update_norm(run: fedpriv.Run) -> float:
    """Return the mean norm of all updates that users made."""
    seen = run.metrics
    users = seen["simulation_only.cohort"]
    return float((seen["simulation_only.norm"] * users).sum() / users.sum())


def best(
    results: pd.DataFrame, cell: list[str], measured: str, lowest: bool = False
) -> pd.DataFrame:
    """Return what the best server `rate` of each cell comes to, mean and spread over seeds."""
    means = results.groupby([*cell, "rate"])[measured].agg(["mean", "min", "max"]).reset_index()
    cells = means.groupby(cell)["mean"]
    return means.loc[cells.idxmin() if lowest else cells.idxmax()]


def beside(axes: Axes, best: pd.DataFrame, by: str, names: list[str]) -> None:
    """Draw the accuracy of each of `names` without noise and at ε = 8, with the range of seeds."""
    for noise, colour, aside in zip(NOISES, (BLACK, BLUE), (-0.1, 0.1), strict=True):
        rows = best[best.noise == noise].set_index(by).loc[names]
        low, high = rows["mean"] - rows["min"], rows["max"] - rows["mean"]
        places = [place + aside for place in range(len(rows))]
        axes.errorbar(
            places, rows["mean"], (low, high), fmt="o", color=colour, capsize=2, label=noise
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("accuracy (range of seeds)")
    axes.grid(alpha=0.3)
    axes.legend(title="noise", loc="center left", bbox_to_anchor=(1.0, 0.5))


def run(
    script: str,
    measure: Callable[..., pd.DataFrame],
    figure: Callable[[pd.DataFrame], Figure],
    table: Callable[[pd.DataFrame], pd.DataFrame],
) -> None:
    """Measure with the arguments of the command line, or with `show` read the results; draw them.

    Args:
        script: the study's `__file__`.
        measure: returns results.csv; it gets the arguments.
        figure: draws the results.
        table: what is printed of them.
    """
    path = results_of(Path(script).stem)
    if sys.argv[1:] != ["show"]:
        measured = measure(*sys.argv[1:])
        path.parent.mkdir(parents=True, exist_ok=True)
        measured.to_csv(path, index=False)
    results = pd.read_csv(path)
    figure(results).savefig(path.with_name("figure.png"), dpi=150)
    print(table(results).to_string())
