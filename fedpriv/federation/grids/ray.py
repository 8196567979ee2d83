"""Nodes as Ray actors, one each, on this machine or on those of a cluster."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import ray
from flwr.app import ArrayRecord, Error, Message, RecordDict
from ray.exceptions import (
    ObjectStoreFullError,
    OutOfDiskError,
    RayActorError,
    RayError,
    RayTaskError,
)

from fedpriv.errors import ClientFault, InputError, WorkerLost
from fedpriv.federation.client_app import client_node
from fedpriv.federation.grids.base import FIRST_NODE, NodeFactory, OwnGrid, give_id, told
from fedpriv.runtime import RuntimeConfig

# Deaths of a node with fewer answers between them count as one series, which ends the run when it
# is long.
_ANSWERS_OF_A_HEALTHY_NODE = 3
_MOST_DEATHS = 4
# For so long one waits for a reply before one looks at the clock, and Python at its signals.
_MOMENT = 0.2
# In a cluster that was joined a machine that is cut off is given up after so many seconds. Ray
# takes longer, unless whoever started the cluster has told it otherwise.
_SILENCE = 10.0
_PULSE = "pulse"  # what answers that a node is there, while it works
_NODE_DIED = 0  # flwr's ErrorCode: UNKNOWN
# What Ray says where neither memory nor disk takes an array.
_NO_ROOM = (ObjectStoreFullError, OutOfDiskError)


class RayNode:
    """What runs in an actor."""

    def __init__(self, node: NodeFactory, partition: int, partitions: int) -> None:
        self._node = node(partition, partitions)

    def ready(self) -> None:
        """Answer, which shows that the actor is up."""

    def answer(self, message: Message, names: list[str], *records: ArrayRecord) -> Message:
        """Return the node's answer to a message, whose `records` came apart."""
        content = RecordDict(dict(message.content))
        content.update(zip(names, records, strict=True))
        message.content = content
        return self._node(message)


@dataclass
class _Place:
    """A node as the grid knows it.

    Attributes:
        partition: its number.
        actor: whoever does its work now.
        coming: resolved when the actor is up, where it took the place of another; else None.
        asked: the message that it has yet to answer, without the arrays; None for none.
        reply: what will be the answer.
        deaths: in a row.
        answers: since the last.
        pulse: will be resolved where its machine is there; None where nobody asks.
        felt: when that was asked.
    """

    partition: int
    actor: Any
    coming: Any = None
    asked: Message | None = None
    reply: Any = None
    deaths: int = 0
    answers: int = 0
    pulse: Any = None
    felt: float = 0.0


class RayGrid(OwnGrid):
    """Replies are awaited. An actor that dies loses its round and is replaced, alone.

    Arrays go into Ray's object store once, and the messages of a round to all nodes share them;
    the nodes of a machine read them there, as the server does their sums.
    """

    def __init__(self, runtime: RuntimeConfig, node: NodeFactory = client_node) -> None:
        """Start the actors on the cluster that is up.

        Raises:
            InputError: it has no room for them, for which Ray would wait.
        """
        super().__init__()
        _require_room(runtime)
        self._node, self._partitions = node, runtime.workers
        self._machines = runtime.ray_address is not None
        # Ray does not restart it: what was asked of it in between would be lost, or wait.
        options: dict[str, Any] = {
            "num_cpus": runtime.threads_per_worker,
            "num_gpus": runtime.gpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        if self._machines:
            options["concurrency_groups"] = {_PULSE: 1}
        self._actors = ray.remote(**options)(RayNode)
        self._places = {
            FIRST_NODE + number: _Place(number, self._started(number))
            for number in range(runtime.workers)
        }

    def _started(self, partition: int) -> Any:
        return self._actors.remote(self._node, partition, self._partitions)

    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes that are up; an actor that replaces another is not at once.

        Nor is it where no machine has room for it, as after the loss of one.
        """
        for place in self._places.values():
            if place.coming is not None and ray.wait([place.coming], timeout=0)[0]:
                self._came(place)
        return [node for node, place in self._places.items() if place.coming is None]

    def _came(self, place: _Place) -> None:
        coming, place.coming = place.coming, None
        try:
            ray.get(coming)
        except RayError as error:
            self._replace(place, error)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send the messages and return their ids; who has not answered its last one is replaced."""
        sent: dict[int, Any] = {}
        ids = []
        for message in messages:
            ids.append(give_id(message))
            place = self._places[message.metadata.dst_node_id]
            if place.asked is not None:
                self._replace(place, TimeoutError("it did not answer in time"))
            arrays = message.content.array_records
            for record in arrays.values():
                if id(record) not in sent:
                    sent[id(record)] = _put(record)
            rest = copy(message)
            rest.content = RecordDict(
                {name: part for name, part in message.content.items() if name not in arrays}
            )
            records = [sent[id(record)] for record in arrays.values()]
            place.asked = rest
            place.reply = place.actor.answer.remote(rest, list(arrays), *records)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Wait for a moment for the first of the replies, and return those that are there.

        Raises:
            ClientFault: a node's code raised; the exception, with its traceback, is the cause.
            WorkerLost: a node died again and again, or Ray itself has.
        """
        wanted = set(message_ids)
        waiting = {
            place.reply: place
            for place in self._places.values()
            if place.asked is not None and place.asked.metadata.message_id in wanted
        }
        if not waiting:
            return []
        there, _ = ray.wait(list(waiting), timeout=_MOMENT)
        replies = [self._answered(waiting[reply]) for reply in there]
        if self._machines and not there:
            replies += [self._given_up(place) for place in waiting.values() if self._silent(place)]
        return replies

    def _silent(self, place: _Place) -> bool:
        """Say whether the machine of a node, which was up, has not been heard of for long."""
        now = time.monotonic()
        if place.pulse is None:
            if place.answers:
                beat = place.actor.ready.options(concurrency_group=_PULSE)
                place.pulse, place.felt = beat.remote(), now
        elif ray.wait([place.pulse], timeout=0)[0]:
            place.pulse = None
        return place.pulse is not None and now - place.felt > _SILENCE

    def _given_up(self, place: _Place) -> Message:
        asked = place.asked
        assert asked is not None
        self._replace(place, TimeoutError("its machine does not answer"))
        return Message(Error(_NODE_DIED, "its machine does not answer"), reply_to=asked)

    def _answered(self, place: _Place) -> Message:
        assert place.asked is not None
        asked, place.asked = place.asked, None
        reply, place.reply = place.reply, None
        try:
            answer: Message = ray.get(reply)
        except RayTaskError as error:
            if isinstance(error.cause, _NO_ROOM):
                raise _no_room() from error
            raise ClientFault(told(error.cause)) from error
        except RayError as error:
            self._replace(place, error)
            return Message(Error(_NODE_DIED, str(error)), reply_to=asked)
        place.answers += 1
        return answer

    def _replace(self, place: _Place, error: Exception) -> None:
        """Put another actor in the place of one that is dead, or might as well be."""
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise ClientFault(f"node {place.partition} does not start: {_last_line(error)}")
        # A cluster that was joined may get other machines; one of our own gets no other.
        if not self._machines and not any(machine["Alive"] for machine in ray.nodes()):
            raise WorkerLost("Ray itself has died, and its nodes with it; is memory short?")
        healthy = place.answers > _ANSWERS_OF_A_HEALTHY_NODE
        place.deaths, place.answers = (1 if healthy else place.deaths + 1), 0
        if place.deaths > _MOST_DEATHS:
            raise WorkerLost(
                f"node {place.partition} died {place.deaths} times in a row "
                f"({_last_line(error)}); is memory short?"
            )
        ray.kill(place.actor)
        place.actor = self._started(place.partition)
        place.coming, place.pulse = place.actor.ready.remote(), None
        place.asked = place.reply = None


def _put(record: ArrayRecord) -> Any:
    try:
        return ray.put(record)
    except _NO_ROOM as error:
        raise _no_room() from error


def _no_room() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "Ray's object store")


def _require_room(runtime: RuntimeConfig) -> None:
    there = ray.cluster_resources()
    for kind, each in (("CPU", runtime.threads_per_worker), ("GPU", runtime.gpus_per_worker)):
        if not each:
            continue
        number = there.get(kind, 0.0)
        room = int(number // each if each >= 1 else number * (1 // each))
        if runtime.workers > room:
            raise InputError(
                f"runtime.workers: {runtime.workers} of {each:g} {kind} each are more than the Ray "
                f"cluster, which has {number:g}, has room for; write at most {room}"
            )


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
