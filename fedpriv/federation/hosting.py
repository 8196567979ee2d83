"""Which node hosts which user: a stable map, so that data stay cached where they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedpriv.errors import InputError

if TYPE_CHECKING:  # nodes, which import this too, need no accountant
    from fedpriv.privacy.ledger import Ledger


@dataclass(frozen=True)
class NodeUsers:
    """A node as it described itself.

    Attributes:
        node_id: Flower's id, random in every run.
        partition: the node's own stable number.
        partitions: how many nodes it takes to be there.
        users: how many users it hosts; None where it can host any (simulation).
        ids: its digest of the ids of the users that it hosts.
        first: the place of its first user in the population.
    """

    node_id: int
    partition: int
    partitions: int
    users: int | None
    ids: str = ""
    first: int = 0


@dataclass(frozen=True)
class Hosting:
    """Shares a cohort out to nodes, in the order of their partitions.

    In a simulation every node can host every user: user u belongs to node u mod nodes, and a few
    go elsewhere in a round in which that gives one node more than others, who would wait for it.
    In a deployment nodes host users of their own, who are known to the server as places in the
    population, fixed for the run, and the node numbers them from 0.
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

    def placed(self, ledger: Ledger, population: int, say: Callable[[str], None]) -> Hosting:
        """Return this hosting with the places that the ledger has for each node's users.

        A node whose users are others than before, or beyond the `population`, is left out, and the
        operator told. In a simulation, where any node trains any user, there is nothing to place.
        """
        if self._anywhere:
            return self
        placed = []
        for node in self.nodes:
            try:
                places = ledger.give_places(node.partition, node.users or 0, node.ids, population)
            except InputError as error:
                say(str(error))
            else:
                placed.append(replace(node, first=places.first))
        return Hosting(tuple(placed))

    @property
    def population(self) -> int | None:
        """Users hosted in all; None in a simulation, where the data set knows."""
        return None if self._anywhere else sum(node.users or 0 for node in self.nodes)

    @property
    def _anywhere(self) -> bool:
        return any(node.users is None for node in self.nodes)

    @property
    def node_ids(self) -> set[int]:
        """Flower's ids of the nodes."""
        return {node.node_id for node in self.nodes}

    def split(
        self, cohort: np.ndarray, at_home: bool = False
    ) -> list[tuple[NodeUsers, np.ndarray]]:
        """Return each node with the sorted user numbers, in its own numbering, that it trains.

        `at_home`: users of a simulation stay where they belong, since something of theirs is kept
        there.
        """
        if self._anywhere:
            count = len(self.nodes)
            homes = [cohort[cohort % count == i] for i in range(count)]
            return list(zip(self.nodes, homes if at_home else _evened(homes), strict=True))
        shares = []
        for node in self.nodes:
            after = node.first + (node.users or 0)
            own = cohort[(cohort >= node.first) & (cohort < after)] - node.first
            shares.append((node, own))
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
