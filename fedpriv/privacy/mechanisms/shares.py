"""Distributed noise: every node adds a share, and the sum has the noise of the whole mechanism.

The setting is that of secure aggregation: somebody adds up the nodes' messages and sees nothing
but their sum (Dwork et al. 2006, "Our Data, Ourselves"; Kairouz, Liu, Steinke 2021). Independent
Gaussians add up to a Gaussian, so here nothing is lost against noise that is added centrally.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.mechanisms.base import (
    HOSTED,
    Facts,
    Mechanism,
    Sentences,
    dp_fedavg,
    own_seeds,
)
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.privacy.randomness import Purpose, Randomness
from fedpriv.privacy.sampling import Adjacency

if TYPE_CHECKING:
    from fedpriv.privacy.ledger import Release


@dataclass(frozen=True)
class NoiseShares:
    """Shares of variance σ²/(n - t): those of any n - t nodes together have at least σ².

    Attributes:
        nodes: n, the nodes that add a share each.
        lost: t, how many of them may fail to.

    Raises:
        ValueError: t is not from 0 to n - 1.
    """

    nodes: int
    lost: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.lost < self.nodes:
            raise ValueError(
                f"lost_nodes must be below the number of nodes ({self.nodes}), got {self.lost}: "
                "the shares of those that are left are all the noise there is"
            )

    @property
    def needed(self) -> int:
        """n - t, the least number of shares whose sum may be released."""
        return self.nodes - self.lost

    def draw(
        self, mechanism: GaussianMechanism, sizes: Sequence[int], generator: np.random.Generator
    ) -> Tensor:
        """Return one node's share: float64 `[Σ sizes]`, N(0, σ²/(n - t)) on each coordinate.

        σ is that of `mechanism` on each block, of `sizes` coordinates.
        """
        return mechanism.noise(sizes, generator) / math.sqrt(self.needed)


def multiplier_against_a_node(multiplier: float, needed: int) -> float | None:
    """Return the noise multiplier of a sum against a node that takes off its own share.

    Of the n - t shares that are surely there n - t - 1 remain: z·√((n - t - 1)/(n - t)). None
    where that is no noise at all.
    """
    return multiplier * math.sqrt((needed - 1) / needed) if needed > 1 else None


@dataclass(frozen=True)
class NodeShare:
    """A node's share of the noise of `gaussian`, which it adds though it has none of the users."""

    gaussian: GaussianMechanism
    shares: NoiseShares

    def draws(
        self,
        sizes: Sequence[int],
        secret: Randomness,
        draw: tuple[int, int],
        node: int,
        user_ids: Sequence[str],
    ) -> Iterator[Tensor]:
        """Yield the share, once."""
        generator = secret.numpy(Purpose.NOISE_SHARE, *draw, node)
        yield self.shares.draw(self.gaussian, sizes, generator)


@dataclass(frozen=True)
class SharedMechanism(Mechanism):
    """Nodes add the noise in shares; where too few answer, the server releases noise alone.

    Attributes:
        shares: how the noise is divided.
    """

    shares: NoiseShares

    kind = "nodes"
    header: ClassVar = {**Mechanism.header, "noise_by": "nodes"}
    label = "noise by nodes"
    in_sums = True
    asks_all_nodes = True
    trust: ClassVar[str] = (
        "Trust model: distributed noise. Each node is trusted with its own users and to add its "
        "share of the noise, and nobody with more than the sum of all nodes' messages (secure "
        "aggregation): a server that sees single messages is NOT covered."
    )

    @property
    def needed(self) -> int:
        """Of fewer nodes the shares have too little noise."""
        return self.shares.needed

    def stddevs(self, blocks: int, round_: int, answers: int) -> tuple[float, ...]:
        """Return that of the shares of all who answered, which may come to more than σ."""
        more = math.sqrt(answers / self.needed) if answers else 1.0
        return tuple(more * stddev for stddev in self.gaussian.block_stddevs(blocks))

    def largest_sums(self, users: int, sizes: Sequence[int]) -> tuple[float, ...]:
        """Return users·C and what its share of the noise may come to."""
        share = self.gaussian.largest_noise(sizes) / math.sqrt(self.needed)
        return tuple(most + share for most in super().largest_sums(users, sizes))

    def record(self, payers: tuple[int, ...] | None) -> dict[str, Any]:
        """Return the record of the central release, with how many shares have its noise."""
        return super().record(payers) | {"shares": self.needed}

    @classmethod
    def adversaries(
        cls, releases: Sequence[Release], adjacency: Adjacency, delta: float
    ) -> dict[str, float]:
        """Return what holds against a node, which knows its share, and against the server."""
        from fedpriv.privacy.adversaries import epsilon_against_a_node, epsilon_against_the_server

        against = {
            "node": epsilon_against_a_node(releases, adjacency, delta),
            "server": epsilon_against_the_server(releases, adjacency, delta),
        }
        return {viewer: epsilon for viewer, epsilon in against.items() if epsilon is not None}

    @classmethod
    def headline(cls, private: str) -> str:
        """Return the claim, with whom it leaves out."""
        return (
            f"All models that this run released together are {private} for every user, if nobody "
            "saw more than the sum of the nodes' messages, as the assumptions below say."
        )

    @classmethod
    def sentences(cls, facts: Facts) -> Sentences:
        """Return what is said of shares."""
        noise = (
            f"Each node adds Gaussian noise N(0, σ²/{facts.release.shares}) to each coordinate of "
            "its sum, also where it has none of the users, so that the sum of all has at least "
            "N(0, σ²)."
        )
        return {
            "trust": cls._who_sees_what(facts),
            "mechanism": dp_fedavg(facts, noise),
            "randomness": own_seeds(facts, "node"),
        }

    @classmethod
    def _who_sees_what(cls, facts: Facts) -> tuple[str, ...]:
        adversaries = facts.adversaries
        node = (
            "Against a node that takes its own share off, at most "
            f"ε = {epsilon_text(adversaries['node'])} by RDP for a user of another node; against "
            "several nodes together it is more."
            if "node" in adversaries
            else "Against a node nothing is promised: all the noise may be in its own share."
        )
        return (
            cls.trust,
            f"The shares of any {facts.release.shares} nodes have the full noise. Where fewer "
            "answered, nothing of theirs was used and noise alone was released. Which nodes fail "
            "must not depend on users' data.",
            "fedpriv hides no message from its own server, which adds them up: without secure "
            "aggregation in between, whoever runs that server must be trusted as with central "
            "noise.",
            "ε above is for those who see the released models and do not know who was drawn.",
            node,
            *((HOSTED,) if facts.deployed else ()),
            "The server draws the cohorts, so sampling hides nobody from it: where it sees sums "
            f"alone, at most ε = {epsilon_text(adversaries['server'])} by RDP for a user that was "
            "drawn in every round.",
        )
