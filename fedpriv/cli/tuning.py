"""`tune`: choose hyper-parameters on private data, and count what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedpriv.cli.common import CONFIG, ConfigPath, Overrides, file_or_folder
from fedpriv.errors import InputError, Interrupted
from fedpriv.reporting.terminal import console, print_lines

tuning_app = typer.Typer()


@tuning_app.command(epilog=CONFIG)
def tune(
    config: ConfigPath,
    overrides: Overrides = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="key=a,b,c: what a trial may have, e.g. server.lr=0.1,0.2; repeatable"),
    ] = None,
    trials: Annotated[
        str, typer.Option(help="law of the number of trials: logarithmic, geometric or poisson")
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
    """
    from fedpriv.api import Experiment
    from fedpriv.config_files import parsed_override
    from fedpriv.privacy.figures import epsilon_text
    from fedpriv.tuning import tune as tuned

    experiment = Experiment.load(config, dict(parsed_override(each) for each in overrides or []))
    values = dict(_axis(each) for each in grid or [])
    runtime = experiment.config.runtime.grid
    try:
        found = tuned(experiment, values, trials, mean, runtime, run_dir)  # type: ignore[arg-type]
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; the same command goes on") from None
    out, cost = console(), found.cost
    if found.best is None:
        out.print("no trial was drawn: there is nothing to release, and it costs the same")
    else:
        point = ", ".join(f"{key}={value}" for key, value in (found.point or {}).items())
        print_lines(out, f"best: {point}, {found.best._read.measured.told}: {found.best.path}")
    print_lines(
        out, f"all tunings there cost ε = {epsilon_text(cost.epsilon)} at δ = {cost.delta:g}"
    )


def _axis(text: str) -> tuple[str, list[Any]]:
    """Return the key and the values of `key=a,b,c`; values are YAML."""
    from fedpriv.config_files import parsed_override

    key, equals, values = text.partition("=")
    if not key or not equals or not values:
        raise InputError(f"--grid: write key=a,b,c, such as server.lr=0.1,0.2, got {text!r}")
    return key.strip(), [parsed_override(f"{key}={each}")[1] for each in values.split(",")]
