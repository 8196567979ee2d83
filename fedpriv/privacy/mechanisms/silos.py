"""Noise within silos: each trains by DP-SGD on its own examples and sends what is private then.

A silo trusts nobody but itself. What happens inside one is `fedpriv.privacy.example_level`; here
is what the rounds cost it, and what may be said of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fedpriv.privacy.example_level import ExampleLevel, steps_event
from fedpriv.privacy.mechanisms.base import (
    HOSTED,
    Facts,
    Mechanism,
    PaidByTheDrawn,
    Sentences,
    drawn_anew,
    own_seeds,
    worst_and_median,
)
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.privacy.sampling import Adjacency, Sampling

if TYPE_CHECKING:
    import dp_accounting

    from fedpriv.privacy.ledger import Release


@dataclass(frozen=True)
class SiloMechanism(PaidByTheDrawn):
    """Silos add noise to every local step; a silo pays for the rounds in which it was drawn.

    Attributes:
        level: what happens inside a silo; its mechanism is `gaussian`.
    """

    level: ExampleLevel

    kind = "silos"
    header: ClassVar = {**Mechanism.header, "unit": "example"}
    in_sums = True
    payer: ClassVar[str] = "silo"
    members = "silos"
    for_whom = " for a silo that takes part in each"
    of_what = ", for one of its examples"
    whose = "each silo pays for the rounds in which it was drawn; the worst has spent:"
    #: For what a silo spends its ε, and how its steps a round are, as the beginning of a number.
    spends: ClassVar[str] = "the rounds in which it was drawn"
    most: ClassVar[str] = ""

    @classmethod
    def of(cls, sampling: Sampling, level: ExampleLevel) -> SiloMechanism:
        """Return the mechanism of silos that `sampling` draws and in which `level` happens."""
        return cls(sampling, level.mechanism, level)

    @property
    def adjacency(self) -> Adjacency:
        """That of examples within a silo."""
        return self.level.adjacency

    @property
    def contributions(self) -> float | None:
        """Those of a step."""
        return self.level.contributions

    @property
    def protected(self) -> tuple[int, str] | None:
        """The examples of a silo, where their number is public."""
        return None if self.level.silo_size is None else (self.level.silo_size, "silo_size")

    def at(self, bounds: Sequence[float]) -> Self:
        """Return the mechanism with the bounds of a round's first step."""
        level = self.level.at(bounds)
        return replace(self, gaussian=level.mechanism, level=level)

    def largest_sums(self, users: int, sizes: Sequence[int]) -> tuple[float, ...]:
        """Return no bound: the noise of many steps is in a silo's change, however it is scaled."""
        return (math.inf,)

    def event(self) -> dp_accounting.DpEvent:
        """Return the event of one round for a silo that takes part in it."""
        return self.level.event()

    def record(self, payers: tuple[int, ...] | None) -> dict[str, Any]:
        """Return the record of one round in each of the silos that pay."""
        return super().record(payers) | {
            "silos": payers,
            "sampling_rate": self.level.sampling_rate,
            "steps": self.level.steps,
        }

    @classmethod
    def event_of(cls, release: Release, gaussian: GaussianMechanism) -> dp_accounting.DpEvent:
        """Return the event for one of the silos that took part."""
        assert release.sampling_rate is not None
        assert release.steps is not None
        return steps_event(gaussian.noise_multiplier, release.sampling_rate, release.steps)

    @classmethod
    def headline(cls, private: str) -> str:
        """Return the claim for the examples of one silo."""
        return (
            f"All that any one silo sent is together {private} for every example in it, as "
            "the assumptions below say; a person with several examples is protected less."
        )

    @classmethod
    def unknown(cls, sampling: Sampling) -> str:
        """Return that samples of examples are secret."""
        return ", but not which examples were drawn,"

    @classmethod
    def drawn(cls, release: Release) -> str:
        """Return what each silo did."""
        return f"{release.steps} steps, q = {release.sampling_rate:g}, in the silos drawn"

    @classmethod
    def sentences(cls, facts: Facts) -> Sentences:
        """Return what is said of silos."""
        assert facts.costs is not None
        return {
            "unit": (
                f"{facts.example} of one of {facts.population:,} silos. Each silo "
                f"spends an ε of its own, for {cls.spends}.",
                worst_and_median(facts.costs, "silo"),
                "NOT protected: a person with several examples in a silo, whose ε grows with their "
                "number; a person with examples in several silos, who pays in each of them; and "
                "the silo itself: that it takes part, when, and what all its examples have in "
                "common.",
            ),
            "adjacency": _adjacency(facts),
            "trust": _trust(facts),
            "mechanism": _mechanism(facts, cls.most),
            "sampling": _sampling(facts),
            "delta": (
                f"δ = {facts.delta:g} holds for each silo alone and lies below one over its public "
                "number of examples.",
            ),
            **({"randomness": own_seeds(facts, "silo's node")} if facts.deployed else {}),
        }


def _adjacency(facts: Facts) -> tuple[str, ...]:
    moves = "The sum of a step then moves by up to C"
    if facts.release.counts:
        moves += ", and each of its counts, of ±1/2 for each example, by 1/2"
    if facts.adjacency is Adjacency.ZERO_OUT:
        return (
            "Zero out: one example of one silo, of known size, that is replaced by one that adds "
            "nothing.",
            f"{moves}. How many examples each silo has is public.",
        )
    if facts.adjacency is not Adjacency.ADD_OR_REMOVE_ONE:
        raise ValueError(f"no sentences for {facts.adjacency.value} of examples")
    return (
        "Add or remove one: two silos that differ in the presence of one example.",
        f"{moves}. How many examples a silo has is not public: the sum is divided by a number "
        "from the config.",
    )


def _trust(facts: Facts) -> tuple[str, ...]:
    # A deployment pays before it asks; a simulation when the sums are there.
    sent = (
        "it ever sent"
        if facts.deployed
        else "it sent in rounds that were finished, here or after a resume"
    )
    return (
        "Each silo trusts itself alone. What it sends has been private since its first local step; "
        "the server adds no noise and need not be trusted with the examples.",
        f"The guarantee of a silo covers everything that {sent}, and every model made from it.",
        *(_TRUST_DEPLOYED if facts.deployed else _TRUST_SIMULATED),
    )


_TRUST_SIMULATED = (
    "In this simulation the silos of a node run in one process and their changes are added up "
    "there, which is post-processing.",
)
_TRUST_DEPLOYED = (
    "A node adds up the changes of its silos, which is post-processing. It trains silos only where "
    "its operator gave it a policy, and then charges a ledger of its own, on its own disk, before "
    "a silo takes a step: what a silo spent in all runs is there, and not in this run's ledger.",
    HOSTED,
)


def _mechanism(facts: Facts, most: str) -> tuple[str, ...]:
    last = facts.release
    return (
        f"DP-SGD (Abadi et al. 2016) inside each silo: {most}{last.steps} steps a round, "
        f"{facts.gradient} so that an example adds a gradient of L2 norm at most C; one that is "
        "NaN or infinite adds zero.",
        f"Gaussian noise N(0, σ²), {_stddev(last)}, is added to the sum of each step, also "
        f"where a sample is empty. {_denominator(facts)}",
        *_counts(last),
        *facts.feedback,
        "A silo sends the change of its parameters. The local optimizer, the average over the "
        f"expected number of silos, and the server optimizer ({facts.optimizer}) are "
        "post-processing.",
    )


def _stddev(last: Release) -> str:
    if not last.counts or last.bound is None:
        return f"σ = {last.stddev:.4g}"
    return f"σ = {last.stddev / last.bound:.4g}·C"


def _counts(release: Release) -> tuple[str, ...]:
    if not release.counts:
        return ()
    return (
        "Counts of a step's examples within their bound are released with its sum, with noise of "
        "their own; z is that of both together, so the counts are paid for. A silo's bounds follow "
        "them from step to step, and a round starts from the bounds that the silos of the round "
        "before ended with, in geometric mean: post-processing. C and σ on record are those of a "
        "round's first step.",
    )


def _denominator(facts: Facts) -> str:
    rate = facts.release.sampling_rate
    if facts.silo_size is None or rate is None:
        return "It is divided by q·N, N being the silo's public number of examples."
    return (
        f"It is divided by q·N = {rate * facts.silo_size:g}, of public numbers "
        "alone, never by how many examples were drawn."
    )


def _sampling(facts: Facts) -> tuple[str, ...]:
    return (
        sampled_steps(facts.release),
        f"{drawn_anew(facts.sampling, 'silo')} Who was drawn is "
        "public, so no amplification is claimed for it; a silo that was drawn pays, whether or not "
        "it answered.",
    )


def sampled_steps(release: Release) -> str:
    """Return how the examples of a step are drawn."""
    return (
        "In each step a silo draws each of its examples independently with probability "
        f"q = {release.sampling_rate:g}. Amplification by this sampling holds against those "
        "who do not know what was drawn."
    )
