"""Run directories in; one self-contained HTML file, or markdown, JSON or CSV, out."""

from __future__ import annotations

import csv
import io
import math
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedpriv.errors import InputError
from fedpriv.privacy.figures import epsilon_text
from fedpriv.reporting.audit import Audit, audit_section, audit_verdict, read_audit
from fedpriv.reporting.heat_maps import block_figures
from fedpriv.reporting.plots import figures
from fedpriv.reporting.reader import Run, read_run, run_labels
from fedpriv.reporting.run_directory import write_whole
from fedpriv.reporting.spent import Spent, rdp_by_round, spent
from fedpriv.reporting.statement import NO_PRIVACY, Statement, privacy_statement, to_markdown
from fedpriv.reporting.strict_json import strict, to_json
from fedpriv.reporting.svg import Marked, Plot
from fedpriv.reporting.wording import KNOWN_SEED, duration

# A page shows no more measured rounds than this; the CSV has every round.
_MEASURED_ROWS = 40


@dataclass(frozen=True)
class Card:
    """One figure at the head of a report.

    Attributes:
        label: what it is.
        value: the figure.
        note: what belongs to it, such as δ or a unit.
        key: `epsilon-rdp` and the like, by which a program finds it; empty for none.
        exact: the figure in full, for a program.
        alarming: shown in red.
    """

    label: str
    value: str
    note: str = ""
    key: str = ""
    exact: str = ""
    alarming: bool = False


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


def write_report(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Write one HTML file on one or several runs and return its path.

    The file needs nothing but itself. It appears whole or not at all.

    Args:
        directories: the run directories.
        output: the file; by default `report.html` in the only directory, or `comparison.html`
            in the current folder for several.

    Raises:
        InputError: no directory, one without a run, or an output that cannot be written.
    """
    reported = _reported(directories)
    default = directories[0] / "report.html" if len(directories) == 1 else Path("comparison.html")
    target = output or default
    write_whole(target, _html(reported), "report")
    return target


def render(directories: Sequence[Path], format: Literal["md", "json", "csv"]) -> str:
    """Return the report as text.

    `md` is the privacy statements. `json` is one document, strict: what is not a finite number is
    null. `csv` has one row a run and round.

    Raises:
        InputError: no directory, or one without a run.
    """
    reported = _reported(directories)
    if format == "md":
        return "\n".join(to_markdown(each.statement, each.label) for each in reported)
    if format == "csv":
        return _csv(reported)
    document = {"runs": [_document(each) for each in reported]}
    return to_json(document)


def _reported(directories: Sequence[Path]) -> list[Reported]:
    if not directories:
        raise InputError("name at least one run directory")
    runs = [read_run(path) for path in directories]
    marks = [""] if len(runs) == 1 else [_mark(index) for index in range(len(runs))]
    labels = run_labels(runs)
    reported = []
    for index, (run, label, mark) in enumerate(zip(runs, labels, marks, strict=True)):
        account = spent(run)
        statement = _audited(privacy_statement(run, account), read_audit(run.path), run)
        reported.append(Reported(label, mark, index, run, account, statement))
    return reported


def _audited(statement: Statement, audit: Audit | None, run: Run) -> Statement:
    """Return the statement with what an audit measured beside what is claimed."""
    if audit is None:
        return statement
    sections = (*statement.sections, audit_section(audit, run.header.fingerprint))
    refuted = () if audit.holds else (audit_verdict(audit),)
    return replace(statement, sections=sections, alarms=(*statement.alarms, *refuted))


def _mark(index: int) -> str:
    """Return A to Z, then A2 to Z2 and so on."""
    turn, letter = divmod(index, len(string.ascii_uppercase))
    return string.ascii_uppercase[letter] + (str(turn + 1) if turn else "")


# -------------------------------------------------------------------- HTML


def _html(reported: Sequence[Reported]) -> str:
    environment = Environment(
        loader=PackageLoader("fedpriv.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        reported=reported,
        alone=len(reported) == 1,
        title=reported[0].label if len(reported) == 1 else f"{len(reported)} runs compared",
        no_privacy=NO_PRIVACY,
        known_seed=KNOWN_SEED,
        cards=_cards,
        figures=figures([each.marked for each in reported]),
        block_figures=lambda each: block_figures(each.marked),
        measured=_measured,
        comparison=_comparison,
        comparison_heads=_COMPARISON_HEADS,
        configuration=lambda each: each.run.config.to_yaml(),
        surroundings=lambda each: yaml.safe_dump(each.run.environment, sort_keys=False),
        inline=_inline,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _inline(plot: Plot) -> Markup:
    """Return a figure as it is: Matplotlib has escaped the text in it."""
    return Markup(plot.svg)


def _cards(each: Reported) -> list[Card]:
    run, last = each.run, each.run.releases[-1]
    quality, cohort = run.measured.quality, run.sampling.expected_cohort
    users = math.fsum(run.seen("cohort"))
    who = last.mechanism.members
    cards = [Card(f"Held-out {quality.name}", *_quality(run)), *_epsilon_cards(each)]
    cards += [
        Card("Rounds", f"{run.finished_rounds:,}", f"of {run.config.rounds:,} planned"),
        Card("Cohort", f"{cohort:g}", f"{who} expected of {last.population:,}"),
    ]
    if run.private:
        cards.append(
            Card("Noise multiplier z", f"{last.noise_multiplier:.4g}", f"σ = {last.stddev:.4g}")
        )
    if run.private and run.config.privacy is not None:
        kind = run.config.privacy.clipping.kind.replace("_", "-")
        cards.append(Card("Clip bound C", f"{last.bound:.4g}", kind))
    known = run.seconds > 0 and math.isfinite(users)
    speed = f"simulation only: {users / run.seconds:,.0f} {who}/s" if known else ""
    return [*cards, Card("Wall time", duration(run.seconds), speed)]


def _quality(run: Run) -> tuple[str, str]:
    if math.isnan(run.measured.final):
        return "–", "not measured yet"
    return run.measured.told, f"after round {run.measured.rounds[-1]:,}"


def _epsilon_cards(each: Reported) -> list[Card]:
    if not each.run.private:
        return [Card("Privacy", "none", "nothing is bounded", alarming=True)]
    costs, whose = each.account.costs, ""
    seed = f", {KNOWN_SEED}" if each.run.seeded else ""
    if each.run.ended_early:
        seed = f", of all {each.run.config.rounds:,} planned rounds{seed}"
    median = []
    if costs is not None:
        payer = each.run.mechanism.payer
        whose = f"worst {payer}, "
        note = f"median {payer}{seed}"
        median = [Card("ε by RDP", epsilon_text(costs.median), note, "epsilon-median")]
    return median + [
        Card(
            f"ε by {guarantee.accountant.upper()}",
            guarantee.shown,
            f"{whose}at δ = {guarantee.delta:g}{seed}",
            key=f"epsilon-{guarantee.accountant}",
            exact=repr(guarantee.epsilon),
        )
        for guarantee in sorted(each.statement.guarantees, key=lambda one: one.epsilon)
    ]


def _measured(each: Reported) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the table of rounds that were measured, thinned where too many."""
    names = list(each.account.epsilons)
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


_COMPARISON_HEADS = ("randomness", "rounds", "clip bound", "noise", "cohort", "server", "time")


def _comparison(each: Reported) -> list[str]:
    """Return a run's cells under `_COMPARISON_HEADS`."""
    run, last = each.run, each.run.releases[-1]
    bound = "none" if last.bound is None else f"{last.bound:.4g}"
    return [
        _randomness(run),
        f"{run.finished_rounds:,} of {run.config.rounds:,}",
        bound,
        f"{last.noise_multiplier:.4g}",
        f"{run.sampling.expected_cohort:g} of {last.population:,}",
        run.config.server_step,
        duration(run.seconds),
    ]


# -------------------------------------------------------------------- JSON and CSV


def _document(each: Reported) -> dict[str, Any]:
    run = each.run
    return {
        "name": run.config.name,
        "directory": str(run.path),
        "private": run.private,
        "randomness": _randomness(run),
        "epsilon": dict(each.account.epsilons),
        "charged": dict(each.account.charged),
        **_costs(each),
        "delta": run.delta if run.private else None,
        "finished_rounds": run.finished_rounds,
        "disagreements": each.account.disagreements,
        "statement": asdict(each.statement),
        "ledger": {"noise_by": run.header.noise_by, **run.header.fields()},
        "releases": [asdict(release) for release in run.releases],
        "metrics": run.rows,
        "config": run.config.document(),
        "environment": run.environment,
    }


def _randomness(run: Run) -> str:
    """Return what ε stands beside: who could draw the noise again."""
    return KNOWN_SEED if run.seeded else "seeded by the operating system"


def _costs(each: Reported) -> dict[str, Any]:
    """Return what those who pay alone have spent, and ε against those who see more."""
    costs, payer = each.account.costs, each.run.mechanism.payer
    adversaries = (
        {"adversaries": dict(each.account.adversaries)} if each.account.adversaries else {}
    )
    if costs is None or payer == "silo":
        return {"silos": asdict(costs) if costs else None, **adversaries}
    apart = {"worst": costs.worst, f"worst_{payer}": costs.worst_payer, "median": costs.median}
    return {"silos": None, f"{payer}s": apart, **adversaries}


def _csv(reported: Sequence[Reported]) -> str:
    rows = [
        {
            "run": each.label,
            "directory": str(each.run.path),
            "randomness": _randomness(each.run),
            "contradictions": " ".join(each.account.disagreements),
            **_flat(row),
        }
        for each in reported
        for row in each.run.rows
    ]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the numbers of a metrics line by dotted name, without those of single blocks."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            if "block_" not in key:
                flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = strict(value)
    return flat
