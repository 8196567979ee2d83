"""The figures that overlay runs, round by round: each a function from runs to a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedpriv.algorithms.fedavg import FedAvg
from fedpriv.algorithms.registry import make_algorithm
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.sampling import Sampling
from fedpriv.reporting.reader import Run
from fedpriv.reporting.spent import rdp_by_round, spent
from fedpriv.reporting.svg import FAINT, INK, Marked, Plot, canvas, dash
from fedpriv.reporting.wording import KNOWN_SEED
from fedpriv.tasks.quality import Quality

# Distance between two labels at the right edge, as a share of the axes' height.
_LABEL_DISTANCE = 0.075
_LOG_FROM = 20.0


@dataclass(frozen=True)
class _Line:
    """A line with its label; `x` and `y` are as long as each other and hold finite numbers."""

    x: Sequence[float]
    y: Sequence[float]
    label: str
    colour: str
    dash: int = 0
    marker: str = ""


def figures(runs: Sequence[Marked]) -> list[Plot]:
    """Return the figures that overlay all of `runs`; those with nothing to show are left out."""
    # A deployment writes nothing of its users, so it has neither cohort sizes nor throughput.
    simulated = [each for each in runs if "simulation_only" in each.run.rows[-1]]
    made = (
        quality_by_epsilon(runs),
        quality_by_round(runs),
        epsilon_by_round(runs),
        update_and_noise(runs),
        cohort_sizes(simulated) if simulated else None,
        throughput(simulated) if simulated else None,
    )
    return [plot for plot in made if plot is not None]


def epsilon_by_round(runs: Sequence[Marked]) -> Plot | None:
    """Draw ε after each round under each accountant, with the budget."""
    lines = [line for marked in runs for line in _epsilon_lines(marked)]
    if not lines:
        return None
    with canvas() as drawn:
        drawn.axes.set_ylabel("ε spent (no unit)")
        _budgets(drawn.axes, runs)
        _draw(drawn.axes, lines)
        return drawn.plot(
            "epsilon",
            "ε by round",
            "What all rounds so far have cost. RDP is computed anew from the ledger; PLD, the "
            f"tighter one, was computed at evaluations.{_known_seeds(runs)}{_promised(runs)}",
        )


def _known_seeds(runs: Sequence[Marked]) -> str:
    """Return the end of a caption of ε where runs are simulations."""
    seeded = [marked for marked in runs if marked.run.private and marked.run.seeded]
    if not seeded:
        return ""
    if len(seeded) == len(runs):
        return f" Each ε is of a {KNOWN_SEED}."
    return f" ε of {', '.join(marked.mark for marked in seeded)}: {KNOWN_SEED}."


def _promised(runs: Sequence[Marked]) -> str:
    """Return the end of a caption of ε by round where a run ended early: none was promised."""
    promised = [
        f" {marked.mark} ended early, and promised ε = "
        f"{epsilon_text(min(spent(marked.run).epsilons.values()))}, that of all rounds that it "
        "might have had."
        for marked in runs
        if marked.run.private and marked.run.ahead and not marked.run.trial
    ]
    chosen = [
        f" {marked.mark or 'It'} is the best of several trials, at the ε of the tuning that chose "
        "it: no round has another."
        for marked in runs
        if marked.run.choice
    ]
    return "".join([*promised, *chosen])


def _epsilon_lines(marked: Marked) -> list[_Line]:
    if not marked.run.private or marked.run.unclaimed or marked.run.trial:
        return []
    rows = marked.run.rows
    lines = [_line(_rounds(marked.run), rdp_by_round(marked.run), marked, "rdp", 0)]
    tight = [row["epsilon"].get("pld") for row in rows]
    if any(value is not None for value in tight):
        lines.append(_line(_rounds(marked.run), tight, marked, "pld", 1, "o"))
    return lines


def _budgets(axes: Axes, runs: Sequence[Marked]) -> None:
    budgets = {
        marked.run.config.privacy.budget.epsilon
        for marked in runs
        if marked.run.private and marked.run.config.privacy and not marked.run.trial
    }
    for budget in sorted(budget for budget in budgets if budget is not None):
        axes.axhline(budget, color=FAINT, linewidth=1, linestyle=dash(1))
        axes.annotate(
            f"budget {budget:g}",
            (0, budget),
            xycoords=("axes fraction", "data"),
            xytext=(3, 3),
            textcoords="offset points",
            color=INK,
        )


def quality_by_round(runs: Sequence[Marked]) -> Plot | None:
    """Draw the held-out measure by round."""
    runs = _measured_alike(runs)
    lines = [
        _line(marked.run.measured.rounds, marked.run.measured.values, marked, "", 0, "o")
        for marked in runs
        if marked.run.measured.values
    ]
    if not lines:
        return None
    quality = runs[0].run.measured.quality
    name = quality.name
    with canvas() as drawn:
        _quality_axis(drawn.axes, quality)
        _draw(drawn.axes, lines)
        return drawn.plot(
            "quality-by-round",
            f"Held-out {name} by round",
            "Measured on the held-out examples.",
        )


def quality_by_epsilon(runs: Sequence[Marked]) -> Plot | None:
    """Draw the held-out measure against what it cost; runs without privacy have no ε."""
    runs = _measured_alike(runs)
    lines = [line for marked in runs for line in _quality_lines(marked)]
    if not lines:
        return None
    quality = runs[0].run.measured.quality
    name = quality.name
    with canvas() as drawn:
        _quality_axis(drawn.axes, quality)
        for marked in runs:
            if not marked.run.private and marked.run.measured.values:
                _unprotected(drawn.axes, marked)
        _draw(drawn.axes, lines)
        drawn.axes.set_xlabel("ε spent (no unit)")
        return drawn.plot(
            "quality-by-epsilon",
            f"Held-out {name} against ε",
            "What privacy buys."
            + " A dotted line is where a run without privacy ended."
            * any(not marked.run.private for marked in runs)
            + f"{_known_seeds(runs)}{_promised(runs)}",
        )


def _measured_alike(runs: Sequence[Marked]) -> list[Marked]:
    """Return the runs with the first one's measure: an accuracy and an error rate share no axis."""
    first = runs[0].run.measured.quality
    return [marked for marked in runs if marked.run.measured.quality == first]


def _quality_lines(marked: Marked) -> list[_Line]:
    run = marked.run
    if not run.private or run.unclaimed or not run.measured.values:
        return []
    if run.choice:
        price = min(spent(run).epsilons.values())
        return [_line([price], [run.measured.final], marked, "tuned", 0, "o")]
    rdp = dict(zip(_rounds(run), rdp_by_round(run), strict=True))
    pld = {row["round"]: row["epsilon"].get("pld") for row in run.rows}
    rounds, values = run.measured.rounds, run.measured.values
    lines = [_line([rdp[r] for r in rounds], values, marked, "rdp", 0, "o")]
    tight = [pld.get(r) for r in rounds]
    if any(value is not None for value in tight):
        lines.append(_line(tight, values, marked, "pld", 1, "s"))
    return lines


def _unprotected(axes: Axes, marked: Marked) -> None:
    final = marked.run.measured.final
    axes.axhline(final, color=marked.shade(), linestyle=dash(2))
    axes.annotate(
        marked.label("no privacy"),
        (0, final),
        xycoords=("axes fraction", "data"),
        xytext=(3, -11),
        textcoords="offset points",
    )


def update_and_noise(runs: Sequence[Marked]) -> Plot | None:
    """Draw the norm of the averaged update as released beside that of its noise alone."""
    lines = []
    for marked in runs:
        released = [row.get("aggregate_norm") for row in marked.run.rows]
        lines.append(_line(_rounds(marked.run), released, marked, "released", 0))
        noise = noise_norms(marked.run)
        if noise is not None:
            lines.append(_line(_rounds(marked.run), noise, marked, "noise alone", 1))
    if not any(line.x for line in lines):
        return None
    with canvas() as drawn:
        drawn.axes.set_ylabel("L2 norm (parameter units)")
        _draw(drawn.axes, lines, scale="log" if _wide(lines) else "zero")
        return drawn.plot(
            "noise",
            "Update and noise",
            "The averaged update as it was released, and the norm that its noise alone has in "
            "expectation, σ·√d/cohort for d parameters, √E times that of E edges. "
            "Where the lines meet, what the server steps along is nearly all noise.",
        )


def noise_norms(run: Run) -> list[float] | None:
    """Return the expected norm of the noise on the average in each round, σ·√d/cohort.

    Of sums that stand apart, each with its noise, it is that of all of them. None without noise,
    with noise that differs between blocks, or where d is unknown; where silos or users add it, or
    nodes more than σ; and where the algorithm makes something else of its sums than their sum.
    """
    spherical = all(release.noise_shape == "spherical" for release in run.releases)
    more = run.config.privacy is not None and run.config.privacy.lost_nodes > 0
    own = run.mechanism.payer is not None
    if not run.private or run.parameters is None or not spherical or own or more:
        return None
    options = run.config.algorithm
    # One from outside has one sum.
    algorithm = FedAvg() if options.unread else make_algorithm(options)
    if not algorithm.adds_slots:
        return None
    stddevs = {release.round: release.stddev for release in run.releases}
    scale = math.sqrt(run.parameters * algorithm.slots) / run.sampling.expected_cohort
    return [stddevs.get(row["round"], math.nan) * scale for row in run.rows]


def cohort_sizes(runs: Sequence[Marked]) -> Plot:
    """Draw how many users or silos took part, against the expectation."""
    last = max(marked.run.finished_rounds for marked in runs)
    with canvas() as drawn:
        lines = []
        expecting = [m.run for m in runs if not m.run.mechanism.scheduled]
        for sampling in dict.fromkeys(run.sampling for run in expecting):
            _expectation(drawn.axes, sampling, last)
            expected = [sampling.expected_cohort] * 2
            lines.append(_Line([1, last], expected, f"expected {expected[0]:g}", FAINT, dash=1))
        for marked in runs:
            sizes = _line(_rounds(marked.run), marked.run.seen("cohort"), marked, "", 0)
            drawn.axes.plot(sizes.x, sizes.y, ".", color=sizes.colour, markersize=4)
            lines.append(sizes)
        drawn.axes.set_ylabel("cohort (users or silos)")
        _set_round_axis(drawn.axes)
        _label_ends(drawn.axes, [line for line in lines if line.label and line.x])
        return drawn.plot(
            "cohort",
            "Cohort sizes",
            "Users, or silos, whose updates came back in each round. "
            + _EXPECTED * bool(expecting)
            + _SCHEDULED * (len(expecting) < len(runs))
            + "Not private: simulation only.",
        )


_EXPECTED = (
    "The line is the expected number, by which the sum is divided; the band is two standard "
    "deviations of Poisson sampling. Many points below it mean that some dropped out. "
)
_SCHEDULED = "Silos on a schedule come when it is their turn; the sum is divided by all of them. "


def _expectation(axes: Axes, sampling: Sampling, last_round: int) -> None:
    """Draw the expected cohort and the band in which 95% of Poisson cohorts lie."""
    expected = sampling.expected_cohort
    axes.plot([1, last_round], [expected, expected], color=FAINT, linestyle=dash(1))
    if sampling.kind == "poisson":
        spread = 2 * math.sqrt(expected * (1 - expected / sampling.population))
        band = (expected - spread, expected + spread)
        axes.fill_between([1, last_round], *band, color=FAINT, alpha=0.15, linewidth=0)


def throughput(runs: Sequence[Marked]) -> Plot | None:
    """Draw users, or silos, trained a second, by round."""
    lines = [
        _line(_rounds(marked.run), marked.run.seen("users_per_second"), marked, "", 0)
        for marked in runs
    ]
    with canvas() as drawn:
        drawn.axes.set_ylabel("users or silos trained (1/s)")
        _draw(drawn.axes, lines, scale="zero")
        return drawn.plot(
            "throughput",
            "Throughput",
            "Users, or silos, of a round divided by its wall time; the first round also starts "
            "the workers. Not private: simulation only.",
        )


# -------------------------------------------------------------------- drawing


def _rounds(run: Run) -> list[int]:
    return [row["round"] for row in run.rows]


def _line(
    x: Sequence[float | None],
    y: Sequence[float | None],
    marked: Marked,
    text: str,
    place: int,
    marker: str = "",
) -> _Line:
    """Return the run's line number `place`, without the points that are missing or not finite."""
    points = [
        (float(a), float(b))
        for a, b in zip(x, y, strict=True)
        if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)
    ]
    return _Line(
        x=[a for a, _ in points],
        y=[b for _, b in points],
        label=marked.label(text),
        colour=marked.shade(place),
        dash=place,
        marker=marker,
    )


def _draw(
    axes: Axes,
    lines: Sequence[_Line],
    scale: Literal["data", "zero", "log"] = "data",
) -> None:
    """Draw `lines`, each labelled at its end, in the margin where no data are.

    The vertical axis spans the data, or starts at zero, or is logarithmic, as `scale` says. It is
    fixed from here on.
    """
    shown = [line for line in lines if line.x]
    for line in shown:
        axes.plot(
            line.x,
            line.y,
            color=line.colour,
            linestyle=dash(line.dash),
            marker=line.marker if len(line.x) < 60 else "",
            markersize=3.5,
        )
    _set_round_axis(axes)
    if scale == "zero":
        axes.set_ylim(0, 1.05 * max(max(line.y) for line in shown) or None)
    if scale == "log":
        axes.set_yscale("log")
    _label_ends(axes, [line for line in shown if line.label])


def _set_round_axis(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], min_n_ticks=2))


def _label_ends(axes: Axes, lines: Sequence[_Line]) -> None:
    """Write labels right of the axes, in the order and near the height of the lines' ends."""
    # Limits are frozen here, so that the places that are computed stay true.
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [float(to_axes.transform((line.x[-1], line.y[-1]))[1]) for line in lines]
    order = sorted(range(len(lines)), key=lambda i: ends[i])
    heights = _spread([ends[i] for i in order])
    for i, height in zip(order, heights, strict=True):
        axes.plot(
            [1.02, 1.075],
            [height, height],
            color=lines[i].colour,
            linestyle=dash(lines[i].dash),
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.text(1.09, height, lines[i].label, transform=axes.transAxes, va="center")


def _spread(heights: list[float]) -> list[float]:
    """Move ascending heights apart by at least the distance of labels, keeping their middle."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + _LABEL_DISTANCE) if moved else height)
    excess = (sum(moved) - sum(heights)) / max(1, len(heights))
    return [height - excess for height in moved]


def _quality_axis(axes: Axes, quality: Quality) -> None:
    axes.set_ylabel(f"held-out {quality.name}{' (%)' if quality.percent else ''}")
    if quality.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")


def _wide(lines: Sequence[_Line]) -> bool:
    values = [value for line in lines for value in line.y if value > 0]
    return bool(values) and max(values) > _LOG_FROM * min(values)
