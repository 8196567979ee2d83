"""What DiceSGD costs, by two accountings: one that is proved, and the one that was published.

`provable` (docs/privacy.md has the proof): of the noise variance σ² = σ_a² + σ_b² on v_t, the part
σ_a² hides the clipped gradients, a sampled Gaussian of multiplier σ_a·B/C1, and σ_b² the memory, an
unsampled Gaussian. Any split is valid; the best one is used. `published`: noise √(1 + 2·C2/C1)
times that of DP-SGD is accounted as DP-SGD. That is the authors' claim, not a proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import dp_accounting
import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom

from fedpriv.privacy.accounting import ACCOUNTANTS, RdpAccountant
from fedpriv.privacy.calibration import noise_multiplier_for
from fedpriv.privacy.dice import DiceMechanism
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism

Accounting = Literal["provable", "published"]
Events = list[tuple[dp_accounting.DpEvent, int]]

STATUS: dict[Accounting, str] = {
    "provable": "proved (docs/privacy.md, DiceSGD)",
    "published": "claimed by the authors of DiceSGD, not proved",
}

# The split is searched on a grid of log odds first: the best order changes along it, so that ε
# has kinks, and could have two minima.
_GRID = tuple(-9.0 + 1.5 * step for step in range(13))
_TOLERANCE = 1e-3

# A hundredth of δ is for an example that is in more batches than expected: δ' of it costs e^ε·δ',
# so that this much is kept where ε is at most `_LARGEST`.
_KEPT = 0.01
_LARGEST = 20.0


@dataclass(frozen=True)
class DiceEpsilon:
    """An ε of DiceSGD that says by which accounting it is meant.

    Attributes:
        accounting: `provable` or `published`.
        accountant: `rdp` or `pld`.
        epsilon: ε; infinite without noise.
        delta: δ.
        steps: T, the number of releases.
        sampled_share: σ_a²/σ², the share of the noise variance that hides the clipped gradients;
            None where nothing is split.
        participations: in how many batches an example may be before what it adds to the memory
            is no longer hidden; the probability of more is within δ. None where nothing is split.
    """

    accounting: Accounting
    accountant: str
    epsilon: float
    delta: float
    steps: int
    sampled_share: float | None = None
    participations: int | None = None

    @property
    def status(self) -> str:
        """Whether this ε is proved."""
        return STATUS[self.accounting]

    def row(self) -> dict[str, str | float | int | None]:
        """Return a row of a report, the status with it."""
        return {**asdict(self), "status": self.status}

    def __str__(self) -> str:
        return (
            f"ε = {epsilon_text(self.epsilon)} at δ = {self.delta:g} ({self.accountant}, "
            f"{self.accounting} accounting of DiceSGD: {self.status})"
        )


def memory_sensitivity(mechanism: DiceMechanism, steps: int, participations: int) -> float:
    """Return the L2 sensitivity of the memory parts of T releases together.

    2·C2 a step, so 2·C2·√T together. Where a gradient adds at most ρ = (G - C1)/B to the memory,
    also ρ times the number of batches that the example is in, mostly far less; the smaller holds.
    """
    whole = 2 * mechanism.memory.bound * math.sqrt(steps)
    return min(whole, participations * mechanism.residual_bound)


def provable_events(
    mechanism: DiceMechanism, steps: int, sampled_share: float, participations: int | None = None
) -> Events:
    """Return the events, each with its count, that T steps cost at a split of the variance.

    Args:
        mechanism: what is released.
        steps: T, at least 1.
        sampled_share: σ_a²/σ² in (0, 1), or 1 where the memory is empty (C2 = 0).
        participations: in how many batches an example is at most; None for all T.
    """
    share = math.sqrt(sampled_share)
    part = GaussianMechanism(share * mechanism.noise_multiplier, mechanism.examples)
    events = [(mechanism.sampling.event(part), steps)]
    sensitivity = memory_sensitivity(mechanism, steps, participations or steps)
    if sensitivity > 0:
        stddev = mechanism.stddev * math.sqrt(1 - sampled_share)
        events.append((dp_accounting.GaussianDpEvent(stddev / sensitivity), 1))
    return events


def inflation(mechanism: DiceMechanism) -> float:
    """Return √(1 + 2·C2/C1), the published factor between DiceSGD's noise and DP-SGD's."""
    return math.sqrt(1 + 2 * mechanism.memory.bound / mechanism.examples.bound)


def published_event(mechanism: DiceMechanism) -> dp_accounting.DpEvent:
    """Return what one step costs by the authors' claim: DP-SGD of less noise."""
    multiplier = mechanism.noise_multiplier / inflation(mechanism)
    return mechanism.sampling.event(GaussianMechanism(multiplier, mechanism.examples))


def dice_epsilon(
    mechanism: DiceMechanism,
    steps: int,
    delta: float,
    accounting: Accounting = "provable",
    accountant: str = "rdp",
) -> DiceEpsilon:
    """Return the ε of T steps at δ.

    The split is the best one for RDP, for PLD too, where it is as valid and close to the best.

    Raises:
        ValueError: an unknown accounting.
    """
    _check(accounting)
    if steps == 0 or mechanism.noise_multiplier == 0:
        epsilon = 0.0 if steps == 0 else math.inf
        return DiceEpsilon(accounting, accountant, epsilon, delta, steps)
    if accounting == "published":
        epsilon = _composed(mechanism, [(published_event(mechanism), steps)], accountant, delta)
        return DiceEpsilon(accounting, accountant, epsilon, delta, steps)
    for most, left in (_few_participations(mechanism, steps, delta), (steps, delta)):
        share = _best_share(mechanism, steps, most, left)
        events = provable_events(mechanism, steps, share, most)
        epsilon = _composed(mechanism, events, accountant, left)
        if epsilon <= _LARGEST:
            break
    return DiceEpsilon(accounting, accountant, epsilon, delta, steps, share, most)


def dice_noise_multiplier(
    mechanism: DiceMechanism,
    steps: int,
    epsilon: float,
    delta: float,
    accounting: Accounting = "provable",
) -> float:
    """Return the smallest z (within 1e-3 of it) with which T steps of `mechanism` cost at most ε.

    The noise multiplier of `mechanism` itself is ignored.

    Raises:
        ValueError: an unknown accounting, or no noise multiplier reaches ε.
    """
    _check(accounting)
    plain = noise_multiplier_for(
        epsilon,
        delta,
        steps,
        mechanism.sampling.adjacency,
        lambda z: mechanism.sampling.event(GaussianMechanism(z, mechanism.examples)),
        accountants=("rdp",),
    )
    if accounting == "published":
        return plain * inflation(mechanism)
    most, left = steps, delta
    if epsilon <= _LARGEST:
        most, left = _few_participations(mechanism, steps, delta)
    sensitivity = memory_sensitivity(mechanism, steps, most)
    if sensitivity == 0:
        return plain

    def total(log_odds: float) -> float:
        """Return z where the sampled part has as much noise as multiplier `sampled` says."""
        sampled = plain * (1 + math.exp(log_odds))
        needed = _memory_multiplier(mechanism, sampled, steps, epsilon, left)
        unit = mechanism.examples.bound / mechanism.batch
        return math.hypot(sampled, needed * sensitivity / unit)

    found = total(_least(total))
    # The split is searched again by `dice_epsilon`, which ends within its tolerance.
    while dice_epsilon(replace(mechanism, noise_multiplier=found), steps, delta).epsilon > epsilon:
        found *= 1 + _TOLERANCE / 4
    return found


def _check(accounting: str) -> None:
    if accounting not in get_args(Accounting):
        raise ValueError(f"unknown accounting {accounting!r}: write provable or published")


def _composed(mechanism: DiceMechanism, events: Events, accountant: str, delta: float) -> float:
    composed = ACCOUNTANTS[accountant](mechanism.sampling.adjacency)
    for event, count in events:
        composed.compose(event, count)
    return composed.epsilon(delta)


def _few_participations(mechanism: DiceMechanism, steps: int, delta: float) -> tuple[int, float]:
    """Return a number m of batches that an example is almost surely within, and what δ is left.

    Of the T batches it is in more than m with probability δ' at most, where (1 + e^ε)·δ' is the
    part of δ that is kept, for any ε up to `_LARGEST`. Where nothing depends on m, m is T.
    """
    if math.isinf(mechanism.residual_bound):
        return steps, delta
    slack = _KEPT * delta / (1 + math.exp(_LARGEST))
    # The library's own inverse, isf, loses such small probabilities.
    more = binom.sf(np.arange(steps + 1), steps, mechanism.sampling.probability)
    most = int(np.argmax(more <= slack))
    return (most, (1 - _KEPT) * delta) if most < steps else (steps, delta)


def _best_share(mechanism: DiceMechanism, steps: int, participations: int, delta: float) -> float:
    if memory_sensitivity(mechanism, steps, participations) == 0:
        return 1.0

    def spent(log_odds: float) -> float:
        events = provable_events(mechanism, steps, _share(log_odds), participations)
        return _composed(mechanism, events, "rdp", delta)

    return _share(_least(spent))


def _share(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


def _memory_multiplier(
    mechanism: DiceMechanism, sampled: float, steps: int, epsilon: float, delta: float
) -> float:
    """Return the multiplier of the memory's Gaussian that leaves T steps at ε."""
    composed = RdpAccountant(mechanism.sampling.adjacency)
    part = GaussianMechanism(sampled, mechanism.examples)
    composed.compose(mechanism.sampling.event(part), steps)

    def excess(log: float) -> float:
        event = dp_accounting.GaussianDpEvent(math.exp(log))
        return composed.epsilon_after(event, delta) - epsilon

    return math.exp(brentq(excess, -30.0, 30.0, xtol=1e-6)) if excess(30.0) <= 0 else math.inf


def _least(cost: Callable[[float], float]) -> float:
    """Return where `cost`, a function of log odds, is least."""
    values = [cost(point) for point in _GRID]
    best = min(range(len(_GRID)), key=values.__getitem__)
    around = (_GRID[max(best - 1, 0)], _GRID[min(best + 1, len(_GRID) - 1)])
    found = minimize_scalar(
        cost, bounds=around, method="bounded", options={"xatol": _TOLERANCE * 10}
    )
    return float(found.x) if found.fun < values[best] else _GRID[best]
