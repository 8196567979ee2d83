"""Sampling of users: the object that draws the cohort is the object that yields the event.

Each sampling states its adjacency, the sensitivity that goes with it, the public denominator of
the average, and the privacy event. Nothing else in fedpriv makes events for a round, so that no
path can train under one sampling and account for another.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Protocol

import dp_accounting
import numpy as np
from dp_accounting.privacy_accountant import NeighboringRelation

from fedpriv.privacy.mechanisms import GaussianMechanism


class Adjacency(enum.Enum):
    """Which two populations must be hard to tell apart."""

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"

    @property
    def relation(self) -> NeighboringRelation:
        """The same relation in dp-accounting's terms."""
        return NeighboringRelation[self.name]


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

    def event(self, mechanism: GaussianMechanism) -> dp_accounting.DpEvent:
        """Return the privacy event of one release of `mechanism` over a drawn cohort."""
        ...


def _gaussian(sampling: Sampling, mechanism: GaussianMechanism) -> dp_accounting.DpEvent:
    """Return the event of the unsampled mechanism: noise over the sensitivity of the sum."""
    if mechanism.noise_multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    # Every part of a release moves in proportion to the sensitivity for C = 1: C itself for the
    # updates, √counts/2 for the counts of adaptive clipping.
    return dp_accounting.GaussianDpEvent(mechanism.noise_multiplier / sampling.sensitivity(1.0))


@dataclass(frozen=True)
class PoissonSampling:
    """Each user takes part independently with probability q = expected_cohort / N.

    Adding or removing one user changes the sum by that user's contribution: sensitivity C.
    """

    population: int
    expected_cohort: float
    kind = "poisson"
    adjacency = Adjacency.ADD_OR_REMOVE_ONE

    @property
    def probability(self) -> float:
        """q, the probability with which a user is sampled."""
        return self.expected_cohort / self.population

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Draw the binomial size first and then that many users: the same law in O(cohort)."""
        size = int(generator.binomial(self.population, self.probability))
        return _distinct(generator, self.population, size)

    def sensitivity(self, bound: float) -> float:
        """Return C."""
        return bound

    def event(self, mechanism: GaussianMechanism) -> dp_accounting.DpEvent:
        """Return the Poisson-sampled Gaussian (Mironov, Talwar, Zhang 2019)."""
        event = _gaussian(self, mechanism)
        if isinstance(event, dp_accounting.NonPrivateDpEvent):
            return event
        return dp_accounting.PoissonSampledDpEvent(self.probability, event)


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
        return 2 * bound

    def event(self, mechanism: GaussianMechanism) -> dp_accounting.DpEvent:
        """Return the Gaussian sampled without replacement (Wang, Balle, Kasiviswanathan 2019)."""
        event = _gaussian(self, mechanism)
        if isinstance(event, dp_accounting.NonPrivateDpEvent):
            return event
        return dp_accounting.SampledWithoutReplacementDpEvent(self.population, self.cohort, event)


@dataclass(frozen=True)
class FullParticipation:
    """Every user in every round: no amplification by sampling, sensitivity C."""

    population: int
    kind = "all"
    adjacency = Adjacency.ADD_OR_REMOVE_ONE

    @property
    def expected_cohort(self) -> float:
        """N: the average is over everybody."""
        return float(self.population)

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """Return all users."""
        return np.arange(self.population)

    def sensitivity(self, bound: float) -> float:
        """Return C."""
        return bound

    def event(self, mechanism: GaussianMechanism) -> dp_accounting.DpEvent:
        """Return the plain Gaussian mechanism."""
        return _gaussian(self, mechanism)


def _distinct(generator: np.random.Generator, population: int, size: int) -> np.ndarray:
    return np.sort(generator.choice(population, size=size, replace=False, shuffle=False))


def build_sampling(kind: str, population: int, expected_cohort: float | None) -> Sampling:
    """Return the sampling called `kind`; `expected_cohort` is ignored where all take part.

    Raises:
        ValueError: unknown kind, a cohort that is not in (0, population], or a fixed-size cohort
            that is not a whole number.
    """
    if kind == "all":
        return FullParticipation(population)
    if expected_cohort is None or not 0 < expected_cohort <= population:
        raise ValueError(f"expected_cohort must lie in (0, {population}], got {expected_cohort}")
    if kind == "poisson":
        return PoissonSampling(population, float(expected_cohort))
    if kind == "fixed_size":
        if not math.isclose(expected_cohort, round(expected_cohort)):
            raise ValueError(f"a fixed-size cohort is a whole number, got {expected_cohort}")
        return FixedSizeSampling(population, round(expected_cohort))
    raise ValueError(f"unknown sampling {kind!r}: write poisson, fixed_size or all")
