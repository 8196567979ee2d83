"""Stacks of one shape that are asked of a GPU at once, instead of operation by operation.

To ask a GPU for the thousand operations of a small stack takes the host several times as long as
the GPU takes for them. A stack whose users take equally many steps of equally many rows is the same
operations on the same memory each time: they are recorded once, as a CUDA graph, and replayed with
other numbers. What they compute is the same to the bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fedpriv.privacy.clipping import add_weighted, block_norms
from fedpriv.privacy.model_deltas import ModelDeltas
from fedpriv.tasks.base import Task
from fedpriv.training.local import LocalTraining
from fedpriv.training.stacked import (
    StackedModel,
    StackedResult,
    StackedRows,
    StackedUser,
    steps_of,
    take_steps,
)
from fedpriv.transfer import moved_to

#: Does some work on the device and returns what does it again, on the same memory.
Record = Callable[[Callable[[], None]], Callable[[], None]]

# A recording keeps the memory of its stack. Longer ones take as long to make as they save.
_KEPT, _MOST_STEPS = 8, 16
# Stacks are filled up to a multiple of this part of the largest, so that few shapes are met.
_SHAPES = 8


@lru_cache(maxsize=1)
def recordings_of(stacked: StackedModel) -> Recordings:
    """Return the recordings of a model's stacks, the same ones each time."""
    return Recordings(stacked, cuda_graph)


def cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record work of the current device as a CUDA graph; it must not read anything on the host."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up in a first run
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()  # while it is recorded nothing is computed
    return graph.replay


def once(work: Callable[[], None]) -> Callable[[], None]:
    """Do work without recording it."""
    work()
    return work


class Recordings:
    """The stacks of a model that have been met more than once, each recorded."""

    def __init__(self, stacked: StackedModel, record: Record) -> None:
        self._stacked, self._record = stacked, record
        self._met: set[Hashable] = set()
        self._made: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._full = False

    def train(
        self,
        parameters: Tensor,
        users: Sequence[StackedUser],
        largest: int,
        recipe: LocalTraining,
        task: Task[Any],
        round_: int,
    ) -> StackedResult | None:
        """Train a stack as `train_stack` does; None where that is to be done.

        `largest` is how many users a stack may have. A stack is filled up with users who repeat
        the first one's rows and are left out of whatever is made of the deltas. What comes out
        depends on the stack alone, not on what was recorded before: a resumed run gets
        the same bits.
        """
        counts = {len(user.steps) for user in users}
        told_apart = task.waits or task.augments(round_) or self._stacked.draws
        if told_apart or len(counts) > 1:
            return None
        (steps,) = counts
        if steps > _MOST_STEPS:
            return None
        unit = -(-largest // _SHAPES)
        filled = min(largest, -(-len(users) // unit) * unit)
        rows = list(steps_of([*users, *[users[0]] * (filled - len(users))], task, round_))
        shapes = tuple(tensor.shape for one in rows for tensor in _tensors(one))
        key = (filled, shapes, recipe, task)
        recording = self._made.get(key)
        if recording is not None:
            self._made.move_to_end(key)
            recording.replay(parameters, rows)
            return recording.result(len(users), steps)
        make = partial(_Recording.make, self._stacked, parameters, rows, recipe, task)
        if key in self._met and not self._full:
            recording = self._recorded(key, make)
        self._met.add(key)  # a shape that comes once is not worth it
        return (recording or make(once)).result(len(users), steps)

    def _recorded(self, key: Hashable, make: Callable[[Record], _Recording]) -> _Recording | None:
        """Record a stack; None where memory does not allow it, now and from now on."""
        while len(self._made) >= _KEPT:
            self._made.popitem(last=False)
        try:
            self._made[key] = make(self._record)
        except torch.OutOfMemoryError:  # a recording's memory is its own, beside all other
            self._made.clear()
            self._full = True
            torch.cuda.empty_cache()
        return self._made.get(key)


def _tensors(rows: StackedRows) -> list[Tensor]:
    """Return all numbers of a step, in an order of their own."""
    return [rows.weights, *(one for one in vars(rows.batch).values() if isinstance(one, Tensor))]


@dataclass
class _Recording:
    """A recorded stack: what it reads, what it leaves, and how it is done again.

    Attributes:
        start, rows: what the steps read.
        deltas, losses, norms: what the steps leave: where users are, the sums of their losses and
            the norms of their blocks `[U, H]`.
        weights, chosen: `[U, H]` and boolean `[U]`, what the sum reads.
        total: what the sum leaves: float64 `[P]`.
    """

    start: Tensor
    rows: list[StackedRows]
    deltas: ModelDeltas
    losses: Tensor
    norms: Tensor
    weights: Tensor
    chosen: Tensor
    total: Tensor
    train: Callable[[], None] = lambda: None
    add: Callable[[], None] = lambda: None

    @classmethod
    def make(
        cls,
        stacked: StackedModel,
        parameters: Tensor,
        rows: list[StackedRows],
        recipe: LocalTraining,
        task: Task[Any],
        record: Record,
    ) -> _Recording:
        """Record a stack; its numbers are there as after a replay."""
        device, users, sizes = parameters.device, len(rows[0].weights), stacked.layout.sizes
        start, static = parameters.clone(), [one.to(device) for one in rows]
        stacked.start(start, users)
        norms = torch.zeros(users, len(sizes), dtype=torch.float64, device=device)
        made = cls(
            start=start,
            rows=static,
            deltas=ModelDeltas(start, stacked.parameters, sizes, users),
            losses=start.new_zeros(users),
            norms=norms,
            weights=torch.zeros_like(norms),
            chosen=torch.zeros(users, dtype=torch.bool, device=device),
            total=torch.zeros(sum(sizes), dtype=torch.float64, device=device),
        )

        def train() -> None:
            counts = [len(rows)] * users
            made.deltas, losses = take_steps(stacked, start, static, counts, recipe, task)
            made.losses.copy_(losses)
            norms.copy_(block_norms(made.deltas))

        def add() -> None:
            made.total.zero_()
            add_weighted(made.deltas, made.weights, made.chosen, made.total)

        made.train = record(train)
        made.add = record(add)
        return made

    def replay(self, parameters: Tensor, rows: Sequence[StackedRows]) -> None:
        """Train other users of the same shapes, from `parameters`."""
        self.start.copy_(parameters)
        for static, given in zip(self.rows, rows, strict=True):
            for kept, one in zip(_tensors(static), _tensors(given), strict=True):
                kept.copy_(moved_to(kept.device, one))
        self.train()

    def result(self, users: int, steps: int) -> StackedResult:
        """Return what the first `users` users have come to."""
        deltas = _RecordedDeltas(
            self.start, self.deltas.ends, self.deltas.sizes, self.deltas.users, self, users
        )
        return StackedResult(deltas, self.losses[:users] / steps)


@dataclass(frozen=True)
class _RecordedDeltas(ModelDeltas):
    """The deltas of the first `counted` users of a recording, until it is replayed."""

    recording: _Recording
    counted: int

    def norms(self) -> Tensor:
        """Return the L2 norm of each user's blocks, taken in float64: `[U, H]`."""
        return self.recording.norms[: self.counted].clone()

    def add_weighted(self, weights: Tensor, finite: Tensor, total: Tensor) -> None:
        """Add each block of the `finite` users (boolean `[U]`), times its weight, to `total`."""
        recording = self.recording
        recording.weights.zero_()[: self.counted].copy_(weights)
        recording.chosen.zero_()[: self.counted].copy_(finite)
        recording.add()
        total += recording.total
