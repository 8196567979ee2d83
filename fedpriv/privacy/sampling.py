"""Sampling of users: the object that draws the cohort is the object that yields the event.

Each sampling states its adjacency, the sensitivity that goes with it, the public denominator of
the average, and the privacy event. Nothing else in fedpriv makes events for a round, so that no
path can train under one sampling and account for another.

dp-accounting is imported where an event is made: nodes make none, and it takes a second.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import dp_accounting
    from dp_accounting.privacy_accountant import NeighboringRelation


class Adjacency(enum.Enum):
    """Which two populations must be hard to tell apart."""

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"
    ZERO_OUT = "zero_out"

    @property
    def relation(self) -> NeighboringRelation:
        """The same relation in dp-accounting's terms."""
        from dp_accounting.privacy_accountant import NeighboringRelation

        return {
            Adjacency.ADD_OR_REMOVE_ONE: NeighboringRelation.ADD_OR_REMOVE_ONE,
            Adjacency.REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
            Adjacency.ZERO_OUT: NeighboringRelation.REPLACE_SPECIAL,
        }[self]

    def sensitivity(self, bound: float) -> float:
        """Return the L2 sensitivity of a sum of contributions of norm at most `bound`.

        One contribution comes, goes or becomes zero: C. One is exchanged for another: 2C.
        """
        return 2 * bound if self is Adjacency.REPLACE_ONE else bound


class Noisy(Protocol):
    """What an event has to know of a Gaussian mechanism."""

    @property
    def noise_multiplier(self) -> float:
        """z, the noise over the sensitivity; 0 for none."""
        ...


@dataclass(frozen=True)
class Noise:
    """A Gaussian mechanism of which no more is known than an event has to know."""

    noise_multiplier: float


class Sampling(Protocol):
    """How a round's cohort is drawn from a population of users."""

    @property
    def kind(self) -> str:
        """The name under which the sampling stands in configs and ledgers."""
        ...

    @property
    def population(self) -> int:
        """N, the number of users. Public."""
        ...

    @property
    def expected_cohort(self) -> float:
        """The expected number of sampled users: the public denominator of the average."""
        ...

    @property
    def adjacency(self) -> Adjacency:
        """The adjacency under which `event` holds."""
        ...

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Return the cohort: sorted int64 user indices, in O(cohort) time."""
        ...

    def sensitivity(self, bound: float) -> float:
        """Return the L2 sensitivity of a sum of contributions of norm at most `bound`."""
        ...

    def event(self, mechanism: Noisy) -> dp_accounting.DpEvent:
        """Return the privacy event of one release of `mechanism` over a drawn cohort."""
        ...


def _gaussian(sampling: Sampling, mechanism: Noisy) -> dp_accounting.DpEvent:
    """Return the event of the unsampled mechanism: noise over the sensitivity of the sum."""
    import dp_accounting

    if mechanism.noise_multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    # Every part of a release moves in proportion to the sensitivity for C = 1: C itself for the
    # updates, √counts/2 for the counts of adaptive clipping. So the event's multiplier is z for
    # sensitivity C, and z/2 for 2C.
    return dp_accounting.GaussianDpEvent(mechanism.noise_multiplier / sampling.sensitivity(1.0))


def _amplified(
    sampling: Sampling,
    mechanism: Noisy,
    sampled: Callable[[dp_accounting.DpEvent], dp_accounting.DpEvent],
) -> dp_accounting.DpEvent:
    """Return what `sampled` makes of the mechanism's event; without noise nothing is private."""
    import dp_accounting

    event = _gaussian(sampling, mechanism)
    return event if isinstance(event, dp_accounting.NonPrivateDpEvent) else sampled(event)


@dataclass(frozen=True)
class PoissonSampling:
    """Each user takes part independently with probability q = expected_cohort / N.

    Adding, removing or zeroing one user changes the sum by its contribution: sensitivity C.

        >>> import numpy
        >>> sampling = PoissonSampling(population=1000, expected_cohort=50)
        >>> sampling.probability, sampling.sensitivity(0.1)
        (0.05, 0.1)
        >>> len(sampling.draw(numpy.random.default_rng(0)))
        51
    """

    population: int
    expected_cohort: float
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE
    kind = "poisson"

    @property
    def probability(self) -> float:
        """q, the probability with which a user is sampled."""
        return self.expected_cohort / self.population

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Draw the binomial size first and then that many users: the same law in O(cohort)."""
        size = int(generator.binomial(self.population, self.probability))
        return _distinct(generator, self.population, size)

    def sensitivity(self, bound: float) -> float:
        """Return the adjacency's sensitivity for contributions of norm `bound`."""
        return self.adjacency.sensitivity(bound)

    def event(self, mechanism: Noisy) -> dp_accounting.DpEvent:
        """Return the Poisson-sampled Gaussian (Mironov, Talwar, Zhang 2019)."""
        import dp_accounting

        poisson = partial(dp_accounting.PoissonSampledDpEvent, self.probability)
        return _amplified(self, mechanism, poisson)


@dataclass(frozen=True)
class FixedSizeSampling:
    """Exactly `cohort` users, uniformly without replacement.

    Analysed under replace-one adjacency, where one contribution of norm C is exchanged for
    another: the sum moves by up to 2C, so the event's multiplier is z·C/(2C) = z/2.
    """

    population: int
    cohort: int
    kind = "fixed_size"
    adjacency = Adjacency.REPLACE_ONE

    @property
    def expected_cohort(self) -> float:
        """The cohort's size, which is fixed."""
        return float(self.cohort)

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Draw `cohort` distinct users."""
        return _distinct(generator, self.population, self.cohort)

    def sensitivity(self, bound: float) -> float:
        """Return 2C."""
        return self.adjacency.sensitivity(bound)

    def event(self, mechanism: Noisy) -> dp_accounting.DpEvent:
        """Return the Gaussian sampled without replacement (Wang, Balle, Kasiviswanathan 2019)."""
        import dp_accounting

        fixed = partial(
            dp_accounting.SampledWithoutReplacementDpEvent, self.population, self.cohort
        )
        return _amplified(self, mechanism, fixed)


@dataclass(frozen=True)
class FullParticipation:
    """Every user in every round: no amplification by sampling."""

    population: int
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE
    kind = "all"

    @property
    def expected_cohort(self) -> float:
        """N: the average is over everybody."""
        return float(self.population)

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Return all users."""
        return np.arange(self.population)

    def sensitivity(self, bound: float) -> float:
        """Return the adjacency's sensitivity for contributions of norm `bound`."""
        return self.adjacency.sensitivity(bound)

    def event(self, mechanism: Noisy) -> dp_accounting.DpEvent:
        """Return the plain Gaussian mechanism."""
        return _gaussian(self, mechanism)


@dataclass(frozen=True)
class MinSeparationSampling:
    """Each user takes part at most once in so many rounds, drawn as may be: no amplification.

    A mechanism puts users into as many groups by their ids, and a round draws from one of them.
    Under replace-one both persons may be in the sum, in rounds of their own: sensitivity 2C.
    """

    population: int
    expected_cohort: float
    rounds: int
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE
    kind = "min_separation"

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Throw the coins of all users, of whom a round takes those of one group."""
        return PoissonSampling(self.population, self.rounds * self.expected_cohort).draw(generator)

    def sensitivity(self, bound: float) -> float:
        """Return the adjacency's sensitivity for contributions of norm `bound`."""
        return self.adjacency.sensitivity(bound)

    def event(self, mechanism: Noisy) -> dp_accounting.DpEvent:
        """Return the plain Gaussian mechanism, for the users of the group that is drawn from."""
        return _gaussian(self, mechanism)


@dataclass(frozen=True)
class RandomAllocation:
    """Each user takes part in exactly one of every `rounds` rounds, drawn uniformly.

    Users draw independently of one another, anew for every block of so many rounds; so a round has
    a binomial number of them. What is accounted is a block (`fedpriv.privacy.allocation`).
    """

    population: int
    rounds: int
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE
    kind = "random_allocation"

    @property
    def expected_cohort(self) -> float:
        """N over the rounds of a block."""
        return self.population / self.rounds

    def allocated(self, generator: np.random.Generator) -> np.ndarray:
        """Draw which round of a block, counted from 0, each user takes part in: int64 `[N]`."""
        return generator.integers(0, self.rounds, size=self.population)

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Draw those of the first round of a block."""
        return np.flatnonzero(self.allocated(generator) == 0)

    def sensitivity(self, bound: float) -> float:
        """Return the adjacency's sensitivity for contributions of norm `bound`."""
        return self.adjacency.sensitivity(bound)

    def event(self, mechanism: Noisy) -> dp_accounting.DpEvent:
        """Return the event of all rounds of a block together."""
        from fedpriv.privacy.allocation import RandomAllocationDpEvent

        return _amplified(self, mechanism, partial(RandomAllocationDpEvent, self.rounds))


def _distinct(generator: np.random.Generator, population: int, size: int) -> np.ndarray:
    return np.sort(generator.choice(population, size=size, replace=False, shuffle=False))


#: Which adjacencies each sampling has a proof for; the first is its default.
PROVEN: dict[str, tuple[Adjacency, ...]] = {
    "poisson": (Adjacency.ADD_OR_REMOVE_ONE, Adjacency.ZERO_OUT),
    "fixed_size": (Adjacency.REPLACE_ONE,),
    "all": (Adjacency.ADD_OR_REMOVE_ONE, Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE),
    "min_separation": (Adjacency.ADD_OR_REMOVE_ONE, Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE),
    "random_allocation": (Adjacency.ADD_OR_REMOVE_ONE, Adjacency.ZERO_OUT),
}
_REFUSED = {
    ("poisson", Adjacency.REPLACE_ONE): "the accountant bounds Poisson sampling for users who "
    "come or go, not for one exchanged for another; write add_or_remove_one",
    ("fixed_size", Adjacency.ADD_OR_REMOVE_ONE): "a user more or less changes every other user's "
    "chance to be sampled; write replace_one",
    ("fixed_size", Adjacency.ZERO_OUT): "the accountant bounds sampling without replacement for "
    "replace_one alone, which covers zero_out; write replace_one",
    ("random_allocation", Adjacency.REPLACE_ONE): "the accountant bounds random allocation for "
    "users who come or go, not for one exchanged for another; write add_or_remove_one",
}


def build_sampling(
    kind: str,
    population: int,
    expected_cohort: float | None,
    adjacency: Adjacency | None = None,
    separation: int | None = None,
) -> Sampling:
    """Return the sampling called `kind`; `expected_cohort` is ignored where all take part.

    Without `adjacency` the sampling's own one holds (see `PROVEN`). `separation` is the number of
    rounds of min_separation, of whose groups everybody takes part without an `expected_cohort`,
    and of random_allocation, whose cohort follows from it.

    Raises:
        ValueError: unknown kind, a cohort that is not in (0, population], a fixed-size cohort
            that is not a whole number, or an adjacency without a proof, with the reason.
    """
    if kind not in PROVEN:
        raise ValueError(f"unknown sampling {kind!r}: write {', '.join(PROVEN)}")
    adjacency = adjacency or PROVEN[kind][0]
    if adjacency not in PROVEN[kind]:
        raise ValueError(
            f"{adjacency.value} has no proof with {kind} sampling: {_REFUSED[kind, adjacency]}"
        )
    if kind == "all":
        return FullParticipation(population, adjacency)
    if kind == "random_allocation":
        if separation is None or separation < 1:
            raise ValueError(f"random_allocation needs a number of rounds, got {separation}")
        return RandomAllocation(population, separation, adjacency)
    if kind == "min_separation" and expected_cohort is None:
        expected_cohort = population / (separation or 1)
    if expected_cohort is None or not 0 < expected_cohort <= population:
        raise ValueError(f"expected_cohort must lie in (0, {population}], got {expected_cohort}")
    if kind == "poisson":
        return PoissonSampling(population, float(expected_cohort), adjacency)
    if kind == "min_separation":
        if separation is None or separation < 1:
            raise ValueError(f"min_separation needs a number of rounds, got {separation}")
        return MinSeparationSampling(population, float(expected_cohort), separation, adjacency)
    if not math.isclose(expected_cohort, round(expected_cohort)):
        raise ValueError(f"a fixed-size cohort is a whole number, got {expected_cohort}")
    return FixedSizeSampling(population, round(expected_cohort))


def paid_rounds(rounds: int, bands: int) -> int:
    """Return ⌈rounds / b⌉: for how many the group pays that is drawn from most often."""
    return -(-rounds // bands)


def of_all_groups(sampling: Sampling, bands: int) -> Sampling:
    """Return the coins of a round that draws from one of `bands` groups; with one, `sampling`.

    Each user of the group is drawn with probability b·q, so that b·qN would be over all groups.
    With min_separation it is `sampling` itself, which has its groups.
    """
    if bands == 1 or isinstance(sampling, MinSeparationSampling):
        return sampling
    cohort = bands * sampling.expected_cohort
    return PoissonSampling(sampling.population, cohort, sampling.adjacency)
