"""One picture of a run, for a slide or a terminal that shows images."""

from __future__ import annotations

import io
import math
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedpriv.reporting.reader import Run, read_run
from fedpriv.reporting.run_directory import write_whole
from fedpriv.reporting.spent import rdp_by_round, spent
from fedpriv.reporting.wording import beside_epsilon

# Okabe and Ito's blue and vermillion, which colour-blind readers can tell apart.
_BLUE, _VERMILLION = "#0072B2", "#D55E00"


def write_picture(directory: Path) -> Path:
    """Draw quality and ε by round into `plot.png` of a run directory and return its path.

    Raises:
        InputError: there is no run, or it has no finished round, or it cannot be written.
    """
    run = read_run(directory)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        quality, privacy = figure.subplots(1, 2)
        _draw_quality(quality, run)
        _draw_epsilon(privacy, run)
        for axes in (quality, privacy):
            axes.set_xlabel("round")
            axes.set_xlim(0, run.config.rounds * 1.02)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.grid(axis="y", alpha=0.3)
        known = beside_epsilon(run.seeded) if run.private else ""
        figure.suptitle(run.config.name + known, x=0.01, ha="left", fontweight="bold")
        path, drawn = directory / "plot.png", io.BytesIO()
        figure.savefig(drawn, dpi=150)
    write_whole(path, drawn.getvalue(), "plot")
    return path


def _draw_quality(axes: Axes, run: Run) -> None:
    axes.plot(run.measured.rounds, run.measured.values, marker="o", markersize=4, color=_BLUE)
    axes.set_ylabel(f"held-out {run.measured.quality.name}")
    if run.measured.quality.percent:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_epsilon(axes: Axes, run: Run) -> None:
    epsilons, account = rdp_by_round(run), spent(run)
    why = ""
    if run.delta is None or not all(math.isfinite(epsilon) for epsilon in epsilons):
        why = "no privacy"
    elif not run.complete:
        why = "ε is unknown: lines are missing"
    elif run.unclaimed:
        why = "ε is unknown: it is one of several trials"
    elif account.disagreements:
        why = "the run's figures contradict its ledger"
    if why:
        axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color="#B00020")
        axes.set_yticks([])
        return
    if run.choice:
        axes.axhline(min(account.epsilons.values()), color=_VERMILLION, label="tuning, by RDP")
    else:
        _draw_rounds(axes, run, epsilons)
    if run.ahead and not run.choice:
        promised = min(account.epsilons.values())
        axes.axhline(promised, color=_VERMILLION, label="promised: of all planned rounds")
    axes.set_ylabel(f"ε spent, at δ = {run.delta:g}")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", frameon=False)


def _draw_rounds(axes: Axes, run: Run, epsilons: list[float]) -> None:
    """Draw what all rounds up to each have cost, and the budget."""
    axes.plot([row["round"] for row in run.rows], epsilons, color=_BLUE, label="ε by RDP")
    tight = [(r["round"], r["epsilon"]["pld"]) for r in run.rows if r["epsilon"].get("pld")]
    if tight:
        axes.plot(*zip(*tight, strict=True), "s", markersize=4, color=_VERMILLION, label="by PLD")
    budget = run.config.privacy.budget.epsilon if run.config.privacy else None
    if budget is not None:
        axes.axhline(budget, linestyle="--", color="0.4", label="budget")
