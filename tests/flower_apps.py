"""Apps of Flower's own shape, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import fedpriv
from fedpriv.federation.grids.local import LocalGrid
from fedpriv.flower import clipping_mod

QUICKSTARTS = Path(fedpriv.__file__).parents[1] / "simulations" / "flower_quickstarts"

START = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, dtype=np.float32)}


def start_record() -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in START.items()})


def update_of(node: int) -> dict[str, np.ndarray]:
    """What a node's training adds to the model; the larger ones are beyond the bound."""
    generator = np.random.default_rng(node)
    scale = 0.02 * (node + 1) ** 2
    return {
        name: (scale * generator.standard_normal(array.shape)).astype(np.float32)
        for name, array in START.items()
    }


def app_of(
    trained: list[int], mods: list[Any] | None = None, change: Callable[[int], Any] = update_of
) -> ClientApp:
    """An app whose node n adds `change(n)` and has n + 1 examples; `trained` says who trained."""
    app = ClientApp(mods=[clipping_mod] if mods is None else mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        trained.append(node)
        move = change(node)
        arrays = {
            name: Array(array.numpy() + move[name])
            for name, array in message.content["arrays"].items()
        }
        metrics = MetricRecord({"train_loss": 0.25 * node, "num-examples": node + 1})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


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
