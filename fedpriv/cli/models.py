"""`export` and `predict`: a run's model, for others and for one input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fedpriv.cli.common import errors, file_or_folder
from fedpriv.reporting.terminal import console, print_lines, working

if TYPE_CHECKING:
    from fedpriv.experiment import Which

models_app = typer.Typer()

RunPath = Annotated[Path, typer.Argument(parser=file_or_folder, metavar="RUN")]

#: `--round`: which of a run's models.
RoundOption = Annotated[
    str | None,
    typer.Option(
        "--round",
        metavar="last|best",
        help="which model; by default the best where evaluation.keep_best kept it",
    ),
]


@models_app.command(epilog="RUN: the folder of a run")
def export(
    run: RunPath,
    to: Annotated[
        str, typer.Option("--to", help="safetensors, torch, onnx, hf or registry")
    ] = "safetensors",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=file_or_folder,
            metavar="FOLDER",
            help="a folder that is not there yet; by default one in the run's",
        ),
    ] = None,
    round: RoundOption = None,
) -> None:
    """Write a model of RUN, with a card that says what it cost whom.

    --to registry writes, of a deployment, an entry for the DP Deployments Registry instead.
    """
    from fedpriv.export import export

    with working(errors, "exporting"):
        written = export(run, to, out, cast("Which | None", round))
    print_lines(errors, f"exported: {written}")


@models_app.command(epilog="RUN: the folder of a run. INPUT: an image, a sound, .npy, or a text")
def predict(
    run: RunPath,
    what: Annotated[str, typer.Argument(metavar="INPUT")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="text: how many to add")] = 32,
    round: RoundOption = None,
) -> None:
    """Print what a model of RUN makes of INPUT."""
    from fedpriv.predict import predict

    with working(errors, "reading the model"):
        answers = predict(run, what, tokens, cast("Which | None", round))
    print_lines(console(), *answers)
