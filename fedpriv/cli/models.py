"""`export` and `predict`: a run's model, for others and for one input."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.common import errors, file_or_folder
from fedpriv.reporting.terminal import console, print_lines

models_app = typer.Typer()

RunPath = Annotated[Path, typer.Argument(parser=file_or_folder, metavar="RUN")]


@models_app.command(epilog="RUN: the folder of a run")
def export(
    run: RunPath,
    to: Annotated[str, typer.Option("--to", help="safetensors, torch, onnx or hf")] = "safetensors",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=file_or_folder,
            metavar="FOLDER",
            help="a folder that is not there yet; by default one in the run's",
        ),
    ] = None,
) -> None:
    """Write the last model of RUN, with a card that says what it cost whom."""
    from fedpriv.export import export

    print_lines(errors, f"exported: {export(run, to, out)}")


@models_app.command(epilog="RUN: the folder of a run. INPUT: an image, a sound, .npy, or a text")
def predict(
    run: RunPath,
    what: Annotated[str, typer.Argument(metavar="INPUT")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="text: how many to add")] = 32,
) -> None:
    """Print what the last model of RUN makes of INPUT."""
    from fedpriv.predict import predict

    print_lines(console(), *predict(run, what, tokens))
