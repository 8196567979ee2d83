"""The nodes of an audit, in this process: one hosts the real users, one the canaries.

They do what the ClientApp does in a Ray worker, by the same functions, and stand in for Flower's
grid, so that the true strategy drives them: sampling, clipping, sum, noise, denominator, ledger.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from uuid import uuid4

import numpy as np
import torch
from flwr.app import Message, MessageType
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray
from torch import Tensor

from fedpriv.federation.client_app import trained
from fedpriv.federation.messages import hosting_reply, sum_reply, work_of
from fedpriv.training.cohort import CohortTrainer

_FIRST_NODE_ID = 1000


@dataclass(frozen=True)
class Hosted:
    """Places for users, and who is there.

    Attributes:
        trainer: trains the users of these places.
        present: boolean `[places]`; a place that is empty contributes nothing when it is sampled,
            as if its user were not in the population.
    """

    trainer: CohortTrainer
    present: NDArray[np.bool_]


class AuditGrid:
    """A grid of nodes that answer as soon as they are asked; node i is partition i.

    Users are numbered node by node. What a node sent last, and under which bounds, is kept for the
    attacker, who may know the real users.
    """

    def __init__(self, nodes: list[Hosted]) -> None:
        self._nodes = nodes
        self._replies: list[Message] = []
        self._sums: dict[int, Tensor] = {}
        #: The clip bounds of the round where they adapt; empty where they are fixed.
        self.bounds: tuple[float, ...] = ()
        # Flower's runtime sets these before a ServerApp may make messages.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return [_FIRST_NODE_ID + partition for partition in range(len(self._nodes))]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Answer the messages and return their ids."""
        ids = []
        self._sums = {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            self._replies.append(self._answer(message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the answers that were not fetched yet."""
        replies, self._replies = self._replies, []
        return replies

    def sent_by(self, partition: int) -> Tensor | float:
        """Return the sum that a node sent in this round: float64 `[P]`; 0 if it was not asked."""
        return self._sums.get(partition, 0.0)

    def _answer(self, message: Message) -> Message:
        partition = message.metadata.dst_node_id - _FIRST_NODE_ID
        node = self._nodes[partition]
        if message.metadata.message_type == MessageType.QUERY:
            return hosting_reply(message, partition, len(self._nodes), len(node.present))
        work = work_of(message)
        there = [user for user in work.users if node.present[user]]
        summed = trained(node.trainer, replace(work, users=there))
        self.bounds = tuple(work.bounds)
        self._sums[partition] = torch.as_tensor(summed.total)
        return sum_reply(message, partition, summed)
