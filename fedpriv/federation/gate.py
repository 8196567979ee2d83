"""The gate for replies: a node is not trusted, and what it sends counts only if it can be true.

A reply counts once, only from a node that was asked, under the number that the server knows the
node by, and with a sum that as many users as were asked can have. Anything else loses that node
for the round. No reply ends a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import Message

from fedpriv.federation.messages import sum_of
from fedpriv.privacy.clipping import PayloadClipping
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.training.cohort import CohortSum

# Of a sum of contributions that are each within their bound, for rounding.
_SLACK = 1 + 1e-6


@dataclass(frozen=True)
class Gate:
    """What can come back from the nodes that were asked in a round.

    Attributes:
        asked: by a node's id, its number and of how many users it was asked for the sum.
        mechanism: that of the round: its bounds, and whether sums come with noise in them.
        sizes: of the blocks of what a user sends, one payload after another.
        blocks: how many of them are those of the update.
        bounds: how many bounds adapt.
        say: tells the operator, in a sentence, of a node that is lost.
    """

    asked: Mapping[int, tuple[int, int]]
    mechanism: Mechanism
    sizes: Sequence[int]
    blocks: int
    bounds: int
    say: Callable[[str], None]

    def taken(self, replies: Iterable[Message]) -> dict[int, CohortSum]:
        """Return the sums that count, by the nodes' numbers, in their order."""
        found: dict[int, CohortSum] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in self.asked or self.asked[node][0] in found:
                self.say(f"node {node} sent a sum for which nobody had asked; it does not count")
                continue
            partition, users = self.asked[node]
            try:
                claimed, summed = sum_of(reply)
                problem = self._problem(summed, users)
            except Exception as error:  # whatever can be wrong with what another machine wrote
                problem = f"it cannot be read ({type(error).__name__})"
            else:
                if claimed != partition:
                    problem = f"it is called that of node {claimed}"
            if problem is None:
                found[partition] = summed
            else:
                self.say(f"node {partition} is lost for this round: of its sum, {problem}")
        return dict(sorted(found.items()))

    def _problem(self, summed: CohortSum, users: int) -> str | None:
        """Return why a sum cannot be one of `users` users; None where it can."""
        if summed.total.dtype != torch.float64 or summed.total.shape != (sum(self.sizes),):
            return f"it is {summed.total.dtype} {list(summed.total.shape)}"
        # Any number that is not finite makes the sum so.
        if not math.isfinite(float(summed.total.sum())):
            return "it is not finite"
        if not self._counts_are_possible(summed, users):
            return f"what it counts is not what {users} users can be"
        if not self.mechanism.in_sums and not self._is_within_bounds(summed, users):
            return f"it is larger than {users} users within their bound can make it"
        return None

    def _counts_are_possible(self, summed: CohortSum, users: int) -> bool:
        """Say whether what a node counted lies where it can: bounds that adapt follow it.

        Of losses and norms, which nothing follows, one user's may well be infinite.
        """
        per_block = (summed.block_norms, summed.block_clipped)
        counts = [summed.non_finite, summed.clipped, *summed.block_clipped]
        return (
            0 <= summed.users <= users
            and all(len(each) == self.blocks for each in per_block)
            and all(0 <= each <= summed.users * _SLACK for each in counts)
            and len(summed.bound_moves) == (self.bounds if self.mechanism.payer == "silo" else 0)
            and all(math.isfinite(each) for each in summed.bound_moves)
        )

    def _is_within_bounds(self, summed: CohortSum, users: int) -> bool:
        """Say whether as many contributions can come to the sum; noise would hide it."""
        clipping = self.mechanism.gaussian.clipping
        rules = clipping.rules if isinstance(clipping, PayloadClipping) else (clipping,)
        return not any(
            float(torch.linalg.vector_norm(part)) > users * rule.bound * _SLACK
            for part, rule in zip(summed.total.chunk(len(rules)), rules, strict=True)
        )
