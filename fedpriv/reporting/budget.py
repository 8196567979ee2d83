"""Plans and extrapolations as tables, JSON, CSV and figures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from fedpriv.counting import numbered
from fedpriv.disk import write_whole
from fedpriv.errors import InputError
from fedpriv.privacy.band_planning import Choice, best
from fedpriv.privacy.charging import Cost
from fedpriv.privacy.extrapolation import Cell, Extrapolation, Grid
from fedpriv.privacy.figures import epsilon_text, rounded_up, significant_up
from fedpriv.privacy.planning import BudgetAnswer, Curve, Recipe
from fedpriv.privacy.sampling import MinSeparationSampling, RandomAllocation, Sampling
from fedpriv.reporting.own_files import picture_mark, require_replaceable
from fedpriv.reporting.strict_json import strict
from fedpriv.reporting.terminal import Column, FittedTable

if TYPE_CHECKING:  # matplotlib is imported where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _VERMILLION, _BLACK = "#0072B2", "#D55E00", "#000000"
_STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "svg.hashsalt": "fedpriv",
}
# From here on ε is a power of ten in a cell.
_SCIENTIFIC_FROM = 1e4
# A line through fewer points than this shows them.
_FEW = 20


# -------------------------------------------------------------------- words and numbers


def _to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(strict(row) for row in rows)
    return text.getvalue()


# -------------------------------------------------------------------- a plan


def plan_table(answer: BudgetAnswer) -> RenderableType:
    """Return the recipe, with what was solved for marked, and ε as the rounds go on."""
    names = ("rounds", "δ", "ε", "ε by RDP", "ε by PLD")
    spent = FittedTable(
        *(Column(name, kept=True) for name in names),
        Column("order"),
        title="ε after so many rounds",
    )
    for rounds, bill in answer.after:
        for cost in bill.costs:
            spent.row(f"{rounds:,}", f"{cost.delta:.4g}", *_cost_texts(cost))
    return Group(_recipe_table(answer), Text(), spent)


def _cost_texts(cost: Cost) -> tuple[str, str, str, str]:
    order = "–" if cost.best_order is None else f"{cost.best_order:g}"
    by_rdp, by_pld = epsilon_text(cost.epsilon_rdp), epsilon_text(cost.epsilon_pld)
    return epsilon_text(cost.epsilon), by_rdp, by_pld, order


def _recipe_table(answer: BudgetAnswer) -> FittedTable:
    recipe, sampling, total = answer.recipe, answer.recipe.sampling, answer.total.first
    cohort = sampling.expected_cohort
    delta = f"{total.delta:.4g}"
    if answer.question.solve == "delta" and total.delta is not None:
        delta = f"{significant_up(answer.delta_rdp or total.delta, 3)} by RDP"
        if answer.delta_pld is not None:
            delta += f", {significant_up(answer.delta_pld, 3)} by PLD"
    rows = {
        "": ("population", numbered(sampling.population, "user")),
        "sampling": ("sampling", f"{sampling.kind}, {sampling.adjacency.value} adjacency"),
        "cohort": ("cohort", f"{numbered(cohort, 'user')}, q = {cohort / sampling.population:.4g}"),
        "rounds": ("rounds", f"{recipe.rounds:,}{_paid(recipe)}"),
        "bands": (
            "bands",
            f"{recipe.bands}, {recipe.factorization} (correlated noise)",
        ),
        "noise": ("noise multiplier z", _noise_text(answer)),
        "delta": ("δ", delta),
        "epsilon": ("ε", _epsilon_line(answer)),
    }
    table = FittedTable(Column("", kept=True), Column("", kept=True), heads=False)
    if recipe.bands == 1:
        del rows["bands"]
    for key, (name, value) in rows.items():
        table.row(name, value, style="bold" if key == answer.question.solve else "")
    return table


def _paid(recipe: Recipe) -> str:
    if not recipe.correlated:
        return ""
    coins = ", without trusted coins" if recipe.sampling.kind == "min_separation" else ""
    return f", of which a user pays for one in {recipe.mechanism.groups} at most{coins}"


def _noise_text(answer: BudgetAnswer) -> str:
    noise = answer.recipe.noise_multiplier
    # Rounded up: a reader who types it in again must not overspend.
    return rounded_up(noise, 6) if answer.question.solve == "noise" else f"{noise:.6g}"


def _epsilon_line(answer: BudgetAnswer) -> str:
    total, target = answer.total.first, answer.question.epsilon
    budget = "" if target is None else f", of a budget of {target:g}"
    return f"{cost_text(total)}{budget}"


def cost_text(cost: Cost) -> str:
    """Return ε, by which accountant, and what RDP says where it is another."""
    if cost.accountant == "rdp":
        return f"{epsilon_text(cost.epsilon)} by RDP"
    by_rdp = epsilon_text(cost.epsilon_rdp)
    return f"{epsilon_text(cost.epsilon)} by {cost.accountant.upper()} ({by_rdp} by RDP)"


def choices_table(tried: Sequence[Choice]) -> RenderableType:
    """Return what so many bands of correlated noise do, the best of them marked."""
    separated = tried[0].separation is not None
    heads = ("matrix", "bands", "z by RDP", "noise in the model")
    table = FittedTable(
        *(Column(name, kept=True) for name in (*(["separation"] if separated else []), *heads)),
        title="Correlated noise, against independent noise at the same ε",
    )
    for each in tried:
        made = "independent" if each.independent else each.factorization
        row = made, f"{each.bands}", f"{each.noise_multiplier:.4g}", f"{each.error:.1%}"
        apart = [f"{each.separation}"] if separated else []
        table.row(*apart, *row, style="bold" if each == best(tried) else "")
    return table


def which_pays(tried: Sequence[Choice], cohort: float | None = None) -> tuple[str, ...]:
    """Return in a sentence which band pays, and how far apart; nothing where none was tried."""
    if not tried:
        return ()
    found = best(tried)
    written = f"privacy.mechanism: {{kind: correlated, bands: {found.bands}, factorization: "
    written += f"{found.factorization}}}"
    apart = ""
    if found.separation is not None:
        apart = f", at most once in {found.separation} rounds"
        drawn = "" if cohort is None else f", expected_cohort: {cohort:g}"
        written += (
            f", privacy.sampling: {{kind: min_separation, rounds: {found.separation}{drawn}}}"
        )
    if found.independent:
        nothing = f"correlated noise does not pay here: independent noise{apart} moves the model"
        return (f"{nothing} least" + (f"; write {written}" if apart else ""),)
    counted = "buffers" if found.factorization == "blt" else "bands"
    return (
        f"{found.bands} {counted}{apart} pay: noise moves the model by {1 - found.error:.1%} less "
        f"than independent noise at the same ε; write {written}",
    )


def plan_document(answer: BudgetAnswer, tried: Sequence[Choice] = ()) -> dict[str, Any]:
    """Return a plan as a document for `to_json`.

    `epsilon`, by `accountant`, and its kin are those after all rounds at the first δ;
    `deltas` has all δ after all rounds, `after` has all δ after the first rounds and on.
    `separation` is that of min_separation, `block` the rounds of one of random_allocation.
    """
    recipe, question = answer.recipe, answer.question
    return {
        "solved_for": question.solve,
        "sampling": recipe.sampling.kind,
        "adjacency": recipe.sampling.adjacency.value,
        "population": recipe.sampling.population,
        "cohort": recipe.sampling.expected_cohort,
        "noise_multiplier": recipe.noise_multiplier,
        "rounds": recipe.rounds,
        "bands": recipe.bands,
        "separation": _rounds_of(recipe.sampling, MinSeparationSampling),
        "block": _rounds_of(recipe.sampling, RandomAllocation),
        "budget": question.epsilon,
        **asdict(answer.total.first),
        "delta_rdp": answer.delta_rdp,
        "delta_pld": answer.delta_pld,
        "deltas": [asdict(cost) for cost in answer.total.costs],
        "after": _rows_after(answer),
        "notes": answer.notes,
        **({"tried": [asdict(each) for each in tried]} if tried else {}),
    }


def _rounds_of(
    sampling: Sampling, kind: type[MinSeparationSampling | RandomAllocation]
) -> int | None:
    return sampling.rounds if isinstance(sampling, kind) else None


def _rows_after(answer: BudgetAnswer) -> list[dict[str, Any]]:
    return [
        {"rounds": rounds, **asdict(cost)} for rounds, bill in answer.after for cost in bill.costs
    ]


def plan_csv(answer: BudgetAnswer) -> str:
    """Return one row for each δ and number of rounds."""
    recipe = answer.recipe
    fixed = {
        "sampling": recipe.sampling.kind,
        "population": recipe.sampling.population,
        "cohort": recipe.sampling.expected_cohort,
        "noise_multiplier": recipe.noise_multiplier,
    }
    return _to_csv([fixed | row for row in _rows_after(answer)])


def plan_plot(answer: BudgetAnswer, curves: Mapping[str, Curve], path: Path) -> None:
    """Draw ε by round under each accountant, with the budget, to `path`.

    Raises:
        InputError: `path` cannot be written.
    """
    delta, budget = answer.total.first.delta, answer.question.epsilon
    with _figure(6.4, 4.2, path) as (figure, axes):
        rdp = curves["rdp"]
        marker = "s" if len(rdp.rounds) < _FEW else ""
        axes.plot(rdp.rounds, rdp.epsilons, color=_BLUE, marker=marker, ms=3.5, label="by RDP")
        if "pld" in curves:
            pld = curves["pld"]
            axes.plot(
                pld.rounds, pld.epsilons, "o--", color=_VERMILLION, ms=3.5, label="by PLD (at dots)"
            )
        if budget is not None:
            axes.axhline(budget, color=_BLACK, linestyle=":", label=f"budget ε = {budget:g}")
        axes.set_xlabel("rounds")
        axes.set_ylabel(f"ε at δ = {delta:.3g} (no unit)")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.15g}")
        axes.set_title(_title(answer), fontsize=9, loc="left")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)


def _title(answer: BudgetAnswer) -> str:
    sampling = answer.recipe.sampling
    return (
        f"{sampling.expected_cohort:,.15g} of {numbered(sampling.population, 'user')} a round "
        f"({sampling.kind.replace('_', ' ')} sampling), z = {answer.recipe.noise_multiplier:.4g}"
    )


# -------------------------------------------------------------------- an extrapolation


def grid_table(recipe: Extrapolation, grid: Grid) -> RenderableType:
    """Return ε with populations as rows and cohorts as columns; a dot is left out."""
    cells = {(cell.population, cell.cohort): cell for cell in grid.cells}
    cohorts = _cohorts(grid)
    table = FittedTable(
        Column("population ↓\ncohort →", kept=True),
        *(
            Column(f"{cohort:,.15g}\nz {cell.noise_multiplier:.4g}")
            for cohort, cell in cohorts.items()
        ),
        title=f"ε by {_accountants(grid)} after {numbered(recipe.rounds, 'round')} at δ = "
        f"{recipe.delta:g}",
    )
    for population in _populations(grid):
        row = [cells.get((population, cohort)) for cohort in cohorts]
        cost = ("·" if c is None else epsilon_text(c.epsilon) for c in row)
        table.row(f"{population:,}", *cost)
    return table


def _accountants(grid: Grid) -> str:
    """Return which accountants proved the ε of the cells."""
    used = {cell.accountant for cell in grid.cells}
    return " or ".join(name.upper() for name in ("pld", "rdp") if name in used)


def _cohorts(grid: Grid) -> dict[float, Cell]:
    """Return every cohort, ascending, with a cell that has it."""
    return {cell.cohort: cell for cell in sorted(grid.cells, key=lambda cell: cell.cohort)}


def _populations(grid: Grid) -> list[int]:
    return sorted({cell.population for cell in grid.cells})


def grid_rows(recipe: Extrapolation, grid: Grid) -> list[dict[str, Any]]:
    """Return one row a cell; `epsilon` is by `accountant`, those of PLD are there if asked for."""
    rows = [asdict(cell) for cell in grid.cells]
    if "pld" not in recipe.accountants:
        for row in rows:
            del row["epsilon_pld"], row["without_pld"]
    return rows


def grid_csv(recipe: Extrapolation, grid: Grid) -> str:
    """Return `grid_rows` as CSV."""
    return _to_csv(grid_rows(recipe, grid))


def grid_plot(recipe: Extrapolation, grid: Grid, path: Path) -> None:
    """Draw ε as a heat map, logarithmic, with its numbers in the cells, to `path`.

    Raises:
        InputError: `path` cannot be written.
    """
    from matplotlib.colors import LogNorm

    cohorts, populations = _cohorts(grid), _populations(grid)
    values = _grid_values(grid)
    width, height = max(5.6, 2.4 + 0.95 * len(cohorts)), 2.1 + 0.55 * len(populations)
    with _figure(width, height, path) as (figure, axes):
        axes.grid(visible=False)
        axes.set_facecolor("#eeeeee")
        norm = LogNorm(*_limits(values))
        image = axes.imshow(
            np.ma.masked_invalid(values), cmap="cividis_r", norm=norm, aspect="auto"
        )
        _write_cells(axes, values, norm)
        names = [f"{c:,.15g}\nz = {cell.noise_multiplier:.4g}" for c, cell in cohorts.items()]
        axes.set_xticks(range(len(cohorts)), names)
        axes.set_yticks(range(len(populations)), [f"{count:,}" for count in populations])
        axes.tick_params(length=0)
        axes.set_xlabel("expected cohort (users a round) and its noise multiplier")
        axes.set_ylabel("population (users)")
        bar = figure.colorbar(image, ax=axes, label=f"ε at δ = {recipe.delta:g} (no unit)")
        bar.outline.set_visible(False)
        axes.set_title(_grid_title(recipe, grid), fontsize=9, loc="left")


def _grid_values(grid: Grid) -> np.ndarray:
    """Return ε as `[populations, cohorts]`: nan where left out."""
    cohorts, populations = list(_cohorts(grid)), _populations(grid)
    values = np.full((len(populations), len(cohorts)), np.nan)
    for cell in grid.cells:
        values[populations.index(cell.population), cohorts.index(cell.cohort)] = cell.epsilon
    return values


def _grid_title(recipe: Extrapolation, grid: Grid) -> str:
    title = (
        f"ε by {_accountants(grid)} after {numbered(recipe.rounds, 'round')}\n"
        "noise on the mean held fixed"
    )
    return title + ("; –: the cohort exceeds the population" if grid.left_out else "")


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the colours, never equal."""
    shown = values[np.isfinite(values) & (values > 0)]
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (1.0, 1.0)
    return low, max(high, 10 * low)


def _write_cells(axes: Axes, values: np.ndarray, norm: LogNorm) -> None:
    for (row, column), value in np.ndenumerate(values):
        # The map runs from light to dark: white numbers where it is dark.
        dark = math.isfinite(value) and norm(value) > 0.5
        colour = "white" if dark else "black"
        axes.text(column, row, _short(value), ha="center", va="center", color=colour, fontsize=8)


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if value >= _SCIENTIFIC_FROM:
        return significant_up(value, 2).replace("e+", "e")
    return rounded_up(value, 2 if value < 100 else 0)


# -------------------------------------------------------------------- drawing


def check_plot_path(path: Path) -> None:
    """Raise InputError unless `path` names a PNG or SVG file in a folder that exists.

    So it does for a picture that fedpriv did not draw.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"--plot: write a file that ends with .png or .svg, got {path}")
    if not path.parent.is_dir():
        raise InputError(f"--plot: there is no folder {path.parent}; make it, or name another")
    require_replaceable(path, "--plot")


@contextmanager
def _figure(width: float, height: float, path: Path) -> Iterator[tuple[Figure, Axes]]:
    """Give a figure of so many inches and write it to `path` when it is drawn."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()
        drawn = io.BytesIO()
        kind = path.suffix[1:].lower()
        figure.savefig(drawn, dpi=150, format=kind, metadata=picture_mark(path))
        try:
            write_whole(path, drawn.getvalue())
        except OSError as error:
            raise InputError(f"--plot: cannot write {path} ({error.strerror})") from None
