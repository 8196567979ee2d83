"""The commands. What one needs is imported by it, so that the others need not wait for it."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fedpriv import __version__
from fedpriv.cli.budget import budget_app
from fedpriv.cli.common import abandon, complain, tell
from fedpriv.cli.configs import config_app
from fedpriv.cli.data import data_app
from fedpriv.cli.deploy import deploy_app, node_app
from fedpriv.cli.ledger import ledger_app
from fedpriv.cli.methods import methods_app
from fedpriv.cli.models import models_app
from fedpriv.cli.runs import runs_app
from fedpriv.cli.starting import starting_app
from fedpriv.cli.tuning import tuning_app
from fedpriv.cli.usage import Commands
from fedpriv.disk import barred, has_no_room, no_room
from fedpriv.errors import FedprivError, InputError
from fedpriv.reporting.terminal import let_print_anything

app = typer.Typer(
    cls=Commands,
    help="Differentially private federated learning, simulated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(starting_app)
app.add_typer(runs_app)
app.add_typer(tuning_app)
app.add_typer(models_app)
app.add_typer(methods_app)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(budget_app, name="budget")
app.add_typer(ledger_app, name="ledger")
app.add_typer(deploy_app, name="deploy")
app.add_typer(node_app, name="node")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fedpriv {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="say which this is"),
    ] = False,
) -> None:
    """Train, plan and check with differential privacy."""


def _flush() -> None:
    """Write what is left of the output, while it can still be told that there is no room for it.

    Raises:
        OSError: there is none, and what was left is given up; a reader who has gone is no error.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def main() -> None:
    """Run the command line; every expected failure is one line and an exit code."""
    let_print_anything()
    # A notebook's backend, say: it need not be installed here, where files alone are drawn.
    os.environ.pop("MPLBACKEND", None)
    try:
        try:
            app()
        finally:
            _flush()
    except FedprivError as error:
        tell(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if has_no_room(error):
            complain(no_room(error))
            sys.exit(FedprivError.exit_code)
        if (reason := barred(error)) is None:
            raise
        complain(reason)
        sys.exit(InputError.exit_code)
    except KeyboardInterrupt:
        abandon()
