"""`data`: which data sets there are, and what is in one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.common import (
    CONFIG,
    ConfigPath,
    LedgerFormat,
    Overrides,
    check_format,
    errors,
    file_or_folder,
)
from fedpriv.reporting.terminal import console, print_lines, saying

data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True)


@data_app.command("list")
def list_known(format: LedgerFormat = "table") -> None:
    """Print the data sets that are known by name, with their options."""
    from fedpriv.data.registry import DATASETS
    from fedpriv.reporting import data_sets
    from fedpriv.reporting.strict_json import to_json

    check_format(format, "table", "json")
    found = data_sets.known(DATASETS)
    if format == "json":
        sys.stdout.write(to_json(found))
    else:
        console().print(data_sets.known_table(found))


@data_app.command(epilog=CONFIG)
def describe(
    config: ConfigPath,
    overrides: Overrides = None,
    users: Annotated[int, typer.Option(min=1, help="the most users that are read")] = 1000,
    out: Annotated[
        Path | None,
        typer.Option(parser=file_or_folder, metavar="FILE", help="also draw it: FILE.png or .svg"),
    ] = None,
    format: LedgerFormat = "table",
) -> None:
    """Print what is in the data of CONFIG: users, sizes, classes. Most of it is private."""
    from fedpriv.config_files import load_config
    from fedpriv.data.describe import describe
    from fedpriv.data.registry import build_dataset
    from fedpriv.reporting import data_sets
    from fedpriv.reporting.strict_json import to_json

    check_format(format, "table", "json")
    if out is not None:
        data_sets.check_picture_path(out)
    loaded = load_config(config, overrides or [])
    with saying(errors, "reading users"):
        dataset = build_dataset(loaded.data, loaded.seed)
        found = describe(dataset, users, loaded.seed, loaded.data.users)
    if out is not None:
        data_sets.write_picture(found, out)
    if format == "json":
        sys.stdout.write(to_json(data_sets.document(found)))
    else:
        print_lines(console(), *data_sets.lines(found))
