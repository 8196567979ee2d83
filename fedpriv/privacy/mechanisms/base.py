"""What a mechanism is: who adds which noise where, what it costs whom, what may be said of it.

To write one of your own, extend `CentralMechanism` (`gaussian.py`) and override `noise`. Who is
drawn, who pays and what is recorded are decided by the kinds in `registry.py` alone. `noise` is
also called before the run, for blocks of other sizes (`noise_trial.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from torch import Tensor

from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.randomness import Purpose, Randomness
from fedpriv.privacy.sampling import Adjacency, Sampling, build_sampling

if TYPE_CHECKING:  # nodes, which import this too, need no accountant
    import dp_accounting

    from fedpriv.privacy.accounts import PayerCosts
    from fedpriv.privacy.charging import Budget
    from fedpriv.privacy.ledger import Release
    from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism

#: What a deployment's server knows and writes down of who is there, which nothing covers.
HOSTED = (
    "Each node tells the server how many users it hosts and a digest of their ids, by which it is "
    "recognised. The ledger has both, under private. No ε covers them: whoever reads them knows "
    "how many users there are, and can test a guess at who all of a node's are."
)


class NoiseSource(Protocol):
    """The noise that the server adds, drawn once per release. It may remember earlier draws."""

    def draw(self, round_: int, attempt: int, gaussian: GaussianMechanism) -> Tensor:
        """Return the noise of a round's release: a new tensor, float64 `[Σ sizes + counts]`.

        For the same arguments it is the same, whatever was drawn before: a run that is resumed
        begins with a new source. `gaussian` has the clip bounds of the round.
        """
        ...


class NodeNoise(Protocol):
    """The noise that a node adds to its sum before the sum leaves it."""

    def draws(
        self,
        sizes: Sequence[int],
        secret: Randomness,
        draw: tuple[int, int],
        node: int,
        user_ids: Sequence[str],
    ) -> Iterator[Tensor]:
        """Yield what is added, one after another: float64 `[Σ sizes]` each.

        Args:
            sizes: number of coordinates of each block.
            secret: where the noise comes from.
            draw: round and attempt.
            node: the node's stable number.
            user_ids: those of its users who were drawn and are there.
        """
        ...


@dataclass(frozen=True)
class Independent:
    """Noise for blocks of `sizes` that is drawn anew for each round and attempt."""

    sizes: Sequence[int]
    randomness: Randomness

    def draw(self, round_: int, attempt: int, gaussian: GaussianMechanism) -> Tensor:
        """Return the noise at (round, attempt)."""
        generator = self.randomness.numpy(Purpose.NOISE, round_, attempt)
        return gaussian.noise(self.sizes, generator)


@dataclass(frozen=True)
class Facts:
    """What a statement may say of a run, read from its ledger and config or checked of its data.

    Attributes:
        release: the newest release of the ledger.
        sampling: how a round's cohort is drawn.
        adjacency: the adjacency under which ε holds.
        population: how many users, or silos, there are.
        delta: δ.
        deployed: whether it was a deployment.
        seed: that of a simulation.
        optimizer: the server's.
        update: how an update is bounded, in words that begin a sentence.
        gradient: the same of an example's gradient.
        feedback: what users keep of what clipping cut off, in sentences.
        who: a sentence on what a user is.
        example: what an example is, as the beginning of a sentence.
        silo_size: the public number of examples of every silo, where there is one.
        costs: what those who pay alone have spent; None where all users pay for every release.
        adversaries: RDP ε against those who see more than released models, by who they are.
        noise_from_outside: whether the server's noise is drawn by code that is not fedpriv's own.
        of_trials: whether it is a trial of a tuning, of whose others its nodes know.
    """

    release: Release
    sampling: Sampling
    adjacency: Adjacency
    population: int
    delta: float
    deployed: bool
    seed: int
    optimizer: str
    update: str
    gradient: str
    feedback: tuple[str, ...]
    who: str
    example: str
    silo_size: int | None = None
    costs: PayerCosts | None = None
    adversaries: Mapping[str, float] = field(default_factory=dict)
    noise_from_outside: bool = False
    of_trials: bool = False


#: Sentences by the key of the statement's section that they answer.
Sentences = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Mechanism:
    """Sampling and noise of a run's rounds, with what they cost and what may be said of them.

    The defaults are for independent noise that the server adds to one sum over the cohort, where
    all users pay for every release. Other mechanisms override what differs.

    Attributes:
        sampling: who takes part in a round.
        gaussian: the clip bound, and the noise of one release.
    """

    sampling: Sampling
    gaussian: GaussianMechanism

    #: Its name.
    kind: ClassVar[str]
    #: What the header of a ledger says of it: the unit of privacy, and who adds the noise.
    header: ClassVar[Mapping[str, Any]] = {"unit": "user", "noise_by": "server", "mechanism": ""}
    #: The samplings for which it has a proof.
    samplings: ClassVar[tuple[str, ...]] = ("poisson", "fixed_size", "all")
    #: Whether it also has one for bounds that adapt, users' memories, and deployments.
    proven_with: ClassVar[frozenset[str]] = frozenset({"adaptive", "memories", "deployment"})
    #: Whether the sums of nodes come with noise in them.
    in_sums: ClassVar[bool] = False
    #: Whether nodes without a user in the cohort are asked too.
    asks_all_nodes: ClassVar[bool] = False
    #: Who pays for the rounds in which it took part, and no others; None where all users pay.
    payer: ClassVar[str | None] = None
    #: Who must be trusted with what, in a sentence; None where the server is trusted.
    trust: ClassVar[str | None] = None
    #: Its label next to runs whose ε means something else or is spent in another way.
    label: ClassVar[str] = ""
    #: What the population is one of.
    members: ClassVar[str] = "users"
    #: Whose cost it is, written after a cost that is not everybody's; and what is protected.
    for_whom: ClassVar[str] = ""
    of_what: ClassVar[str] = ""
    #: Whose cost it is, written above a cost that is not everybody's.
    whose: ClassVar[str] = ""
    #: What an attacker sees of a run.
    seen: ClassVar[str] = "released model"
    #: How many take part in a round, where a schedule says it; "" for a number that is expected.
    scheduled: ClassVar[str] = ""

    # ---------------------------------------------------------------- a round

    @property
    def adjacency(self) -> Adjacency:
        """The adjacency under which ε holds."""
        return self.sampling.adjacency

    @property
    def contributions(self) -> float | None:
        """How many contributions are expected in one noisy sum; None where that is not public."""
        return self.sampling.expected_cohort

    @property
    def protected(self) -> tuple[int, str] | None:
        """Among how many δ promises something, and the key that says so; None where unknown."""
        return self.sampling.population, "population"

    @property
    def needed(self) -> int:
        """How many nodes must answer for their sums to be used."""
        return 0

    @property
    def accounts(self) -> int:
        """How many there are who may pay apart."""
        return self.sampling.population

    def at(self, bounds: Sequence[float]) -> Self:
        """Return the mechanism with other clip bounds, and noise in proportion."""
        return replace(self, gaussian=self.gaussian.at(bounds))

    def as_begun(self, first: Release) -> Self:
        """Return the mechanism of a run that goes on, whose first release on record is `first`.

        Raises:
            InputError: the record does not say enough to go on.
        """
        return self

    def of_round(self, round_: int, attempt: int, attempts: Callable[[int], int]) -> Self:
        """Return the mechanism as it is in a round.

        `attempts` returns, for an earlier round, the attempt with which it was finished.
        """
        return self

    def coins(self, round_: int, attempt: int) -> tuple[int, int]:
        """Return of which round, and which attempt at it, the randomness is that draws a cohort."""
        return round_, attempt

    def cohort(self, round_: int, generator: np.random.Generator) -> np.ndarray:
        """Return who takes part in `round_`: sorted int64 places in the population."""
        return self.sampling.draw(generator)

    def payers(self, round_: int, cohort: np.ndarray) -> tuple[int, ...] | None:
        """Return who pays for `round_`, whoever answers; None for all users."""
        return None

    def noise(
        self, sizes: Sequence[int], randomness: Randomness, attempts: Callable[[int], int]
    ) -> NoiseSource:
        """Return where the server's noise comes from, for blocks of `sizes`.

        `attempts` returns, for an earlier round, the attempt with which it was finished.
        """
        return Independent(sizes, randomness)

    def stddevs(self, blocks: int, round_: int, answers: int) -> tuple[float, ...]:
        """Return the standard deviation of the noise on each block of what `round_` released.

        `answers` are the sums of nodes that are in it. It is empty where those who are in the sums
        added noise of their own, as often as they were drawn.
        """
        return self.gaussian.block_stddevs(blocks)

    def largest_sums(self, users: int, sizes: Sequence[int]) -> tuple[float, ...]:
        """Return the largest L2 norm that each payload of a sum over `users` can have: users·C_p.

        Where nodes or users have added noise, of blocks of `sizes`, it is what an honest sum
        exceeds once in 10^12 times.
        """
        bounds = [bound for _, bound, _ in self.gaussian.payloads] or [self.gaussian.clipping.bound]
        return tuple(users * bound if users else 0.0 for bound in bounds)

    # ---------------------------------------------------------------- what it costs

    def event(self) -> dp_accounting.DpEvent:
        """Return the event of one round for whoever pays for it."""
        return self.sampling.event(self.gaussian)

    def paid(self, rounds: int) -> int:
        """Return for how many of the first `rounds` one person has to pay at most."""
        return rounds

    def charged(self, rounds: int) -> tuple[dp_accounting.DpEvent, int]:
        """Return what the first `rounds` cost whoever has to pay most: an event, and how often."""
        return self.event(), self.paid(rounds)

    def most_rounds(self, paid: int) -> int:
        """Return the largest number of rounds of which nobody pays for more than `paid`."""
        return paid

    def affordable(self, budget: Budget, rounds: int) -> int:
        """Return how many of the first `rounds` fit into `budget`, for whoever has to pay most."""
        from fedpriv.privacy.charging import affordable

        paid = affordable(self.event(), budget, self.paid(rounds))
        return min(rounds, self.most_rounds(paid))

    # ---------------------------------------------------------------- what the ledger records

    def record(self, payers: tuple[int, ...] | None) -> dict[str, Any]:
        """Return the fields of a `Release` that say how it was made and who pays."""
        bound, counts = self.gaussian.clipping.bound, self.gaussian.counts
        bounded = bound != float("inf")
        return {
            "sampling": self.sampling.kind,
            "adjacency": self.adjacency.value,
            "population": self.sampling.population,
            "expected_cohort": self.sampling.expected_cohort,
            "bound": bound if bounded else None,
            "noise_multiplier": self.gaussian.noise_multiplier,
            "sensitivity": self.adjacency.sensitivity(bound) if bounded else None,
            "stddev": self.gaussian.stddev,
            "noise_shape": "per_block" if self.gaussian.per_block else "spherical",
            "counts": counts.counts if counts else 0,
            "count_stddev": counts.stddev if counts else None,
            "payloads": self.gaussian.payloads or None,
        }

    @classmethod
    def event_of(cls, release: Release, gaussian: GaussianMechanism) -> dp_accounting.DpEvent:
        """Return the event of a `release` on record, whose noise comes to that of `gaussian`."""
        return cls.sampling_of(release).event(gaussian)

    @classmethod
    def sampling_of(cls, release: Release) -> Sampling:
        """Return how the cohort of a `release` on record was drawn."""
        cohort, adjacency = release.expected_cohort, Adjacency(release.adjacency)
        return build_sampling(release.sampling, release.population, cohort, adjacency)

    @classmethod
    def accounts_of(cls, release: Release) -> int:
        """Return how many there are who may pay apart, by a `release` on record."""
        return release.population

    @classmethod
    def in_round(cls, release: Release, round_: int) -> Release:
        """Return what a `release` on record would be in a later round that nobody has had.

        Whoever might have paid for that round pays.
        """
        return replace(release, round=round_, attempt=0, digest="")

    # ---------------------------------------------------------------- what may be said of it

    @classmethod
    def adversaries(
        cls, releases: Sequence[Release], adjacency: Adjacency, delta: float
    ) -> dict[str, float]:
        """Return the RDP ε against those who see more than models, where it differs."""
        return {}

    @classmethod
    def headline(cls, private: str) -> str:
        """Return the claim in a sentence; `private` says `(ε, δ)-differentially private`."""
        return (
            f"All models that this run released together are {private} for every user, as the "
            "assumptions below say."
        )

    @classmethod
    def unknown(cls, sampling: Sampling) -> str:
        """Return what else an attacker must not know, where ε relies on sampling."""
        return "" if sampling.kind == "all" else ", but not who was drawn,"

    @classmethod
    def a_round(cls, sampling: Sampling) -> str:
        """Return how many take part in a round, as is known beforehand."""
        return cls.scheduled or f"{sampling.expected_cohort:g}"

    @classmethod
    def drawn(cls, release: Release) -> str:
        """Return how the cohort of a `release` was drawn, in a few words."""
        if release.sampling == "all" or release.expected_cohort is None:
            return f"all {release.population:,} users"
        kind = {"poisson": "Poisson", "fixed_size": "exactly"}[release.sampling]
        return f"{kind} {release.expected_cohort:g} of {release.population:,}"

    @classmethod
    def sentences(cls, facts: Facts) -> Sentences:
        """Return the sentences of the sections of a statement that are the mechanism's own."""
        raise NotImplementedError


class PaidByTheDrawn(Mechanism):
    """Noise that those who are drawn add themselves, and that they alone pay for."""

    def payers(self, round_: int, cohort: np.ndarray) -> tuple[int, ...]:
        """Return all who were drawn."""
        return tuple(cohort.tolist())

    def stddevs(self, blocks: int, round_: int, answers: int) -> tuple[float, ...]:
        """Return nothing: how much noise there is depends on how many were drawn, and how often."""
        return ()

    @classmethod
    def sampling_of(cls, release: Release) -> Sampling:
        """Return how they were drawn; the adjacency on record is that of what each protects."""
        return build_sampling(release.sampling, release.population, release.expected_cohort)

    @classmethod
    def in_round(cls, release: Release, round_: int) -> Release:
        """Return the release of a round in which everybody might have taken part."""
        later, everybody = super().in_round(release, round_), tuple(range(release.population))
        if release.silos is None:
            return replace(later, users=everybody)
        return replace(later, silos=everybody)


# -------------------------------------------------------------------- words of several mechanisms


def dp_fedavg(facts: Facts, noise: str) -> tuple[str, ...]:
    """Return what happens to updates whose sum gets noise, which a sentence says how."""
    return (
        f"DP-FedAvg (McMahan et al. 2018): {facts.update} so that a user's contribution to a "
        "round has an L2 norm of at most C; a NaN or infinite update contributes zero.",
        *facts.feedback,
        noise,
        "The sum is divided by the expected cohort size, which is public, never by the number that "
        f"answered. The server optimizer ({facts.optimizer}) and everything after it "
        "are post-processing and cost nothing.",
    )


def count_release(release: Release) -> str:
    """Return the sentence on counts that are released beside a sum, with a space before it."""
    if not release.counts:
        return ""
    return (
        " Counts of the users within their bound are released with it, with noise of their own; z "
        "is that of both together, so the counts are paid for, and the bounds that follow them are "
        "post-processing."
    )


def worst_and_median(costs: PayerCosts, who: str) -> str:
    """Return the sentence on what those who pay alone have spent."""
    return (
        f"By RDP the worst {who} (number {costs.worst_payer}) has spent ε = "
        f"{epsilon_text(costs.worst)}, the median {who} ε = {epsilon_text(costs.median)}."
    )


def drawn_anew(sampling: Sampling, who: str) -> str:
    """Return how a round's cohort is drawn, as the beginning of a paragraph."""
    drawn = {
        "poisson": f"each {who} independently, {sampling.expected_cohort:g} expected",
        "fixed_size": f"exactly {sampling.expected_cohort:g}",
        "all": "all of them",
    }[sampling.kind]
    return f"{who.capitalize()}s are drawn anew in each round: {drawn} of {sampling.population:,}."


def own_seeds(facts: Facts, owner: str) -> tuple[str, ...]:
    """Return where noise comes from that each `owner` adds."""
    if facts.deployed:
        return (
            f"A deployment: each {owner} seeded its noise with 256 bits from its own operating "
            "system, anew for each message, and never stored them; sampling was seeded likewise at "
            "the server.",
        )
    return (
        f"A simulation with the fixed seed {facts.seed}: sampling and the noise of every "
        f"{owner} can be reproduced by anyone who knows it.",
        "That is what makes a study reproducible. In a deployment it would void the guarantee, "
        "because whoever knows the seed can subtract the noise. The ε here is what the same recipe "
        f"costs when each {owner} seeds its noise secretly.",
    )
