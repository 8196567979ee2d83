"""Run directories in; one self-contained HTML file, or markdown, JSON or CSV, out."""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from fedpriv.errors import InputError
from fedpriv.reporting.audit import Audit, audit_section, audit_verdict, read_audit
from fedpriv.reporting.markdown import markdown
from fedpriv.reporting.overview import class_rows
from fedpriv.reporting.own_files import CSV_COLUMNS, MARKDOWN, require_replaceable
from fedpriv.reporting.page import Reported, html
from fedpriv.reporting.reader import Run, read_run, run_labels
from fedpriv.reporting.run_directory import write_whole
from fedpriv.reporting.settings import between_runs, over_seeds
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import Statement, privacy_statement
from fedpriv.reporting.strict_json import strict, to_json
from fedpriv.reporting.wording import randomness
from fedpriv.tasks.base import BY_CLASS


def write_report(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Write one HTML file on one or several runs and return its path.

    The file needs nothing but itself. It appears whole or not at all.

    Args:
        directories: the run directories.
        output: the file; by default `report.html` in the only directory, or `comparison.html`
            in the current folder for several.

    Raises:
        InputError: no directory, one without a run, or an output that cannot be written, or is a
            file that fedpriv did not write.
    """
    own = len(directories) == 1 and output is None
    target = directories[0] / "report.html" if own else output or Path("comparison.html")
    if not own:
        require_replaceable(target, "--output")
    reported = _reported(directories)
    write_whole(target, html(reported), "report")
    return target


def render(directories: Sequence[Path], format: Literal["md", "json", "csv"]) -> str:
    """Return the report as text.

    `md` is the comparison, where there are several runs, and what each came to, with its privacy
    statement. `json` is one document, strict: what is not a finite number is
    null. `csv` has one row a run and round.

    Raises:
        InputError: no directory, or one without a run.
    """
    reported = _reported(directories)
    if format == "md":
        return f"{MARKDOWN}\n{markdown(reported)}"
    if format == "csv":
        return _csv(reported)
    return to_json({"runs": [_document(each) for each in reported], **_compared(reported)})


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


# -------------------------------------------------------------------- JSON and CSV


def _compared(reported: Sequence[Reported]) -> dict[str, Any]:
    """Return what several runs differ in, and their spread over seeds; nothing of one."""
    if len(reported) == 1:
        return {}
    runs = [each.run for each in reported]
    spreads = [
        {**asdict(spread), "runs": [reported[place].label for place in spread.runs]}
        for spread in over_seeds(runs)
    ]
    return {"differences": dict(between_runs([run.config for run in runs])), "spreads": spreads}


def _document(each: Reported) -> dict[str, Any]:
    run = each.run
    return {
        "name": run.config.name,
        "directory": str(run.path),
        "private": run.private,
        "randomness": randomness(run.seeded),
        "epsilon": {} if run.unclaimed else dict(each.account.epsilons),
        "charged": dict(each.account.charged),
        **_costs(each),
        "delta": run.delta if run.private else None,
        "finished_rounds": run.finished_rounds,
        "disagreements": each.account.disagreements,
        "overview": asdict(each.overview),
        "classes": [asdict(row) for row in class_rows(run)],
        "beside_defaults": {setting.key: setting.value for setting in each.settings},
        "signed": {
            **{one.what: one.value for one in each.signed if not one.private},
            "simulation_only": {one.what: one.value for one in each.signed if one.private},
        },
        "statement": asdict(each.statement),
        "ledger": {"noise_by": run.header.noise_by, **run.header.fields()},
        "releases": [asdict(release) for release in run.releases],
        "metrics": run.told_rows,
        "config": run.config.document(),
        "environment": run.environment,
    }


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
            **dict(zip(CSV_COLUMNS, _of_run(each), strict=True)),
            **_of_the_choice(each),
            **_flat(row),
        }
        for each in reported
        for row in each.run.told_rows
    ]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _of_run(each: Reported) -> tuple[str, str, str, str]:
    contradictions = " ".join(each.account.disagreements)
    return each.label, str(each.run.path), randomness(each.run.seeded), contradictions


def _of_the_choice(each: Reported) -> dict[str, Any]:
    """Return ε of a run that a tuning chose, which its lines do not have."""
    return {"tuning.epsilon": min(each.account.epsilons.values())} if each.run.choice else {}


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the numbers of a metrics line by dotted name, without those of blocks and classes."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            if "block_" not in key and key != BY_CLASS:
                flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = strict(value)
    return flat
