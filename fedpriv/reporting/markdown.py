"""The report as markdown: the comparison first, then each run with its privacy statement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedpriv.reporting.page import COMPARISON_HEADS, Reported, comparison_cells
from fedpriv.reporting.settings import between_runs, over_seeds, spread_sentence
from fedpriv.reporting.statement import to_markdown
from fedpriv.reporting.wording import ADDS_UP, beside_epsilon

_HEADS = ("run", "held-out", "ε", "by", "δ", *COMPARISON_HEADS)


def markdown(reported: Sequence[Reported]) -> str:
    """Return the report on one run, or on several."""
    parts = [_comparison(reported)] if len(reported) > 1 else []
    for each in reported:
        parts += [_overview(each), to_markdown(each.statement, each.label)]
    return "\n".join(parts)


def _comparison(reported: Sequence[Reported]) -> str:
    runs, marks = [each.run for each in reported], [each.mark for each in reported]
    parts = [f"# {len(reported)} runs compared", table(_HEADS, map(_row, reported)), ADDS_UP]
    if differences := between_runs([run.config for run in runs]):
        heads = ("setting", *marks)
        parts += ["## What differs", table(heads, ((key, *values) for key, values in differences))]
    if spreads := over_seeds(runs):
        parts += ["## Over seeds", *(spread_sentence(each, marks) for each in spreads)]
    return "\n\n".join(parts) + "\n"


def _row(each: Reported) -> Sequence[str]:
    head = each.overview
    by = head.decides.accountant.upper() if head.decides else "–"
    label = f"{each.mark}: {each.label}"
    return (label, head.quality, head.epsilon, by, head.delta, *comparison_cells(each))


def _overview(each: Reported) -> str:
    head, seeded = each.overview, each.run.seeded and each.run.private
    rows = [
        (f"held-out {each.run.measured.quality.name}", f"{head.quality} ({head.sure})"),
        ("ε", f"{head.epsilon}{beside_epsilon(seeded)}"),
        ("δ", head.delta),
        ("protected", head.unit),
        ("randomness", head.badge),
    ]
    parts = [f"# {each.label}", table(("", ""), rows), " ".join(head.plain)]
    settings = [(f"`{one.key}`", one.value, one.default) for one in each.settings]
    parts += ["## What differs from the defaults", table(("setting", "here", "default"), settings)]
    if each.classes:
        classes = [
            (f"{row.number}", f"{row.examples:,}", f"{row.right[0]:.1%}") for row in each.classes
        ]
        parts += ["## Classes", table(("class", "held-out examples", "told right"), classes)]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
