"""Apps of Flower's own shape, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import fedpriv
from fedpriv.federation.grids.local import LocalGrid

QUICKSTARTS = Path(fedpriv.__file__).parents[1] / "simulations" / "flower_quickstarts"


def node_of(app: ClientApp, run_config: dict[str, Any] | None = None) -> Callable[[int, int], Any]:
    """Return what makes the nodes of an app for a grid of ours, each with a state of its own."""

    def node(partition: int, partitions: int) -> Callable[[Message], Message]:
        config = {"partition-id": partition, "num-partitions": partitions}
        context = Context(1, partition, config, RecordDict(), run_config or {})
        return lambda message: app(message, context)

    return node


def quickstart(name: str, plain: bool = False) -> tuple[ServerApp, ClientApp]:
    """Return server and client of a quickstart, private or as it was before."""
    folder = str(QUICKSTARTS / name)
    if folder not in sys.path:
        sys.path.append(folder)
    before = "plain_" * plain
    server = import_module(f"{name}_app.{before}server_app").app
    return server, import_module(f"{name}_app.{before}client_app").app


def run_quickstart(name: str, nodes: int, plain: bool = False, **run_config: Any) -> LocalGrid:
    """Run a quickstart to its end."""
    server, client = quickstart(name, plain)
    settings = {key.replace("_", "-"): value for key, value in run_config.items()}
    settings["nodes"] = nodes
    grid = LocalGrid(nodes, node_of(client, settings))
    server(grid, Context(1, 0, {}, RecordDict(), settings))
    return grid
