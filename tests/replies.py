"""What nodes answered, read as the server reads it, whatever it expected."""

from __future__ import annotations

import math

from flwr.app import Message

from fedpriv.federation.gate import Asked, Expected, hosting_in, sum_in
from fedpriv.federation.hosting import NodeUsers
from fedpriv.training.cohort import CohortSum


def sum_of(reply: Message) -> tuple[int, CohortSum]:
    """Partition and sum of a reply to a train message."""
    seen = reply.content["seen"]
    expected = Expected(
        numbers=reply.content["sum"]["flat"].shape[0],
        blocks=len(seen["block_norms"]),
        moves=len(seen["bound_moves"]),
        largest=lambda users: (math.inf,),
        seen=True,
    )
    asked = {reply.metadata.src_node_id: Asked(seen["partition"], 2**40)}
    return sum_in(reply, asked, expected)


def hosting_of(reply: Message) -> NodeUsers:
    """What a node says of itself."""
    return hosting_in(reply, [reply.metadata.src_node_id])
