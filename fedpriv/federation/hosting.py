"""Which node hosts which user: a stable map, so that data stay cached where they are used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpriv.errors import InputError


@dataclass(frozen=True)
class NodeUsers:
    """A node as it described itself.

    Attributes:
        node_id: Flower's id, random in every run.
        partition: the node's own stable number.
        partitions: how many nodes it takes to be there.
        users: how many users it hosts; None where it can host any (simulation).
    """

    node_id: int
    partition: int
    partitions: int
    users: int | None


@dataclass(frozen=True)
class Hosting:
    """Shares a cohort out to nodes, in the order of their partitions.

    In a simulation every node can host every user: user u belongs to node u mod nodes, and a few
    go elsewhere in a round in which that gives one node more than others, who would wait for it.
    In a deployment nodes host users of their own, which are numbered node by node, so a node's
    users are known to the server as a count alone.
    """

    nodes: tuple[NodeUsers, ...]

    @classmethod
    def of(cls, nodes: list[NodeUsers]) -> Hosting:
        """Return the hosting by `nodes`, whatever order they answered in.

        Raises:
            InputError: two nodes have one number, or they disagree on how many there are: the
                same user could then be trained twice in a round, and add up to 2C.
        """
        numbers = sorted(node.partition for node in nodes)
        totals = {node.partitions for node in nodes}
        if len(set(numbers)) < len(numbers) or len(totals) > 1 or numbers[-1] >= min(totals):
            raise InputError(
                f"nodes must have partition-id 0 to num-partitions - 1, each once, and agree on "
                f"num-partitions; got partition-ids {numbers} of {sorted(totals)}"
            )
        return cls(tuple(sorted(nodes, key=lambda node: node.partition)))

    @property
    def population(self) -> int | None:
        """Users hosted in all; None in a simulation, where the data set knows."""
        counts = [node.users for node in self.nodes]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def node_ids(self) -> set[int]:
        """Flower's ids of the nodes."""
        return {node.node_id for node in self.nodes}

    def shares(
        self, cohort: np.ndarray, at_home: bool = False
    ) -> list[tuple[NodeUsers, np.ndarray]]:
        """Return each node with the sorted user numbers, in its own numbering, that it trains.

        `at_home`: users of a simulation stay where they belong, since something of theirs is kept
        there.
        """
        if self.population is None:
            count = len(self.nodes)
            homes = [cohort[cohort % count == i] for i in range(count)]
            return list(zip(self.nodes, homes if at_home else _evened(homes), strict=True))
        first = 0
        shares = []
        for node in self.nodes:
            after = first + (node.users or 0)
            own = cohort[(cohort >= first) & (cohort < after)] - first
            shares.append((node, own))
            first = after
        return shares


def _evened(shares: list[np.ndarray]) -> list[np.ndarray]:
    """Return shares whose sizes differ by at most one, with as few users moved as that takes."""
    each, left = divmod(sum(len(share) for share in shares), len(shares))
    largest = sorted(range(len(shares)), key=lambda i: (-len(shares[i]), i))
    wanted = {i: each + (rank < left) for rank, i in enumerate(largest)}
    moved = np.concatenate([share[wanted[i] :] for i, share in enumerate(shares)])
    evened = []
    for i, share in enumerate(shares):
        lacking = max(0, wanted[i] - len(share))
        kept, moved = np.concatenate([share[: wanted[i]], moved[:lacking]]), moved[lacking:]
        evened.append(np.sort(kept))
    return evened
