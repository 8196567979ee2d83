"""`deploy` and `node`: a federation of real nodes, before its first round."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.common import CONFIG, ConfigPath, Overrides, errors, file_or_folder, say
from fedpriv.reporting.terminal import one_line, print_lines, working

deploy_app = typer.Typer(help="Prepare a federation of real nodes.", no_args_is_help=True)
node_app = typer.Typer(help="Look at a node of a federation.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(parser=file_or_folder, metavar="PATH", help="a new folder")]


@deploy_app.command(epilog=CONFIG)
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="number of nodes")] = 3,
    out: Out = Path("deployment"),
    tls: Annotated[bool, typer.Option(help="certificates, and a key for each node")] = True,
    host: Annotated[
        list[str] | None,
        typer.Option(help="name or address of the gateway for nodes elsewhere; repeatable"),
    ] = None,
    days: Annotated[int, typer.Option(help="for how long certificates are valid")] = 365,
) -> None:
    """Deal CONFIG's users to nodes, and write policies, keys and Compose files."""
    from fedpriv.config_files import load_config
    from fedpriv.deploy.prepare import Wanted, prepare_deployment

    wanted = Wanted(nodes, out, tls, tuple(host or ()), days)
    plan = prepare_deployment(
        load_config(config, overrides or []), wanted, lambda line: print_lines(errors, line)
    )
    say(plan.advice())
    print(f"{one_line(str(out))}: ready; next: cd {one_line(str(out))} && docker compose up -d")


@node_app.command(epilog=CONFIG)
def check(
    config: ConfigPath,
    policy: Annotated[
        Path, typer.Option(parser=file_or_folder, metavar="PATH", help="the node's policy")
    ],
    superlink: Annotated[
        str | None, typer.Option(help="host:port that the node will connect to")
    ] = None,
    root_certificates: Annotated[
        Path | None,
        typer.Option(parser=file_or_folder, metavar="PATH", help="as of the SuperNode; for TLS"),
    ] = None,
    nodes: Annotated[int, typer.Option(help="num-partitions of the node's config")] = 0,
) -> None:
    """Say whether this node can serve CONFIG: policy, data, model, ledger, disk, link.

    What it prints is about the node's users: it is for whoever runs the node.
    """
    from fedpriv.deploy.check import NodeCheck, versions
    from fedpriv.errors import InputError

    asked, bad = NodeCheck(config, policy, superlink, root_certificates, nodes), 0
    for found in asked.findings(lambda about: working(errors, f"checking: {about}")):
        said = f"{found.about:12}{'ok   ' if found.good else 'BAD  '}{one_line(found.sentence)}"
        print(said, flush=True)  # a pipe would keep it until the last one
        bad += not found.good
    print(f"{'versions':12}     {versions()}")
    if bad:
        raise InputError(f"this node cannot serve {one_line(str(config))}: {bad} to mend")
