"""A node of an audit: it hosts real users, or canaries, some of whom are not there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from flwr.app import Message, MessageType
from numpy.typing import NDArray
from torch import Tensor

from fedpriv.federation.client_app import trained
from fedpriv.federation.messages import hosting_reply, sum_reply, work_of
from fedpriv.training.cohort import CohortTrainer


@dataclass
class AuditNode:
    """Places for users, and who is there; it does what a ClientApp does, by the same functions.

    Attributes:
        trainer: trains the users of these places.
        present: boolean `[places]`; a place that is empty contributes nothing when it is sampled,
            as if its user were not in the population.
        sent: the sum that it sent last, float64 `[P]`, for the attacker, who may know the real
            users; 0 where nothing was sent since that was last read.
    """

    trainer: CohortTrainer
    present: NDArray[np.bool_]
    sent: Tensor | float = field(default=0.0, init=False)

    def answer(self, message: Message, partition: int, partitions: int) -> Message:
        """Answer as the node `partition` of so many; users are numbered node by node."""
        if message.metadata.message_type == MessageType.QUERY:
            return hosting_reply(message, partition, partitions, len(self.present))
        work = work_of(message)
        there = [user for user in work.users if self.present[user]]
        summed = trained(self.trainer, replace(work, users=there))
        self.sent = torch.as_tensor(summed.total)
        return sum_reply(message, partition, summed)
