"""Correlated noise: what one round adds, the rounds after it take back in part.

Noise of round t is row t of C⁻¹Z: Z has independent rows, C is lower triangular, and its columns
have norm 1 at most (`fedpriv.privacy.factorizations`). Releasing y = x + C⁻¹Z is releasing
Cy = Cx + Z, in which a contribution of one round is spread over many rows with norm at most its
own. A user must not be drawn again within b rounds: users are put into b groups, and round t draws
from one of them. Where C has b bands or fewer, no row has parts of two contributions of a user.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedpriv.errors import InputError
from fedpriv.privacy.factorizations import (
    DENSE,
    MADE,
    Factorization,
    Workload,
    inverse_of,
    on_record,
    sensitivity_shares,
)
from fedpriv.privacy.mechanisms.base import (
    Facts,
    Mechanism,
    Sentences,
    dp_fedavg,
    worst_and_median,
)
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism, central_trust
from fedpriv.privacy.randomness import Purpose, Randomness, group_of
from fedpriv.privacy.sampling import (
    Adjacency,
    MinSeparationSampling,
    Noise,
    Noisy,
    PoissonSampling,
    Sampling,
    build_sampling,
    of_all_groups,
    paid_rounds,
)

if TYPE_CHECKING:
    import dp_accounting

    from fedpriv.privacy.charging import Budget
    from fedpriv.privacy.ledger import Release


class CorrelatedNoise:
    """Noise of one round after another; it can be made again, from seed and ledger alone.

    A round that was charged, and is drawn afresh since its sum has changed, begins anew: its noise
    has nothing of earlier rounds, nor has that of later rounds anything from before it.
    """

    def __init__(
        self,
        factorization: Factorization,
        sizes: Sequence[int],
        randomness: Randomness,
        attempts: Callable[[int], int],
    ) -> None:
        self._factorization = factorization
        self._sizes, self._randomness, self._attempts = sizes, randomness, attempts
        self._stream = factorization.stream()
        # The newest round, with which attempt it was made, and its noise.
        self._newest: tuple[int, int] = (0, 0)
        self._noise = torch.empty(0)

    def draw(self, round_: int, attempt: int, gaussian: GaussianMechanism) -> Tensor:
        """Return row `round_` of C⁻¹Z; of Z it draws that row alone where those before are made."""
        if self._newest != (round_, attempt):
            if attempt > 0 or round_ == 1:
                self._stream = self._factorization.stream()
            elif self._newest != (round_ - 1, self._attempts(round_ - 1)):
                self._stream = self._factorization.stream()
                for earlier in self._before(round_):
                    self._make(earlier, self._attempts(earlier), gaussian)
            self._make(round_, attempt, gaussian)
        return self._noise.clone()  # whoever adds noise uses it up

    def _make(self, round_: int, attempt: int, gaussian: GaussianMechanism) -> None:
        generator = self._randomness.numpy(Purpose.NOISE, round_, attempt)
        self._noise = self._stream.row(gaussian.noise(self._sizes, generator))
        self._newest = round_, attempt

    def _before(self, round_: int) -> range:
        """Return the rounds whose noise must be made again for that of `round_`."""
        reach = self._factorization.reach
        least = 1 if reach is None else max(1, round_ - reach + 1)
        beginning = round_
        while beginning > least:
            beginning -= 1
            if self._attempts(beginning) > 0:
                break
        return range(beginning, round_)


@dataclass(frozen=True)
class CorrelatedMechanism(Mechanism):
    """The server adds noise that is correlated over rounds; each group of users pays for its own.

    With Poisson sampling round t draws each user of group t mod b with probability b·q, where q·N
    is the expected cohort. So T rounds cost a user what ⌈T/b⌉ rounds of the Poisson-sampled
    Gaussian of probability b·q and multiplier z cost. With `min_separation` sampling nothing is
    claimed for coins: the rounds of a group cost it the unsampled Gaussian of its sensitivity
    (docs/privacy.md, "Correlated noise").

    Attributes:
        bands: b. With one the noise is that of `CentralMechanism`, to the bit.
        user_ids: the ids of those who are there, by place. Private.
        factorization: how C is made.
        workload: what the server makes of the noise; None for the prefix sums of a round alone.
        begun_with: C of a run that goes on, as it is on record; None where it is made here.

    Raises:
        ValueError: a sampling without a proof, a user drawn with a probability above 1, more bands
            than rounds between those of a user, or counts, whose noise would have to follow bounds.
    """

    bands: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="b, the rounds over which noise is correlated, and with poisson sampling "
            "the groups; the noise of as many rounds is kept in RAM (float64). 1 is independent "
            "noise. Of bisr the bands of C⁻¹, of blt the buffers.",
        ),
    ]
    user_ids: Sequence[str] = field(repr=False, compare=False)
    factorization: Annotated[
        Literal["square_root", "optimized", "bisr", "blt"],
        Field(
            description="How C is made. square_root: bands of the root of the prefix sums; "
            "optimized: bands for this run's rounds, learning rates and momentum; bisr (bands in "
            "the inverse) and blt (a few buffers) go with sampling.kind: min_separation."
        ),
    ] = "square_root"
    workload: Workload | None = None
    begun_with: Factorization | None = None

    kind = "correlated"
    samplings = ("poisson", "min_separation")
    proven_with = frozenset()
    header: ClassVar = {**Mechanism.header, "mechanism": "correlated"}
    label = "correlated noise"
    payer: ClassVar[str] = "group"
    whose = "each group of users pays for the rounds that draw from it; the worst has spent:"

    def __post_init__(self) -> None:
        if self.bands < 1:
            raise ValueError(f"bands must be at least 1, got {self.bands}")
        if not isinstance(self.sampling, PoissonSampling | MinSeparationSampling):
            raise ValueError(
                f"correlated noise has no proof with {self.sampling.kind} sampling: each user must "
                "be drawn by a coin of its own, and at most once in as many rounds as bands; write "
                "poisson or min_separation"
            )
        if self.gaussian.counts is not None:
            raise ValueError(
                "correlated noise has no proof where bounds adapt: what later rounds take back of "
                "the noise would have to follow the bounds; write fixed bounds"
            )
        if self.groups * self.sampling.expected_cohort > self.sampling.population:
            raise ValueError(
                f"bands times the expected cohort must be at most the population of "
                f"{self.sampling.population}, got {self.groups} times "
                f"{self.sampling.expected_cohort:g}: a round draws from one of so many groups"
            )
        if self.dense and isinstance(self.sampling, PoissonSampling):
            raise ValueError(
                f"factorization: {self.factorization} has no proof with poisson sampling: what a "
                "user contributes stays in all later rows of Cx, and is in no block of its own; "
                "write sampling.kind: min_separation, or optimized"
            )
        if not self.dense and self.bands > self.groups:
            raise ValueError(
                f"{self.bands} bands are more than the {self.groups} rounds of which a user is in "
                "one at most (sampling.rounds): two of its contributions would be in one row; "
                "write fewer bands"
            )

    @property
    def dense(self) -> bool:
        """Whether what a user contributes stays in all later rows of Cx."""
        return self.factorization in DENSE

    @property
    def groups(self) -> int:
        """How many groups there are: a user is in one of so many rounds at most."""
        if isinstance(self.sampling, MinSeparationSampling):
            return self.sampling.rounds
        return self.bands

    @property
    def matrix(self) -> Factorization:
        """C."""
        if self.begun_with is not None:
            return self.begun_with
        workload = self.workload or Workload((1.0,))
        return MADE[self.factorization](self.bands, workload, self.groups)

    @property
    def accounts(self) -> int:
        """One a group."""
        return self.groups

    def as_begun(self, first: Release) -> CorrelatedMechanism:
        """Return the mechanism with the C and the z of the first release on record.

        The noise that a round takes back was made by them. What is found here may be others: the
        last bit of a number leads the search for C elsewhere on another machine, and z follows.
        """
        gaussian = replace(self.gaussian, noise_multiplier=first.noise_multiplier)
        name = first.factorization
        if name is None:
            return replace(self, gaussian=gaussian)
        if first.parameters is None:
            raise InputError(
                f"privacy.mechanism.factorization: {name}: the ledger of this run does not say "
                "which bands its noise was made with, and others may be found here; go on with "
                "the version of fedpriv that began it, or begin a new run"
            )
        made = on_record(name, first.parameters, first.horizon or 0)
        return replace(self, gaussian=gaussian, begun_with=made)

    def cohort(self, round_: int, generator: np.random.Generator) -> np.ndarray:
        """Return those of the round's group whose coin says so.

        All coins are thrown, and those of other groups are left aside.
        """
        group, ids = self._group(round_), self.user_ids
        drawn = self._of_all.draw(generator)
        there = [
            place
            for place in drawn.tolist()
            if place < len(ids) and group_of(ids[place], self.groups) == group
        ]
        return np.array(there, dtype=np.int64)

    def payers(self, round_: int, cohort: np.ndarray) -> tuple[int, ...]:
        """Return the group of the round, all of whom pay, drawn or not."""
        return (self._group(round_),)

    def noise(
        self, sizes: Sequence[int], randomness: Randomness, attempts: Callable[[int], int]
    ) -> CorrelatedNoise:
        """Return the rows of C⁻¹Z."""
        return CorrelatedNoise(self.matrix, sizes, randomness, attempts)

    def stddevs(self, blocks: int, round_: int, answers: int) -> tuple[float, ...]:
        """Return that of the noise that a round after `round_` - 1 others releases."""
        length = float(np.linalg.norm(inverse_of(self.matrix.column(round_))))
        return tuple(length * stddev for stddev in self.gaussian.block_stddevs(blocks))

    def event(self) -> dp_accounting.DpEvent:
        """Return the event of one round for the users of its group; where C is dense, of all."""
        if self.dense:
            return _unsampled(self.sampling, self.gaussian, self._squared_sensitivity(self._rounds))
        return self._of_all.event(self.gaussian)

    def paid(self, rounds: int) -> int:
        """Return ⌈rounds / b⌉: the first group is drawn from most often; where C is dense, 1."""
        return 1 if self.dense else paid_rounds(rounds, self.groups)

    def charged(self, rounds: int) -> tuple[dp_accounting.DpEvent, int]:
        """Return what the first group pays; where C is dense, as one release of its shares."""
        if not self.dense:
            return super().charged(rounds)
        spent = self._squared_sensitivity(rounds)
        return _unsampled(self.sampling, self.gaussian, spent), 1

    def affordable(self, budget: Budget, rounds: int) -> int:
        """Return how many of the first `rounds` fit, for the first group."""
        if not self.dense:
            return super().affordable(budget, rounds)
        from fedpriv.privacy.charging import affordable, most_that_fits

        def fit(count: int) -> bool:
            event, once = self.charged(count)
            return bool(affordable(event, budget, once))

        return most_that_fits(fit, 0, rounds)

    def most_rounds(self, paid: int) -> int:
        """Return b times `paid`."""
        return paid * self.groups

    def record(self, payers: tuple[int, ...] | None) -> dict[str, Any]:
        """Return the record of a release, whose `stddev` is that of a row of Z."""
        assert payers is not None
        separated = isinstance(self.sampling, MinSeparationSampling)
        searched = self.factorization != "square_root"  # whose bands follow from their number
        return super().record(payers) | {
            "bands": self.bands,
            "group": payers[0],
            "separation": self.groups if separated else None,
            "factorization": self.factorization if searched else None,
            "horizon": self._rounds if self.dense else None,
            "parameters": self.matrix.parameters if searched else None,
        }

    def _group(self, round_: int) -> int:
        return (round_ - 1) % self.groups

    @property
    def _rounds(self) -> int:
        return self.workload.rounds if self.workload else 1

    def _squared_sensitivity(self, rounds: int) -> float:
        """Return that of the first group after the first `rounds`, as they are charged."""
        shares = sensitivity_shares(self.matrix, self._rounds, self.groups)
        return math.fsum(shares[: rounds : self.groups])

    @property
    def _of_all(self) -> Sampling:
        return of_all_groups(self.sampling, self.groups)

    @classmethod
    def event_of(cls, release: Release, gaussian: GaussianMechanism) -> dp_accounting.DpEvent:
        """Return the event of a release for the users of its group.

        Where C is dense it is their share of the whole run's: Gaussians whose inverse squared
        multipliers add up to that of the run.
        """
        assert release.bands is not None
        sampling = cls.sampling_of(release)
        if release.factorization in DENSE:
            if not release.parameters:  # an empty C would be the cheapest
                return _unsampled(sampling, gaussian, math.inf)
            made = on_record(release.factorization, release.parameters, release.horizon or 0)
            shares = sensitivity_shares(made, release.horizon or 0, release.separation or 1)
            planned = release.round <= len(shares)
            share = float(shares[release.round - 1]) if planned else math.inf
            return _unsampled(sampling, gaussian, share)
        if release.separation is not None and release.bands > release.separation:
            return _unsampled(sampling, gaussian, math.inf)
        return of_all_groups(sampling, release.bands).event(gaussian)

    @classmethod
    def sampling_of(cls, release: Release) -> Sampling:
        """Return how the cohort of a `release` on record was drawn."""
        adjacency = Adjacency(release.adjacency)
        given = release.population, release.expected_cohort, adjacency, release.separation
        return build_sampling(release.sampling, *given)

    @classmethod
    def in_round(cls, release: Release, round_: int) -> Release:
        """Return the release that draws from the group of its round."""
        group = (round_ - 1) % cls.accounts_of(release)
        return replace(super().in_round(release, round_), group=group)

    @classmethod
    def accounts_of(cls, release: Release) -> int:
        """Return the number of groups."""
        assert release.bands is not None
        return release.separation or release.bands

    @classmethod
    def unknown(cls, sampling: Sampling) -> str:
        """Return that who was drawn is secret, where something is claimed for coins."""
        return "" if sampling.kind == "min_separation" else super().unknown(sampling)

    @classmethod
    def drawn(cls, release: Release) -> str:
        """Return who was drawn, and how."""
        groups = cls.accounts_of(release)
        probability = groups * (release.expected_cohort or 0) / release.population
        return (
            f"each of one of {groups} groups with probability {probability:.4g}, of "
            f"{release.population:,}"
        )

    @classmethod
    def sentences(cls, facts: Facts) -> Sentences:
        """Return what is said of correlated noise."""
        assert facts.costs is not None
        release = facts.release
        groups = cls.accounts_of(release)
        return {
            "unit": (
                "One user: everything that it contributed, in all rounds, out of a "
                f"population of {facts.population:,}.",
                facts.who,
                "A user pays for the rounds that draw from its group. "
                + worst_and_median(facts.costs, "group"),
            ),
            "trust": central_trust(facts),
            "mechanism": dp_fedavg(facts, _noise(release, groups)),
            "sampling": _sampling(facts.sampling, groups),
        }


def _unsampled(
    sampling: Sampling, gaussian: Noisy, squared_sensitivity: float
) -> dp_accounting.DpEvent:
    """Return the unsampled Gaussian for such a squared sensitivity, that of one round being 1."""
    return sampling.event(Noise(gaussian.noise_multiplier / math.sqrt(squared_sensitivity)))


def _sampling(sampling: Sampling, groups: int) -> tuple[str, ...]:
    probability = groups * sampling.expected_cohort / sampling.population
    hashed = (
        f"A hash of its id, which anybody can compute, puts each user into one of {groups} "
        "groups. Each round draws from one of them, in turn, every user independently "
        f"with probability b·q = {probability:.4g}, and so nobody twice within {groups} "
        "rounds."
    )
    if sampling.kind == "min_separation":
        return (
            hashed,
            "Nothing is claimed for these coins, nor need they be secret or fair: what a group "
            "pays is what a user pays that is in every round of its group.",
            "Users who were drawn and did not answer contributed zero.",
        )
    return (
        hashed,
        "The object that drew the cohorts is the one that yielded the privacy events, so "
        "the sampling that was run is the sampling that is accounted.",
        "Amplification by sampling holds against those who do not know who was drawn. "
        "Users who were drawn and did not answer contributed zero.",
    )


def _noise(release: Release, groups: int) -> str:
    made = release.factorization or "square_root"
    paper = {
        "square_root": "Choquette-Choo et al. 2023",
        "optimized": "Choquette-Choo et al. 2023, optimised for this run",
        "bisr": "BISR, Kalinin et al. 2025",
        "blt": "BLT, McMahan et al. 2024",
    }[made]
    counted = f"{release.bands} {'buffers' if made == 'blt' else 'bands'}"
    begun = (
        f"Gaussian noise that is correlated over the rounds ({counted}, {paper}) is added once, "
        "centrally, at full strength whoever dropped out: row t of C⁻¹Z, "
        f"where Z is N(0, σ²) with σ = {release.stddev:.4g}, which stands on record, and C has "
    )
    if release.factorization in DENSE:
        return (
            f"{begun}columns of norm 1 at most. A user's contributions, {groups} rounds or more "
            "apart, stay in all later rows of Cx, and what they add up to there is charged: the "
            "sensitivity of the whole run, of which each round of its group is a share."
        )
    return (
        f"{begun}{release.bands} bands and columns of norm 1. A user's contribution is in "
        f"{release.bands} rows of Cx at most, of which no other contribution of its own has a part."
    )
