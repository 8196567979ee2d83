"""The commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedpriv.config import ExperimentConfig, load_config
from fedpriv.errors import BudgetError, FedprivError, Interrupted

if TYPE_CHECKING:
    from fedpriv.experiment import Experiment
    from fedpriv.reporting.run_directory import RunDirectory

app = typer.Typer(
    help="Differentially private federated learning, simulated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at and check configs.", no_args_is_help=True)
app.add_typer(config_app, name="config")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, e.g. privacy.delta=1e-6; repeatable")
]
ConfigPath = Annotated[Path, typer.Argument(help="a config in YAML")]

_errors = Console(stderr=True)


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train as CONFIG says, in a new run directory."""
    # Imported here, so that --help and the config commands do not wait for torch and Flower.
    from fedpriv import experiment

    prepared = experiment.prepare(load_config(config, overrides or []))
    _train(experiment.create(prepared), prepared)


@app.command()
def resume(directory: Annotated[Path, typer.Argument(help="the folder of a run")]) -> None:
    """Continue an interrupted run, on the same ledger."""
    from fedpriv import experiment

    _train(*experiment.reopen(directory))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="one or more run directories")],
) -> None:
    """Write the report of a run."""
    for directory in directories:
        _conclude(directory)


@config_app.command()
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print CONFIG with all defaults filled in."""
    sys.stdout.write(load_config(config, overrides or []).to_yaml())


@config_app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check CONFIG, its data and its model, without running anything."""
    from fedpriv import experiment

    prepared = experiment.prepare(load_config(config, overrides or []))
    planned = prepared.plan.planned_epsilon()
    cost = (
        "without privacy" if planned is None else f"ε = {planned:.4g} at δ={prepared.plan.delta:g}"
    )
    print(f"{config}: valid; {prepared.config.rounds} rounds cost {cost}")


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a config: every key, its meaning, unit and bounds."""
    print(json.dumps(ExperimentConfig.model_json_schema(), indent=2))


def _train(directory: RunDirectory, prepared: Experiment) -> None:
    """Run the rounds that are left; the report is written also where the run was stopped."""
    from fedpriv import experiment
    from fedpriv.reporting.progress import ProgressLines

    try:
        with ProgressLines(_errors) as progress:
            experiment.train(prepared, directory, progress)
    except (BudgetError, Interrupted) as stopped:
        if directory.read_metrics():
            _conclude(directory.path)
        if isinstance(stopped, Interrupted):
            raise Interrupted(
                f"{stopped}; continue with: fedpriv resume {directory.path}"
            ) from None
        raise
    _conclude(directory.path)


def _conclude(directory: Path) -> None:
    from fedpriv.reporting.report import write_report
    from fedpriv.reporting.summary import summary_table

    Console().print(summary_table([directory]))
    _errors.print(f"report: {write_report([directory])}", soft_wrap=True)


def main() -> None:
    """Run the command line; every expected failure is one line and an exit code."""
    try:
        app()
    except FedprivError as error:
        _errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _errors.print("abandoned")
        sys.exit(Interrupted.exit_code)
