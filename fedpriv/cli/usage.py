"""What is said of a command line that cannot be read, beyond what click and typer say."""

from __future__ import annotations

import re
from typing import Any

import click
from typer.core import TyperGroup

_EXTRA = re.compile(r"unexpected extra arguments? \((?P<given>.*)\)")


class Commands(TyperGroup):
    """All commands; those below are read while this one is invoked."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error of usage says what to write instead."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            # Newer versions of click suggest a command as they print it, after typer has done so.
            mend = _mend(error)
            if mend or "Did you mean" in error.message:
                raise click.UsageError(error.message + mend, error.ctx) from None
            raise


def _mend(error: click.UsageError) -> str:
    """Return what to write in place of arguments that are settings; "" where there are none."""
    parameters = error.ctx.command.params if error.ctx is not None else []
    found = _EXTRA.search(error.message)
    if found is None or not any("--set" in each.opts for each in parameters):
        return ""
    settings = [word for word in found["given"].split() if re.match(r"[\w.]+=", word)]
    return f"; write --set {' --set '.join(settings)}" if settings else ""
