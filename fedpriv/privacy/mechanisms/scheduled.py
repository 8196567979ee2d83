"""Silos on a schedule: who sends when, and after how many steps, is public before the run begins.

All silos train all the time. Each sends when its steps are done, and pays for the steps that it
took. What happens inside one is as with other silos (`silos.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from fedpriv.privacy.example_level import steps_event
from fedpriv.privacy.mechanisms.base import Facts, Sentences
from fedpriv.privacy.mechanisms.silos import SiloMechanism, sampled_steps
from fedpriv.privacy.sampling import build_sampling
from fedpriv.privacy.turns import SCHEDULE, Turn, most_so_far

if TYPE_CHECKING:
    import dp_accounting

    from fedpriv.privacy.ledger import Release
    from fedpriv.privacy.sampling import Sampling


@dataclass(frozen=True)
class ScheduledSilos(SiloMechanism):
    """Silos that take part when a public schedule says so, each with steps of its own number.

    `level.steps` is the most that a silo takes in a round.

    Attributes:
        turns: the schedule, from the first round on.
        now: the turn of the round.
    """

    turns: tuple[Turn, ...] = ()
    now: Turn | None = None

    kind = "scheduled"
    header: ClassVar = {**SiloMechanism.header, "mechanism": "scheduled"}
    samplings = ("all",)
    proven_with = frozenset()
    label = "scheduled silos"
    for_whom = " for the silo that takes most steps"
    whose = "each silo pays for the steps that it took; the worst has spent:"
    spends: ClassVar[str] = "the steps that it took"
    most: ClassVar[str] = "at most "
    # Not all, as the sampling has it, by which all silos train all the time.
    scheduled = "some"

    def of_round(self, round_: int, attempt: int, attempts: Callable[[int], int]) -> Self:
        """Return the mechanism with the turn of `round_`."""
        return replace(self, now=self.turns[round_ - 1])

    def cohort(self, round_: int, generator: np.random.Generator) -> np.ndarray:
        """Return the silos whose turn it is."""
        return np.array(self.turns[round_ - 1].silos, dtype=np.int64)

    def event(self) -> dp_accounting.DpEvent:
        """Return the event of one step: rounds are of different numbers of them."""
        return steps_event(self.gaussian.noise_multiplier, self.level.sampling_rate, 1)

    def paid(self, rounds: int) -> int:
        """Return for how many steps of the first `rounds` one silo pays at most."""
        return max(most_so_far(self.turns[:rounds]), default=0)

    def most_rounds(self, paid: int) -> int:
        """Return the largest number of rounds in which no silo takes more than `paid` steps."""
        for rounds, most in enumerate(most_so_far(self.turns)):
            if most > paid:
                return rounds
        return len(self.turns)

    def record(self, payers: tuple[int, ...] | None) -> dict[str, Any]:
        """Return the record of one round, with the steps of each silo."""
        assert self.now is not None
        return super().record(payers) | {
            "sampling": SCHEDULE,
            "expected_cohort": None,
            "turns": self.now.steps,
        }

    @classmethod
    def sampling_of(cls, release: Release) -> Sampling:
        """Return that all silos train all the time: the average is over all of them."""
        return build_sampling("all", release.population, None)

    @classmethod
    def in_round(cls, release: Release, round_: int) -> Release:
        """Return the release of a round in which everybody might have taken the most steps."""
        assert release.steps is not None
        later = super().in_round(release, round_)
        return replace(later, turns=(release.steps,) * release.population)

    @classmethod
    def drawn(cls, release: Release) -> str:
        """Return what each silo did."""
        return f"{cls.most}{release.steps} steps, q = {release.sampling_rate:g}, on a schedule"

    @classmethod
    def sentences(cls, facts: Facts) -> Sentences:
        """Return what is said of silos, with who takes part when."""
        return {
            **super().sentences(facts),
            "sampling": (
                sampled_steps(facts.release),
                f"Which of the {facts.population:,} silos send in which round, and after how many "
                "steps, is a schedule that was made before the run from public numbers alone: the "
                "seconds that a step is said to take in each silo. No amplification is claimed for "
                "it; a silo pays for the steps that the schedule gave it, whether or not it "
                "answered.",
            ),
        }
