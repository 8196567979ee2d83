"""Correlated noise: what one round adds, the rounds after it take back in part.

Noise of round t is row t of C⁻¹Z: Z has independent rows, C is lower triangular with b bands, and
each of its columns has norm 1 (Choquette-Choo et al. 2023, "(Amplified) Banded Matrix
Factorization"). Releasing y = x + C⁻¹Z is releasing Cy = Cx + Z, in which a contribution of one
round is spread over b rows with norm at most its own. So a user must not be drawn again within b
rounds: users are put into b groups, and round t draws from one of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from fedpriv.privacy.mechanisms.base import (
    Facts,
    Mechanism,
    Sentences,
    dp_fedavg,
    worst_and_median,
)
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism, central_trust
from fedpriv.privacy.randomness import Purpose, Randomness
from fedpriv.privacy.sampling import PoissonSampling, Sampling, of_all_groups, paid_rounds

if TYPE_CHECKING:
    import dp_accounting

    from fedpriv.privacy.ledger import Release


@lru_cache(maxsize=8)
def coefficients(bands: int) -> tuple[float, ...]:
    """Return the b numbers of a column of C, from the diagonal down; their squares add up to 1.

    They are those of (1 - x)^(-1/2), the square root of the prefix sums, cut off after b: banded
    square root factorisation (Kalinin, Lampert 2024). They fall, so C⁻¹ does not blow up.
    """
    series = [1.0]
    for j in range(1, bands):
        series.append(series[-1] * (2 * j - 1) / (2 * j))
    norm = math.sqrt(math.fsum(c * c for c in series))
    return tuple(c / norm for c in series)


def column_of_inverse(bands: int, rounds: int) -> np.ndarray:
    """Return w_0, w_1, ... of C⁻¹: `[rounds]`. The noise of round t is Σ_j w_j z_(t-j)."""
    first, *others = coefficients(bands)
    column = np.zeros(bands - 1 + rounds)  # zeros before the first
    for t in range(bands - 1, len(column)):
        past = column[t - len(others) : t] @ others[::-1]
        column[t] = ((t == bands - 1) - past) / first
    return column[bands - 1 :]


def group_of(user_id: str, bands: int) -> int:
    """Return the group of a user, of `bands`: a public function of its id, and of nothing else."""
    digest = hashlib.sha256(b"group/" + user_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest) % bands


class CorrelatedNoise:
    """Noise of one round after another; it keeps that of the last b, and can make it again.

    A round that was charged, and is drawn afresh since its sum has changed, begins anew: its noise
    has nothing of earlier rounds, nor has that of later rounds anything from before it.
    """

    def __init__(
        self,
        bands: int,
        sizes: Sequence[int],
        randomness: Randomness,
        attempts: Callable[[int], int],
    ) -> None:
        self._coefficients = coefficients(bands)
        self._sizes, self._randomness, self._attempts = sizes, randomness, attempts
        # By round: with which attempt it was made, and the noise.
        self._kept: dict[int, tuple[int, Tensor]] = {}

    def draw(self, round_: int, attempt: int, gaussian: GaussianMechanism) -> Tensor:
        """Return row `round_` of C⁻¹Z; of Z it draws that row alone where earlier ones are kept."""
        if attempt == 0:
            for earlier in self._lost(round_):
                self._make(earlier, self._attempts(earlier), gaussian)
        return self._make(round_, attempt, gaussian).clone()  # whoever adds noise uses it up

    def _make(self, round_: int, attempt: int, gaussian: GaussianMechanism) -> Tensor:
        generator = self._randomness.numpy(Purpose.NOISE, round_, attempt)
        noise = gaussian.noise(self._sizes, generator)
        first, *others = self._coefficients
        if attempt == 0:
            for coefficient, earlier in zip(others, self._past(round_), strict=False):
                noise.sub_(self._kept[earlier][1], alpha=coefficient)
        noise.div_(first)
        self._kept[round_] = attempt, noise
        for old in [each for each in self._kept if each <= round_ - len(self._coefficients)]:
            del self._kept[old]
        return noise

    def _past(self, round_: int) -> list[int]:
        """Return the rounds of which the noise of `round_` takes back a part, the last first."""
        found: list[int] = []
        for earlier in range(round_ - 1, max(0, round_ - len(self._coefficients)), -1):
            found.append(earlier)
            if self._attempts(earlier) > 0:
                break
        return found

    def _lost(self, round_: int) -> range:
        """Return the rounds whose noise must be made again for that of `round_`."""
        kept = {each: attempt for each, (attempt, _) in self._kept.items()}
        if all(kept.get(each) == self._attempts(each) for each in self._past(round_)):
            return range(0)
        beginning = round_ - 1
        while beginning > 1 and self._attempts(beginning) == 0:
            beginning -= 1
        return range(beginning, round_)


@dataclass(frozen=True)
class CorrelatedMechanism(Mechanism):
    """The server adds noise that is correlated over rounds; each group of users pays for its own.

    Round t draws each user of group t mod b with probability b·q, where q·N is the expected cohort
    of `sampling`. So T rounds cost a user what ⌈T/b⌉ rounds of the Poisson-sampled Gaussian of
    probability b·q and multiplier z cost (docs/privacy.md, "Correlated noise").

    Attributes:
        bands: b. With one the noise is that of `CentralMechanism`, to the bit.
        user_ids: the ids of those who are there, by place. Private.

    Raises:
        ValueError: a sampling without a proof, a user drawn with a probability above 1, or counts,
            whose noise would have to follow bounds.
    """

    bands: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="b, the rounds over which noise is correlated, and the groups; the noise "
            "of as many rounds is kept in RAM (float64). 1 is independent noise.",
        ),
    ]
    user_ids: Sequence[str] = field(repr=False, compare=False)

    kind = "correlated"
    samplings = ("poisson",)
    proven_with = frozenset()
    header: ClassVar = {**Mechanism.header, "mechanism": "correlated"}
    label = "correlated noise"
    payer: ClassVar[str] = "group"
    whose = "each group of users pays for the rounds that draw from it; the worst has spent:"

    def __post_init__(self) -> None:
        if self.bands < 1:
            raise ValueError(f"bands must be at least 1, got {self.bands}")
        if not isinstance(self.sampling, PoissonSampling):
            raise ValueError(
                f"correlated noise has no proof with {self.sampling.kind} sampling: each user must "
                "be drawn by a coin of its own, and at most once in as many rounds as bands; write "
                "poisson"
            )
        if self.gaussian.counts is not None:
            raise ValueError(
                "correlated noise has no proof where bounds adapt: what later rounds take back of "
                "the noise would have to follow the bounds; write fixed bounds"
            )
        if self.bands * self.sampling.expected_cohort > self.sampling.population:
            raise ValueError(
                f"bands times the expected cohort must be at most the population of "
                f"{self.sampling.population}, got {self.bands} times "
                f"{self.sampling.expected_cohort:g}: a round draws from one of so many groups"
            )

    @property
    def accounts(self) -> int:
        """One a group."""
        return self.bands

    def cohort(self, round_: int, generator: np.random.Generator) -> np.ndarray:
        """Return those of the round's group whose coin says so.

        All coins are thrown, with probability b·q, and those of other groups are left aside.
        """
        group, ids = self._group(round_), self.user_ids
        drawn = self._of_all.draw(generator)
        there = [
            place
            for place in drawn.tolist()
            if place < len(ids) and group_of(ids[place], self.bands) == group
        ]
        return np.array(there, dtype=np.int64)

    def payers(self, round_: int, cohort: np.ndarray) -> tuple[int, ...]:
        """Return the group of the round, all of whom pay, drawn or not."""
        return (self._group(round_),)

    def noise(
        self, sizes: Sequence[int], randomness: Randomness, attempts: Callable[[int], int]
    ) -> CorrelatedNoise:
        """Return the rows of C⁻¹Z."""
        return CorrelatedNoise(self.bands, sizes, randomness, attempts)

    def stddevs(self, blocks: int, round_: int, answers: int) -> tuple[float, ...]:
        """Return that of the noise that a round after `round_` - 1 others releases."""
        length = float(np.linalg.norm(column_of_inverse(self.bands, round_)))
        return tuple(length * stddev for stddev in self.gaussian.block_stddevs(blocks))

    def event(self) -> dp_accounting.DpEvent:
        """Return the event of one round for the users of its group."""
        return self._of_all.event(self.gaussian)

    def paid(self, rounds: int) -> int:
        """Return ⌈rounds / b⌉: the first group is drawn from most often."""
        return paid_rounds(rounds, self.bands)

    def most_rounds(self, paid: int) -> int:
        """Return b times `paid`."""
        return paid * self.bands

    def record(self, payers: tuple[int, ...] | None) -> dict[str, Any]:
        """Return the record of a release, whose `stddev` is that of a row of Z."""
        assert payers is not None
        return super().record(payers) | {"bands": self.bands, "group": payers[0]}

    def _group(self, round_: int) -> int:
        return (round_ - 1) % self.bands

    @property
    def _of_all(self) -> Sampling:
        return of_all_groups(self.sampling, self.bands)

    @classmethod
    def event_of(cls, release: Release, gaussian: GaussianMechanism) -> dp_accounting.DpEvent:
        """Return the event of a release for the users of its group."""
        assert release.bands is not None
        return of_all_groups(cls.sampling_of(release), release.bands).event(gaussian)

    @classmethod
    def accounts_of(cls, release: Release) -> int:
        """Return the number of groups."""
        assert release.bands is not None
        return release.bands

    @classmethod
    def drawn(cls, release: Release) -> str:
        """Return who was drawn, and how."""
        drawn = of_all_groups(cls.sampling_of(release), release.bands or 1)
        probability = drawn.expected_cohort / drawn.population
        return (
            f"each of one of {release.bands} groups with probability {probability:.4g}, of "
            f"{release.population:,}"
        )

    @classmethod
    def sentences(cls, facts: Facts) -> Sentences:
        """Return what is said of correlated noise."""
        assert facts.costs is not None
        bands = facts.release.bands or 1
        drawn = of_all_groups(facts.sampling, bands)
        probability = drawn.expected_cohort / drawn.population
        return {
            "unit": (
                "One user: everything that it contributed, in all rounds, out of a "
                f"population of {facts.population:,}.",
                facts.who,
                "A user pays for the rounds that draw from its group. "
                + worst_and_median(facts.costs, "group"),
            ),
            "trust": central_trust(facts),
            "mechanism": dp_fedavg(facts, _noise(facts.release, bands)),
            "sampling": (
                f"A hash of its id, which anybody can compute, puts each user into one of {bands} "
                "groups. Each round draws from one of them, in turn, every user independently "
                f"with probability b·q = {probability:.4g}, and so nobody twice within {bands} "
                "rounds.",
                "The object that drew the cohorts is the one that yielded the privacy events, so "
                "the sampling that was run is the sampling that is accounted.",
                "Amplification by sampling holds against those who do not know who was drawn. "
                "Users who were drawn and did not answer contributed zero.",
            ),
        }


def _noise(release: Release, bands: int) -> str:
    return (
        f"Gaussian noise that is correlated over the rounds ({bands} bands, Choquette-Choo et al. "
        "2023) is added once, centrally, at full strength whoever dropped out: row t of C⁻¹Z, "
        f"where Z is N(0, σ²) with σ = {release.stddev:.4g}, which stands on record, and C has "
        f"{bands} bands and columns of norm 1. A user's contribution is in {bands} rows of Cx at "
        "most, of which no other contribution of its own has a part."
    )
