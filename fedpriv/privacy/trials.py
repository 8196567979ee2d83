"""Tuning that is counted: a random number of trials, of which only the best is released.

Each trial draws a point of the grid and trains with it. How many there are is drawn from a law that
is known, and kept secret with all trials but the best: then the best costs little more than one
(Papernot, Steinke 2022, "Hyperparameter Tuning with Renyi Differential Privacy").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedpriv.errors import InputError
from fedpriv.privacy.charging import Cost, charge
from fedpriv.privacy.sampling import Adjacency

if TYPE_CHECKING:
    import dp_accounting

#: The shape of the law, in dp-accounting's terms: of a truncated negative binomial, or infinity.
SHAPES = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}


@dataclass(frozen=True)
class Trials:
    """How many trials there are.

    Attributes:
        law: logarithmic and geometric, which are never 0, or poisson.
        mean: how many are expected.

    Raises:
        InputError: another law, or a mean that it cannot have.
    """

    law: Literal["logarithmic", "geometric", "poisson"]
    mean: float

    def __post_init__(self) -> None:
        if self.law not in SHAPES:
            raise InputError(f"--trials: write {', '.join(SHAPES)}, not {self.law}")
        least = 0.0 if self.law == "poisson" else 1.0
        if not least < self.mean <= 10_000:
            raise InputError(
                f"--mean: with --trials {self.law} write a number above {least:g} and at most "
                f"10,000, got {self.mean:g}"
            )

    def draw(self, generator: np.random.Generator) -> int:
        """Return how many there are."""
        if self.law == "poisson":
            return int(generator.poisson(self.mean))
        if self.law == "geometric":
            return int(generator.geometric(1 / self.mean))
        return int(generator.logseries(_logarithmic(self.mean)))

    def event(self, trial: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
        """Return the event of the best of them, each of which is of the event `trial`."""
        from dp_accounting.dp_event import RepeatAndSelectDpEvent

        return RepeatAndSelectDpEvent(trial, self.mean, SHAPES[self.law])


def _logarithmic(mean: float) -> float:
    """Return p of the logarithmic law with this mean: -p / ((1 - p)·log(1 - p))."""
    from scipy.optimize import brentq

    def excess(odds: float) -> float:
        # p = odds/(1 + odds), so that a p near 1 is not rounded to it.
        return odds / math.log1p(odds) - mean

    odds = float(brentq(excess, 1e-12, 1e9))
    return odds / (1 + odds)


def composed(events: Mapping[dp_accounting.DpEvent, int]) -> dp_accounting.DpEvent:
    """Return all `events` of one trial as one."""
    import dp_accounting

    ordered = sorted(events.items(), key=lambda each: str(each[0]))
    # A tuple, which has a hash: what an event costs is remembered.
    parts = tuple(dp_accounting.SelfComposedDpEvent(event, count) for event, count in ordered)
    return dp_accounting.ComposedDpEvent(parts)


@dataclass(frozen=True)
class Tuning:
    """A tuning as it is counted.

    Attributes:
        trials: the law of their number.
        charged: the events of a trial that pays most.
        source: what its number, its points and its trials' noise were drawn from. Two of one
            source are not independent, and nothing is known of both together.
    """

    trials: Trials
    charged: Mapping[dp_accounting.DpEvent, int]
    source: int = 0

    def event(self) -> dp_accounting.DpEvent:
        """Return the event of the release of its best trial."""
        return self.trials.event(composed(self.charged))

    def document(self) -> dict[str, Any]:
        """Return it for JSON."""
        charged = [{"event": _document(e), "times": n} for e, n in self.charged.items()]
        law = {"law": self.trials.law, "mean": self.trials.mean}
        return {**law, "source": self.source, "charged": charged}

    @classmethod
    def of_document(cls, found: Mapping[str, Any]) -> Tuning:
        """Return the tuning that `document` made one of.

        Raises:
            InputError, KeyError, TypeError, ValueError: it is none.
        """
        charged = {_event(each["event"]): int(each["times"]) for each in found["charged"]}
        if not charged or min(charged.values()) < 1:
            raise ValueError("a trial is charged for something")
        return cls(Trials(found["law"], found["mean"]), charged, int(found["source"]))


def price(tunings: Sequence[Tuning], adjacency: Adjacency, delta: float) -> Cost:
    """Return what tunings over the same users cost together, by RDP."""
    events = Counter(tuning.event() for tuning in tunings)
    return charge(events, adjacency, [delta], ("rdp",)).first


def _document(event: dp_accounting.DpEvent) -> dict[str, Any]:
    """Return the event of a round, of one of the kinds that trials may have, for JSON."""
    import dp_accounting

    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        return {"probability": event.sampling_probability, "of": _document(event.event)}
    if isinstance(event, dp_accounting.SampledWithoutReplacementDpEvent):
        size = {"population": event.source_dataset_size, "cohort": event.sample_size}
        return {**size, "of": _document(event.event)}
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return {"noise_multiplier": event.noise_multiplier}
    raise ValueError(f"no trial is charged for {event}")


def _event(found: Mapping[str, Any]) -> dp_accounting.DpEvent:
    """Return the event that `_document` made one of."""
    import dp_accounting

    if "noise_multiplier" in found:
        return dp_accounting.GaussianDpEvent(float(found["noise_multiplier"]))
    inner = _event(found["of"])
    if "probability" in found:
        return dp_accounting.PoissonSampledDpEvent(float(found["probability"]), inner)
    sizes = int(found["population"]), int(found["cohort"])
    return dp_accounting.SampledWithoutReplacementDpEvent(*sizes, inner)
