"""A node of an audit: it hosts real users, or canaries, some of whom are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message, MessageType
from numpy.typing import NDArray
from torch import Tensor

from fedpriv.federation.client_app import trained
from fedpriv.federation.messages import Work, hosting_reply, sum_reply, work_of
from fedpriv.training.cohort import CohortSum, CohortTrainer
from fedpriv.training.memory_store import (
    Journal,
    Memories,
    MemoryFormat,
    MemoryStore,
    RoundMemories,
)


class _Kept:
    """What the users of one node keep between rounds, in a store of its own."""

    def __init__(self, folder: Path, format_: MemoryFormat, ram_bytes: int) -> None:
        self._store = MemoryStore(folder, format_)
        self._memories = Memories(folder, ram_bytes)

    @contextmanager
    def round(self, round_: int) -> Iterator[RoundMemories]:
        """Give access in a round; what users write is then what they keep: none is run again."""
        for before in range(self._store.round + 1, round_):  # in which nobody was asked
            self._store.commit(before, ())
        journal = Journal(round_, 0, 0, self._store.session)
        with self._memories.round(journal) as memories:
            yield memories
        self._store.commit(round_, [journal])


@dataclass
class AuditNode:
    """Places for users, and who is there; it does what a ClientApp does, by the same functions.

    Attributes:
        trainer: trains the users of these places.
        present: boolean `[places]`; a place that is empty contributes nothing when it is sampled,
            as if its user were not in the population.
        sent: the sum that it sent last, float64 `[P·vectors]`, for the attacker, who may know the
            real users; 0 where nothing was sent since that was last read.
    """

    trainer: CohortTrainer
    present: NDArray[np.bool_]
    sent: Tensor | float = field(default=0.0, init=False)

    _kept: _Kept | None = field(default=None, init=False)

    def keep_in(self, folder: Path, format_: MemoryFormat, ram_bytes: int) -> None:
        """Let users keep what they keep between rounds in a new `folder`."""
        self._kept = _Kept(folder, replace(format_, population=len(self.present)), ram_bytes)

    def answer(self, message: Message, partition: int, partitions: int) -> Message:
        """Answer as the node `partition` of so many; users are numbered node by node."""
        if message.metadata.message_type == MessageType.QUERY:
            return hosting_reply(message, partition, partitions, len(self.present))
        work = work_of(message)
        there = [user for user in work.users if self.present[user]]
        summed = self._trained(replace(work, users=there))
        self.sent = torch.as_tensor(summed.total)
        return sum_reply(message, partition, summed)

    def _trained(self, work: Work) -> CohortSum:
        if self._kept is None:
            return trained(self.trainer, work)
        with self._kept.round(work.round) as memories:
            return trained(self.trainer, work, memories)
