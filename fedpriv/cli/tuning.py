"""`tune` and `sweep`: several trials of a config, counted where the best of them is published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpriv.cli.common import CONFIG, ConfigPath, Overrides, check_format, file_or_folder, say
from fedpriv.errors import InputError, Interrupted
from fedpriv.reporting.terminal import Column, FittedTable, console, print_lines

if TYPE_CHECKING:
    import pandas as pd

    from fedpriv.api import Experiment

tuning_app = typer.Typer()

Grid = Annotated[
    list[str] | None,
    typer.Option(help="key=a,b,c: what a trial may have, e.g. server.lr=0.1,0.2; repeatable"),
]


@tuning_app.command(epilog=CONFIG)
def tune(
    config: ConfigPath,
    overrides: Overrides = None,
    grid: Grid = None,
    trials: Annotated[
        str, typer.Option(help="law of their number: logarithmic, geometric or poisson")
    ] = "geometric",
    mean: Annotated[float, typer.Option(help="how many trials are expected")] = 10.0,
    run_dir: Annotated[
        Path | None,
        typer.Option(parser=file_or_folder, metavar="DIRECTORY", help="default: runs/NAME-tuning"),
    ] = None,
) -> None:
    """Train a random number of trials at random points of a grid, and release only the best.

    What that costs is counted (Papernot, Steinke 2022). Again in the same folder it is another
    tuning of the same users, and adds to it; after Ctrl-C the same command goes on.

    A bar on a terminal, or a line a trial elsewhere, says how far it is. Like all marked
    "simulation only" it is as private as the data: it tells how many trials there are.
    """
    from fedpriv.privacy.figures import epsilon_text
    from fedpriv.tuning import tune as tuned

    experiment, values = _loaded(config, overrides), _axes(grid or [])
    runtime = experiment.config.runtime.grid
    with _going_on():
        found = tuned(experiment, values, trials, mean, runtime, run_dir)  # type: ignore[arg-type]
    out, cost = console(), found.cost
    if found.best is None:
        out.print("no trial was drawn: there is nothing to release, and it costs the same")
    else:
        point = ", ".join(f"{key}={value}" for key, value in (found.point or {}).items())
        print_lines(out, f"best: {point}, {found.best._read.measured.told}: {found.best.path}")
    print_lines(
        out, f"all tunings there cost ε = {epsilon_text(cost.epsilon)} at δ = {cost.delta:g}"
    )


@tuning_app.command(epilog=CONFIG)
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    grid: Grid = None,
    seeds: Annotated[
        str | None, typer.Option(help="a,b,c: run each point with these seeds; default: CONFIG's")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(parser=file_or_folder, metavar="DIRECTORY", help="default: runs/NAME-sweep"),
    ] = None,
    format: Annotated[str, typer.Option(help="table, json or csv")] = "table",
) -> None:
    """Train every point of a grid, on public data: choosing among them is not counted.

    Runs that are in the folder already are kept; after Ctrl-C the same command goes on.
    """
    from fedpriv.api import sweep as swept

    check_format(format, "table", "json", "csv")
    experiment, values = _loaded(config, overrides), _axes(grid or [])
    if seeds == "":
        raise InputError("--seeds: write 17,18, got ''")
    numbers = None if seeds is None else _values("seed", seeds)
    if "seed" in values and numbers is not None:
        raise InputError("--grid: seed is given twice; leave it to --seeds")
    if not values and numbers is None:
        raise InputError("there is nothing to sweep; write --grid key=a,b or --seeds a,b")
    runtime = experiment.config.runtime.grid
    with _going_on():
        found = swept(experiment, values, numbers, runtime, run_dir)
    rows = found.assign(run=[str(run.path) for run in found.run])
    if format == "table":
        console().print(_table(rows, [*values, *([] if numbers is None else ["seed"])]))
    else:
        text = rows.to_csv(index=False) if format == "csv" else rows.to_json(orient="records")
        print(text.rstrip("\n"))
    if rows.epsilon.max() < float("inf"):
        chosen = "each run has a ledger of its own; that the best of them was chosen is not counted"
        say([f"{chosen}, which is for public data: fedpriv tune counts it"])


def _loaded(config: Path, overrides: list[str] | None) -> Experiment:
    from fedpriv.api import Experiment
    from fedpriv.config_files import parsed_override

    return Experiment.load(config, dict(parsed_override(each) for each in overrides or []))


@contextmanager
def _going_on() -> Iterator[None]:
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; the same command goes on") from None


def _table(rows: pd.DataFrame, axes: list[str]) -> FittedTable:
    from fedpriv.privacy.figures import epsilon_text

    measure = rows.columns[rows.columns.get_loc("rounds") + 1]
    shown = [*axes, measure, "epsilon", "rounds", "run"]
    heads = {"epsilon": "ε"}
    table = FittedTable(
        *(Column(heads.get(name, name), kept=name in shown[:-2]) for name in shown[:-1]),
        Column("run", text=True),
    )
    texts = {measure: lambda value: f"{value:.4g}", "epsilon": epsilon_text}
    for row in rows[shown].to_dict("records"):
        table.row(*(texts.get(str(name), str)(value) for name, value in row.items()))
    return table


def _axes(texts: list[str]) -> dict[str, list[Any]]:
    """Return the values of each key of a grid."""
    axes = [_axis(text) for text in texts]
    for key, count in Counter(key for key, _ in axes).items():
        if count > 1:
            raise InputError(f"--grid: {key} is given twice; write all its values in one, key=a,b")
    return dict(axes)


def _axis(text: str) -> tuple[str, list[Any]]:
    """Return the key and the values of `key=a,b,c`."""
    key, equals, values = text.partition("=")
    if not key or not equals or not values:
        raise InputError(f"--grid: write key=a,b,c, such as server.lr=0.1,0.2, got {text!r}")
    return key.strip(), _values(key, values)


def _values(key: str, texts: str) -> list[Any]:
    """Return the values of a key, in YAML, with commas between them."""
    from fedpriv.config_files import parsed_override

    return [parsed_override(f"{key}={each}")[1] for each in texts.split(",")]
