"""Random allocation: each user takes part in exactly one of every t rounds.

So many rounds are a block, which is one event. A round draws those who were allocated to it when
its block began. The first round of a block pays for all of them, so the others cost nothing more. A
round that is drawn afresh begins a block of its own: what was released of the block before it is a
part of that one, which is paid for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from fedpriv.privacy.mechanisms.base import (
    Facts,
    Mechanism,
    Sentences,
    count_release,
    dp_fedavg,
)
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism, central_trust
from fedpriv.privacy.sampling import Adjacency, RandomAllocation, Sampling, build_sampling

if TYPE_CHECKING:
    import dp_accounting

    from fedpriv.privacy.ledger import Release


@dataclass(frozen=True)
class AllocatedMechanism(Mechanism):
    """The server adds independent noise, and who takes part was decided when a block began.

    Attributes:
        begun: the round, and the attempt, with which the block of the round began.
        slot: the round's place in its block, from 1.
    """

    begun: tuple[int, int] = (1, 0)
    slot: int = 1

    kind = "allocated"
    header: ClassVar = {**Mechanism.header, "mechanism": "allocated"}
    samplings = ("random_allocation",)
    proven_with = frozenset({"adaptive"})
    label = "random allocation"

    @property
    def block(self) -> int:
        """t, the rounds of a block."""
        assert isinstance(self.sampling, RandomAllocation)
        return self.sampling.rounds

    def of_round(self, round_: int, attempt: int, attempts: Callable[[int], int]) -> Self:
        """Return the mechanism as it is in `round_`, whose block began with it or before it."""
        begun = 1
        for earlier in range(2, round_ + 1):
            afresh = attempt if earlier == round_ else attempts(earlier)
            if afresh > 0 or earlier - begun == self.block:
                begun = earlier
        thrown = attempt if begun == round_ else attempts(begun)
        return replace(self, begun=(begun, thrown), slot=round_ - begun + 1)

    def coins(self, round_: int, attempt: int) -> tuple[int, int]:
        """Return the round and the attempt with which its block began."""
        return self.begun

    def cohort(self, round_: int, generator: np.random.Generator) -> np.ndarray:
        """Return those who were allocated to the round."""
        assert isinstance(self.sampling, RandomAllocation)
        return np.flatnonzero(self.sampling.allocated(generator) == self.slot - 1)

    def paid(self, rounds: int) -> int:
        """Return ⌈rounds / t⌉, the blocks that begin in them."""
        return -(-rounds // self.block)

    def most_rounds(self, paid: int) -> int:
        """Return t times `paid`."""
        return paid * self.block

    def record(self, payers: tuple[int, ...] | None) -> dict[str, Any]:
        """Return the record of a release, with its place in its block."""
        return super().record(payers) | {"separation": self.block, "slot": self.slot}

    @classmethod
    def event_of(cls, release: Release, gaussian: GaussianMechanism) -> dp_accounting.DpEvent:
        """Return the event of a whole block for its first release, and nothing for the others."""
        if release.slot == 1:
            return cls.sampling_of(release).event(gaussian)
        import dp_accounting

        return dp_accounting.NoOpDpEvent()

    @classmethod
    def sampling_of(cls, release: Release) -> Sampling:
        """Return how the cohort of a `release` on record was drawn."""
        adjacency = Adjacency(release.adjacency)
        return build_sampling(
            release.sampling, release.population, None, adjacency, release.separation
        )

    @classmethod
    def in_round(cls, release: Release, round_: int) -> Release:
        """Return the release of a later round, in its place of the blocks that follow."""
        assert release.slot is not None
        assert release.separation is not None
        slot = (release.slot - 1 + round_ - release.round) % release.separation + 1
        return replace(super().in_round(release, round_), slot=slot)

    @classmethod
    def drawn(cls, release: Release) -> str:
        """Return how the cohort of a `release` was drawn, in a few words."""
        return f"each of {release.population:,} in one of {release.separation} rounds"

    @classmethod
    def sentences(cls, facts: Facts) -> Sentences:
        """Return who must be trusted, where the noise is added, and who takes part when."""
        noise = (
            "Gaussian noise N(0, σ²) is added once, centrally, to each coordinate of the sum, at "
            f"full strength whoever dropped out.{count_release(facts.release)}"
        )
        return {
            "trust": central_trust(facts),
            "mechanism": dp_fedavg(facts, noise),
            "sampling": _sampling(facts.release),
        }


def _sampling(release: Release) -> tuple[str, ...]:
    return (
        "Random allocation (balls in bins; Chua et al. 2024; Feldman, Shenfeld 2026): for every "
        f"user the server draws one round of each block of {release.separation}, uniformly, "
        "independently of all others and anew for each block, and the user takes part in no other "
        "round of it. A round that is drawn afresh begins a block of its own, which is paid for.",
        "The first round of a block pays for all of it, also where the run ends within it; the "
        "allocation that was run is the one that is accounted.",
        "A block's Rényi divergences are fedpriv's own; its privacy loss distribution, where one "
        "is given, PLD_accounting's. dp-accounting composes blocks.",
        "Amplification holds against those who do not know in which round a user took part. Users "
        "who were drawn and did not answer contributed zero.",
    )
