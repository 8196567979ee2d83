"""What all studies do: measure, or read what was measured, draw it and print the table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import fedpriv

CONFIGS = Path(__file__).parents[1] / "configs"
#: Colours that colour-blind readers tell apart.
COLOURS = BLACK, SKY, BLUE, GREEN, RED = "#222222", "#56B4E9", "#0072B2", "#009E73", "#D55E00"
GREY, ORANGE = "#999999", "#E69F00"


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
