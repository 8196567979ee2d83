"""The simulation: Flower's runtime and Ray workers, in this process, around our strategy."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from flwr.app import ConfigRecordValues, Context, Message
from flwr.server.superlink.fleet.vce import vce_api
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedpriv.config import RuntimeConfig
from fedpriv.errors import WorkerLost
from fedpriv.federation.client_app import app as client_app
from fedpriv.federation.in_transit import folder_in_transit
from fedpriv.federation.ray_cluster import ensure_started
from fedpriv.federation.replacing import replaced
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.training.device import keep_freed_memory

# Losses with fewer rounds between them count as one series, which ends the run when it is long.
_ROUNDS_OF_A_HEALTHY_START = 3
_MOST_RESTARTS = 4


def simulate(strategy: PrivateFedAvg, runtime: RuntimeConfig) -> None:
    """Run the strategy's remaining rounds over simulated nodes, one Ray worker each.

    Flower keeps a dead Ray worker in its pool for ever, so after a loss the round is finished
    without its users and the simulation is started again with fresh workers; the strategy goes on
    with the next round.

    Raises:
        WorkerLost: workers died again and again with hardly a round between.
        What `PrivateFedAvg.start` raises.
    """
    # Flower's own log lines stay off the terminal unless something breaks.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    keep_freed_memory()
    with folder_in_transit() as folder:
        # The workers of a named cluster may be on other machines.
        strategy.shared_folder = None if runtime.ray_address else folder
        _simulate_with_restarts(strategy, runtime)


def _simulate_with_restarts(strategy: PrivateFedAvg, runtime: RuntimeConfig) -> None:
    restarts = 0
    while not strategy.finished:
        before = strategy.next_round
        try:
            _simulate_once(strategy, runtime)
        except WorkerLost as lost:
            healthy = strategy.next_round - before > _ROUNDS_OF_A_HEALTHY_START
            restarts = 1 if healthy else restarts + 1
            if restarts > _MOST_RESTARTS:
                raise WorkerLost(f"{lost}, {restarts} times in a row; is memory short?") from None
            strategy.restart()


def _simulate_once(strategy: PrivateFedAvg, runtime: RuntimeConfig) -> None:
    server_app, sent = ServerApp(), threading.Event()
    strategy.arrived = threading.Event()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy.start(_announcing(grid, sent))

    try:
        ensure_started(runtime)
        with _delivered_at_once(sent), _announced(strategy.arrived):
            run_simulation(
                server_app=server_app,
                client_app=client_app,
                num_supernodes=runtime.workers,
                backend_config=_backend(runtime),
            )
    finally:
        # Where Flower's runtime fails or is interrupted, our server thread must not wait on.
        strategy.abandon()


def _announcing(grid: Grid, sent: threading.Event) -> Grid:
    """Return `grid`, which from now on sets `sent` when messages have been sent."""
    push = grid.push_messages

    def push_messages(messages: Iterable[Message]) -> Iterable[str]:
        ids = push(messages)
        sent.set()
        return ids

    grid.push_messages = push_messages  # type: ignore[method-assign]
    return grid


@contextmanager
def _delivered_at_once(sent: threading.Event) -> Iterator[None]:
    """Let Flower's runtime look for messages as soon as they are sent.

    It looks every 0.1 s and has no setting for that; a round of a small model takes less.
    """
    look_and_wait = vce_api.add_messages_to_queue

    def eagerly(state: Any, queue: Any, nodes_mapping: Any, f_stop: threading.Event) -> None:
        look_and_wait(state, queue, nodes_mapping, cast(threading.Event, _Until(sent, f_stop)))

    with replaced(vce_api, "add_messages_to_queue", eagerly):
        yield


@contextmanager
def _announced(arrived: threading.Event) -> Iterator[None]:
    """Let Flower's runtime set `arrived` when it has stored a reply, so that nobody need poll."""
    store_replies = vce_api.put_message_into_state

    def announcing(state: Any, queue: Any, f_stop: threading.Event) -> None:
        store_replies(cast(Any, _Storing(state, arrived)), queue, f_stop)

    with replaced(vce_api, "put_message_into_state", announcing):
        yield


class _Storing:
    """Stands in for Flower's state where replies are stored."""

    def __init__(self, state: Any, arrived: threading.Event) -> None:
        self._state = state
        self._arrived = arrived

    def store_message_res(self, message: Message) -> Any:
        stored = self._state.store_message_res(message)
        self._arrived.set()
        return stored


class _Until:
    """Stands in for the event that stops Flower's loop: a wait ends with the next message too."""

    def __init__(self, sent: threading.Event, stop: threading.Event) -> None:
        self._sent = sent
        self._stop = stop

    def is_set(self) -> bool:
        return self._stop.is_set()

    def wait(self, timeout: float) -> bool:
        self._sent.wait(timeout)
        self._sent.clear()
        return self._stop.is_set()


def _backend(runtime: RuntimeConfig) -> dict[str, dict[str, ConfigRecordValues]]:
    """Return Flower's backend config; it finds Ray started, so only what an actor takes."""
    actor: dict[str, ConfigRecordValues] = {
        "num_cpus": runtime.threads_per_worker,
        "num_gpus": runtime.gpus_per_worker,
    }
    return {"client_resources": actor}
