"""Grids of our own: how messages reach the simulated nodes, in this process or over Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.serverapp import Grid

from fedpriv.config import ExperimentConfig


@contextmanager
def simulated_nodes(config: ExperimentConfig) -> Iterator[Grid]:
    """Open the grid that `runtime.grid` names, and close it when the body has ended.

    What a user's own code has brought into this process is handed to those of Ray.

    Raises:
        InputError: Ray does not start, or has no room for the nodes.
    """
    runtime = config.runtime
    if runtime.grid == "local":
        from fedpriv.federation.grids.local import LocalGrid

        yield LocalGrid(runtime.workers, threads=runtime.threads_per_worker)
        return
    from fedpriv.federation.ray_cluster import cluster, ensure_started

    with cluster(runtime):
        # Imported here: it takes a second, in which Ray starts.
        from fedpriv.federation.client_app import client_node
        from fedpriv.federation.grids.ray import RayGrid
        from fedpriv.federation.handing_over import Accepting, HandOver

        ensure_started(runtime)
        yield RayGrid(runtime, Accepting(HandOver.of(config), client_node))
