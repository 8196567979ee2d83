"""The gate for replies: `sum_in` decides which answers of nodes count. A node is not trusted.

A reply counts only if its node was asked and has not answered yet, if it names that node's own
partition, and if its numbers can be a sum over the users that it was asked for: their type, their
shape, no NaN or infinity, and a norm of at most (users asked) × C, with as much more as noise in it
can have. In a deployment anything else, in whatever form, excludes that node from the round and
never ends the run. In a simulation a sum that does not count ends it: see `Nodes.sums`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from fedpriv.federation.hosting import NodeUsers
from fedpriv.federation.messages import FlatArray, one_line, read_only
from fedpriv.training.cohort import CohortSum
from fedpriv.training.spans import Span

# What adding up may be off by.
_ROUNDING = 2.0**-20
_MOST_NODES, _MOST_USERS = 2**20, 2**40
# flwr's ErrorCode: LOAD_CLIENT_APP_EXCEPTION and CLIENT_APP_RAISED_EXCEPTION.
CLIENT_CODE_RAISED = (1, 2)


class Refused(Exception):  # noqa: N818 - not an error of ours: a reply that does not count
    """A reply that does not count, with the reason in a few words."""


@dataclass(frozen=True)
class Asked:
    """What a node was asked for in a round.

    Attributes:
        partition: the node's number, by our own table.
        users: how many users it was asked to train.
    """

    partition: int
    users: int


@dataclass(frozen=True)
class Expected:
    """What every sum of a round must be like.

    Attributes:
        numbers: of a sum.
        blocks: of an update.
        moves: clip bounds that adapt within silos.
        largest: the largest L2 norm of each payload of a sum over so many users.
        seen: whether it comes with what its node saw, as in a simulation.
    """

    numbers: int
    blocks: int
    moves: int
    largest: Callable[[int], tuple[float, ...]]
    seen: bool


def sum_in(reply: Message, asked: Mapping[int, Asked], expected: Expected) -> tuple[int, CohortSum]:
    """Return partition and sum of a node's reply, with what the node saw.

    Raises:
        Refused: it does not count.
    """
    partition, total = total_in(reply, asked, expected)
    by_us, seen = asked[reply.metadata.src_node_id], cast(ConfigRecord, reply.content["seen"])
    return partition, _Values(seen, by_us.users, expected).summed(total)


def total_in(
    reply: Message, asked: Mapping[int, Asked], expected: Expected
) -> tuple[int, torch.Tensor]:
    """Return partition and sum of a node's reply, the sum alone: float64 `[numbers]`.

    Raises:
        Refused: it does not count.
    """
    by_us = asked.get(reply.metadata.src_node_id)
    if by_us is None:
        raise Refused("it was not asked, or has answered already")
    content = reply.content
    if set(content) != {"sum", "seen"}:
        raise Refused("its reply is no sum of users")
    seen, record = content["seen"], content["sum"]
    if not isinstance(seen, ConfigRecord) or not isinstance(record, ArrayRecord):
        raise Refused("its reply is no sum of users")
    if (claimed := seen.get("partition")) != by_us.partition or type(claimed) is not int:
        raise Refused(f"it claims to be node {claimed!r:.20}")
    total = read_only(_vector(record, expected.numbers))
    _require_norms(total, expected.largest(by_us.users))
    return by_us.partition, total


def _require_norms(total: torch.Tensor, largest: tuple[float, ...]) -> None:
    for payload, most in zip(total.chunk(len(largest)), largest, strict=True):
        norm = float(payload.norm())
        if not math.isfinite(norm):
            raise Refused("its sum is not finite")
        if norm > most * (1 + _ROUNDING):
            raise Refused(f"the norm of its sum is {norm:.4g}, and at most {most:.4g} is possible")


def unreached(reply: Message) -> bool:
    """Say whether a reply is Flower's own word that a node did not answer."""
    return reply.has_error() and reply.error.code not in CLIENT_CODE_RAISED


def hosting_in(reply: Message, asked: Container[int]) -> NodeUsers:
    """Return what a node says of itself: see `NodeUsers`.

    Raises:
        Refused: it does not count.
    """
    if (node := reply.metadata.src_node_id) not in asked:
        raise Refused("it was not asked")
    answer = reply.content.get("hosting")
    if not isinstance(answer, ConfigRecord) or len(reply.content) != 1:
        raise Refused("it does not say whom it hosts")
    numbers = [answer.get(name) for name in ("partition", "partitions", "users")]
    ids = answer.get("ids")
    if not all(type(number) is int for number in numbers) or not isinstance(ids, str):
        raise Refused("it does not say whom it hosts")
    partition, partitions, users = cast(list[int], numbers)
    if not 0 <= partition < partitions <= _MOST_NODES or not -1 <= users <= _MOST_USERS:
        raise Refused(f"it claims to be node {partition} of {partitions}, with {users} users")
    if not re.fullmatch("[0-9a-f]{64}|", ids):
        raise Refused("its digest of users is none")
    return NodeUsers(node, partition, partitions, None if users < 0 else users, ids)


def reason_in(reply: Message) -> str | None:
    """Return why a node says that it could not work, in one short line; None for an answer."""
    if reply.has_error() or "failure" not in reply.content:
        return None
    failure = reply.content["failure"]
    reason = failure.get("reason") if isinstance(failure, ConfigRecord) else None
    if not isinstance(reason, str):
        return "it does not say why"
    return one_line(reason)


def _vector(record: ArrayRecord, numbers: int) -> NDArray[np.float64]:
    """Return the one array of a record, float64 `[numbers]`, without trusting what it says."""
    if len(record) != 1 or "flat" not in record:
        raise Refused("its sum is not one array")
    array = record["flat"]
    found = array.flat if isinstance(array, FlatArray) else _read(array, numbers)
    if found.dtype != np.float64 or found.shape != (numbers,):
        raise Refused(f"its sum is {found.dtype} {list(found.shape)}, not float64 [{numbers}]")
    return found


def _read(array: Array, numbers: int) -> NDArray[Any]:
    """Return the numbers of an array that came as bytes; nothing of them is interpreted before.

    They begin as NumPy's own file of such a vector does, to the byte, whichever NumPy wrote it.
    """
    content, beginning = array.data, _beginning(numbers)
    if array.stype != "numpy.ndarray" or len(content) != len(beginning) + 8 * numbers:
        raise Refused("its sum is of another kind or length")
    if not content.startswith(beginning):
        raise Refused("its sum has another type or shape")
    return np.frombuffer(content, np.float64, offset=len(beginning))


@lru_cache(maxsize=1)
def _beginning(numbers: int) -> bytes:
    file = io.BytesIO()
    described = {"descr": "<f8", "fortran_order": False, "shape": (numbers,)}
    write_array_header_1_0(file, described)
    return file.getvalue()


@dataclass(frozen=True)
class _Values:
    """What a node says it saw, each value held against its type and range."""

    seen: ConfigRecord
    users: int
    expected: Expected

    def summed(self, total: torch.Tensor) -> CohortSum:
        blocks = self.expected.blocks
        users = self._whole("users", self.users)
        return CohortSum(
            total=total,
            users=users,
            examples=self._whole("examples"),
            skipped=self._whole("skipped"),
            non_finite=self._whole("non_finite", users),
            loss=self._number("loss"),
            norm=self._number("norm"),
            clipped=self._number("clipped", 0, users),
            block_norms=self._numbers("block_norms", blocks),
            block_clipped=self._numbers("block_clipped", blocks, 0, users),
            block_shares=self._numbers("block_shares", blocks),
            block_sent=self._numbers("block_sent", blocks),
            spans=self._spans(),
            memory_norm=self._number("memory_norm"),
            memory_reset=self._whole("memory_reset", users),
            bound_moves=self._moves(),
            alone=self._whole("alone", users),
            slowed=self._text("slowed"),
        )

    def _whole(self, name: str, most: int = 2**62) -> int:
        value = self.seen.get(name)
        if type(value) is not int or not 0 <= value <= most:
            raise Refused(f"{name} is {value!r:.20}")
        return value

    def _text(self, name: str) -> str:
        value = self.seen.get(name)
        if not isinstance(value, str):
            raise Refused(f"{name} is {value!r:.20}")
        return one_line(value) if self.expected.seen else ""

    def _number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float:
        (number,) = self._checked(name, [self.seen.get(name)], least, most)
        return number

    def _numbers(
        self, name: str, count: int, least: float = -math.inf, most: float = math.inf
    ) -> list[float]:
        values = self.seen.get(name)
        if not isinstance(values, list) or len(values) != count:
            raise Refused(f"{name} are not {count} numbers")
        return self._checked(name, values, least, most)

    def _checked(self, name: str, values: Sequence[Any], least: float, most: float) -> list[float]:
        for value in values:
            # A bound is for what is released; of what is only looked at, NaN and infinity are news.
            bounded = math.isfinite(least) or math.isfinite(most)
            if (
                type(value) not in (int, float)
                or (bounded and not least <= value <= most)
                or (type(value) is int and abs(value) >= 2**63)
            ):
                raise Refused(f"{name} has {value!r:.20}")
        return list(values)

    def _moves(self) -> list[float]:
        # Within a silo a bound is kept between 1e-20 and 1e20.
        farthest = self.users * math.log(1e40)
        return self._numbers("bound_moves", self.expected.moves, -farthest, farthest)

    def _spans(self) -> tuple[Span, ...]:
        columns = [self.seen.get(f"span_{name}s") for name in ("name", "start", "end")]
        if not self.expected.seen or not all(isinstance(column, list) for column in columns):
            return ()
        return tuple(Span(*row) for row in zip(*columns, strict=False))
