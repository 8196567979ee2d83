"""`methods`: what a config can name."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpriv.cli.common import check_format
from fedpriv.reporting.terminal import console, print_lines

methods_app = typer.Typer()


@methods_app.command(epilog="KIND: such as algorithm, clipping, normalize, optimizer, mechanism")
def methods(
    kind: Annotated[str | None, typer.Argument(metavar="KIND")] = None,
    refusals: Annotated[
        bool, typer.Option("--refusals", help="what cannot be chosen, with the reasons")
    ] = False,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="which pairs of settings are refused, as Markdown")
    ] = False,
    format: Annotated[str, typer.Option("--format", help="text or json")] = "text",
) -> None:
    """List what a config can name, with source, options, and what is kept for each parameter."""
    from fedpriv.reporting.methods import methods
    from fedpriv.reporting.strict_json import to_json

    if pairs:
        from fedpriv.reporting.refusals import table

        typer.echo(table(), nl=False)
        return
    check_format(format, "text", "json")
    found = methods(kind, refusals)
    if format == "json":
        typer.echo(to_json([method.document() for method in found]))
        return
    for method in found:
        told = method.refused or ", ".join(
            f"{k}={v}" if v else k for k, v in method.options.items()
        )
        kept = f"  [keeps {method.memory}]" if method.memory else ""
        line = f"{method.key}: {method.name}  ({method.reference})  {told}".rstrip() + kept
        print_lines(console(), line)
