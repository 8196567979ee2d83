"""The report as one page of HTML that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedpriv.privacy.figures import epsilon_text
from fedpriv.reporting.heat_maps import block_figures
from fedpriv.reporting.overview import (
    ClassRow,
    Overview,
    class_rows,
    epsilon_of_the_median,
    no_classes,
    overview,
)
from fedpriv.reporting.plots import figures
from fedpriv.reporting.reader import Run
from fedpriv.reporting.settings import (
    Setting,
    beside_defaults,
    between_runs,
    over_seeds,
    spread_sentence,
)
from fedpriv.reporting.sign_off import Signed, signed
from fedpriv.reporting.spent import Spent, rdp_by_round
from fedpriv.reporting.statement import NO_PRIVACY, Guarantee, Statement
from fedpriv.reporting.svg import Marked, Plot
from fedpriv.reporting.wording import ADDS_UP, KNOWN_SEED, duration, randomness

# A page shows no more measured rounds than this, nor classes; the CSV has every round.
_MEASURED_ROWS, _CLASS_ROWS = 40, 40
# The figures of users' own values, which no mechanism released, and the one that comes last.
_PRIVATE, _LAST = ("cohort", "clipped", "norms"), "throughput"
# The figures that stand at the head of a page, the first of them that there is.
_FIRST = ("quality-by-epsilon", "quality-by-round")


@dataclass(frozen=True)
class Fact:
    """One figure of how a run was made.

    Attributes:
        label: what it is.
        value: the figure.
        note: what belongs to it, such as a unit.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Reported:
    """A run with everything that reports say of it."""

    label: str
    mark: str
    index: int
    run: Run
    account: Spent
    statement: Statement

    @property
    def marked(self) -> Marked:
        """The run as figures show it."""
        return Marked(self.run, self.mark, self.index)

    @cached_property
    def overview(self) -> Overview:
        """Its head."""
        return overview(self.run, self.statement)

    @property
    def others(self) -> tuple[Guarantee, ...]:
        """The guarantees of the accountants that do not decide."""
        return self.statement.guarantees[1:]

    @property
    def settings(self) -> list[Setting]:
        """What its config says beside the defaults."""
        return beside_defaults(self.run.config)

    @property
    def signed(self) -> list[Signed]:
        """What is signed with it."""
        return signed(self.run)

    @property
    def classes(self) -> list[ClassRow]:
        """Its classes, the worst first, as many as a page shows."""
        return class_rows(self.run)[:_CLASS_ROWS]

    @property
    def no_classes(self) -> str:
        """Why there are none."""
        return no_classes(self.run)

    @property
    def facts(self) -> list[Fact]:
        """How it was made, in figures."""
        return _facts(self)

    @cached_property
    def blocks(self) -> list[Plot]:
        """Its figures block by block."""
        return block_figures(self.marked)

    @property
    def released_blocks(self) -> list[Plot]:
        """Those of what was released."""
        return [plot for plot in self.blocks if plot.key not in _PRIVATE]

    @property
    def private_blocks(self) -> list[Plot]:
        """Those of users' own values."""
        return [plot for plot in self.blocks if plot.key in _PRIVATE]


def html(reported: Sequence[Reported]) -> str:
    """Return the page on one run, or on several."""
    environment = Environment(
        loader=PackageLoader("fedpriv.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = figures([each.marked for each in reported])
    first = next((plot for key in _FIRST for plot in drawn if plot.key == key), None)
    runs = [each.run for each in reported]
    return environment.get_template("report.html.j2").render(
        reported=reported,
        alone=len(reported) == 1,
        title=reported[0].label if len(reported) == 1 else f"{len(reported)} runs compared",
        no_privacy=NO_PRIVACY,
        known_seed=KNOWN_SEED,
        adds_up=ADDS_UP.replace("`", ""),
        spread_sentence=lambda spread: spread_sentence(spread, [each.mark for each in reported]),
        first=first,
        figures=[p for p in drawn if p is not first and p.key not in (*_PRIVATE, _LAST)],
        private_figures=[plot for plot in drawn if plot.key in _PRIVATE],
        last=[plot for plot in drawn if plot.key == _LAST],
        differences=between_runs([run.config for run in runs]) if len(runs) > 1 else [],
        spreads=over_seeds(runs),
        comparison=comparison_cells,
        comparison_heads=COMPARISON_HEADS,
        measured=_measured,
        configuration=lambda each: each.run.config.to_yaml(),
        surroundings=lambda each: yaml.safe_dump(each.run.environment, sort_keys=False),
        inline=_inline,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _inline(plot: Plot) -> Markup:
    """Return a figure as it is: Matplotlib has escaped the text in it."""
    return Markup(plot.svg)


def _facts(each: Reported) -> list[Fact]:
    run, last = each.run, each.run.releases[-1]
    who, facts = last.mechanism.members, list[Fact]()
    if (median := epsilon_of_the_median(run, each.account)) is not None:
        known = f", {KNOWN_SEED}" if run.seeded else ""
        facts.append(Fact("ε by RDP", median[1], f"of the median {median[0]}{known}"))
    facts += [
        Fact("Rounds", f"{run.finished_rounds:,}", f"of {run.config.rounds:,} planned"),
        Fact("Cohort", run.mechanism.a_round(run.sampling), f"{who} of {last.population:,}"),
    ]
    if run.private:
        facts.append(Fact("Noise multiplier z", f"{last.noise_multiplier:.4g}"))
        facts.append(Fact("Noise σ of the sum", f"{last.stddev:.4g}"))
    if run.private and run.config.privacy is not None:
        kind = run.config.privacy.clipping.kind.replace("_", "-")
        facts.append(Fact("Clip bound C", f"{last.bound:.4g}", kind))
    if run.parameters is not None:
        facts.append(Fact("Trained parameters", f"{run.parameters:,}", run.config.model.name))
    return [*facts, Fact("Wall time", duration(run.seconds))]


def _measured(each: Reported) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the table of rounds that were measured, thinned where too many."""
    # No round of a trial has an ε of its own.
    shown = not (each.run.unclaimed or each.run.trial)
    names = list(each.account.epsilons) if shown else []
    keys = sorted({key for row in each.run.rows for key in row.get("held_out", {})})
    heads = ["round", *(f"ε {name}" for name in names), *keys, "learning rate", "update norm"]
    by_round = zip(each.run.rows, rdp_by_round(each.run), strict=True)
    rows = [
        [
            f"{row['round']:,}",
            *(epsilon_text(_epsilon(row, name, rdp)) for name in names),
            *(_text(row["held_out"].get(key)) for key in keys),
            _text(row.get("lr")),
            _text(row.get("aggregate_norm")),
        ]
        for row, rdp in by_round
        if row.get("held_out")
    ]
    step = max(1, math.ceil(len(rows) / _MEASURED_ROWS))
    return heads, rows[::-1][::step][::-1]


def _epsilon(row: dict[str, Any], accountant: str, rdp: float) -> float | None:
    return rdp if accountant == "rdp" else row["epsilon"].get(accountant)


def _text(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


#: What stands of a run beside its quality and its promise where runs are compared.
COMPARISON_HEADS = ("randomness", "rounds", "clip bound", "noise", "cohort", "server", "time")


def comparison_cells(each: Reported) -> list[str]:
    """Return a run's cells under `COMPARISON_HEADS`."""
    run, last = each.run, each.run.releases[-1]
    bound = "none" if last.bound is None else f"{last.bound:.4g}"
    return [
        randomness(run.seeded),
        f"{run.finished_rounds:,} of {run.config.rounds:,}",
        bound,
        f"{last.noise_multiplier:.4g}",
        f"{run.mechanism.a_round(run.sampling)} of {last.population:,}",
        run.config.server_step,
        duration(run.seconds),
    ]
