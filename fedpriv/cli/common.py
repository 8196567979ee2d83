"""What commands share: options, and how they speak to whoever runs them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fedpriv.errors import FedprivError, InputError, Interrupted
from fedpriv.reporting.terminal import console, one_line, print_lines

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, e.g. privacy.delta=1e-6; repeatable")
]


def file_or_folder(text: str) -> Path:
    """Return a path of the command line, where a shell leaves `--run=~/x` as it is."""
    from fedpriv.sections import user_path

    return user_path(Path(text))


# Arguments have no help of their own: the pinned versions of typer and click lose it.
CONFIG = "CONFIG: a config in YAML"
ConfigPath = Annotated[Path, typer.Argument(parser=file_or_folder, metavar="CONFIG")]
LedgerFormat = Annotated[str, typer.Option("--format", help="table or json")]


#: What is beside the result of a command.
errors = console(stderr=True)


def check_format(value: str, *formats: str) -> None:
    """Check what --format says.

    Raises:
        InputError: it is none of `formats`.
    """
    if value not in formats:
        raise InputError(f"--format: write {', '.join(formats[:-1])} or {formats[-1]}, not {value}")


def say(notes: Iterable[str]) -> None:
    """Print notes beside the result."""
    print_lines(errors, *(f"note: {note}" for note in notes))


def tell(error: FedprivError) -> None:
    """Say why a command ended."""
    if isinstance(error, Interrupted):
        print_lines(errors, str(error))
    else:
        complain(str(error))


def complain(reason: str) -> None:
    """Say what is wrong, in one line."""
    print_lines(errors, Text.assemble(("error:", "bold red"), f" {one_line(reason)}"))


def abandon() -> None:
    """End at once: a Ray that starts would be waited for, and its processes end with this one."""
    print_lines(errors, "abandoned")
    os._exit(Interrupted.exit_code)
