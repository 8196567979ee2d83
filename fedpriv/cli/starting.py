"""`init`: a first config."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.common import file_or_folder
from fedpriv.errors import InputError
from fedpriv.reporting.terminal import console, in_a_shell, print_lines

#: What each starter is for; the file of its name is in `fedpriv/starters`.
STARTERS = {
    "digits": "handwritten digits, which come with fedpriv",
    "pictures": "images of your own, in folders",
    "table": "a table of your own, CSV or Parquet",
    "text": "texts of your own",
    "speech": "synthetic speakers",
}
_KINDS = "; ".join(f"{name}, {what}" for name, what in STARTERS.items())

starting_app = typer.Typer()


@starting_app.command(epilog=f"KIND: {_KINDS}")
def init(
    kind: Annotated[str, typer.Argument(metavar="KIND")] = "digits",
    out: Annotated[
        Path | None,
        typer.Option(parser=file_or_folder, metavar="FILE", help="default: KIND.yaml here"),
    ] = None,
) -> None:
    """Write a first config, with a word on each key that you will want to change."""
    if kind not in STARTERS:
        raise InputError(f"KIND: write one of {', '.join(STARTERS)}, not {kind}")
    path = out or Path(f"{kind}.yaml")
    starter = (files("fedpriv") / "starters" / f"{kind}.yaml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter)
    except FileExistsError:
        raise InputError(f"{path} is there already; name another file with --out") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})") from None
    name = in_a_shell(path)
    print_lines(
        console(),
        f"wrote {path}: {STARTERS[kind]}",
        f"check it: fedpriv config validate {name}",
        f"train it: fedpriv run {name}",
    )
