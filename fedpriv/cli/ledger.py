"""`ledger`: look at, check and add up what runs spent."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.common import LedgerFormat, check_format, errors, file_or_folder, say
from fedpriv.reporting.terminal import console, working

ledger_app = typer.Typer(
    help="Look at, check and add up what runs spent; a ledger is never changed.",
    no_args_is_help=True,
)

_LEDGER = "PATH: a run directory or a ledger file"
LedgerPath = Annotated[Path, typer.Argument(parser=file_or_folder, metavar="PATH")]


@ledger_app.command("show", epilog=_LEDGER)
def show_ledger(path: LedgerPath, format: LedgerFormat = "table") -> None:
    """Print the releases of a ledger, those that cost the same in one line, and their ε."""
    from fedpriv.reporting import ledgers
    from fedpriv.reporting.strict_json import to_json

    check_format(format, "table", "json")
    opened = ledgers.open_ledger(path)
    opened.require_priced()
    with working(errors, "computing ε"):
        bill = opened.account.bill(opened.account.header.delta)
    say([*opened.notes, *ledgers.bill_notes(opened, bill)])
    if format == "json":
        sys.stdout.write(to_json(ledgers.ledger_document(opened, bill)))
    else:
        console().print(ledgers.ledger_table(opened, bill))


@ledger_app.command(epilog=_LEDGER)
def verify(path: LedgerPath, format: LedgerFormat = "table") -> None:
    """Check every line of a ledger, compute ε from it alone, and compare with the run's metrics."""
    from fedpriv.reporting import ledgers
    from fedpriv.reporting.strict_json import to_json

    check_format(format, "table", "json")
    with working(errors, "checking the ledger and computing ε"):
        verified = ledgers.verify(path)
    say([*verified.opened.notes, *ledgers.bill_notes(verified.opened, verified.bill)])
    if format == "json":
        sys.stdout.write(to_json(ledgers.verified_document(verified)))
    else:
        console().print(ledgers.verified_lines(verified), soft_wrap=True)


@ledger_app.command(epilog="PATHS: run directories or ledger files")
def merge(
    paths: Annotated[list[Path], typer.Argument(parser=file_or_folder, metavar="PATHS")],
    delta: Annotated[
        float | None, typer.Option(help="δ; by default the one that the ledgers share")
    ] = None,
    format: LedgerFormat = "table",
) -> None:
    """Say what several runs over one population cost its users, or its silos, together.

    Equal populations are taken to be the same people, or silos, the worst case: the runs compose in
    sequence.
    """
    from fedpriv.privacy import composition
    from fedpriv.privacy.planning import check_delta
    from fedpriv.reporting import ledgers
    from fedpriv.reporting.strict_json import to_json

    check_format(format, "table", "json")
    if delta is not None:
        check_delta(delta)
    opened = [ledgers.open_ledger(path) for path in paths]
    for each in opened:
        each.require_complete()
        each.require_priced()
    with working(errors, "computing ε of all together"):
        merged = composition.merge([each.account for each in opened], delta)
    say(ledgers.merge_notes(opened, merged))
    if format == "json":
        sys.stdout.write(to_json(ledgers.merged_document(merged)))
    else:
        console().print(ledgers.merged_table(merged))
