"""Accountants: from the events of a run to (ε, δ).

The mathematics is dp-accounting's. Added here is what makes it cost microseconds a round: the
Rényi curve of each distinct event is computed once, and composition adds curves.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, reduce
from typing import Protocol

import dp_accounting
import numpy as np
from dp_accounting import rdp
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.rdp.rdp_privacy_accountant import (
    DEFAULT_RDP_ORDERS,
    compute_delta,
    compute_epsilon,
)

from fedpriv.privacy.allocation import (
    NoDistribution,
    RandomAllocationDpEvent,
    loss_distribution,
    renyi,
)
from fedpriv.privacy.privacy_loss import sampled_gaussian
from fedpriv.privacy.rounding import (
    CONVERSION,
    of_poisson_sampling,
    of_sampling_without_replacement,
)
from fedpriv.privacy.sampling import Adjacency

# dp-accounting warns for each order at which its series does not converge. It leaves those orders
# out, which can only raise ε, so the warning says nothing that a user could act on.
logging.getLogger("absl").addFilter(lambda record: "Excluding this order" not in record.msg)

#: The Rényi orders, dp-accounting's own, so that our ε is the one that its users get.
ORDERS: tuple[float, ...] = tuple(float(order) for order in DEFAULT_RDP_ORDERS)

#: A δ below this is indistinguishable from zero in floating point, and zero has no ε by RDP.
SMALLEST_DELTA = 1e-300

#: Above this ε a privacy-loss distribution takes seconds and gigabytes, and says nothing of use.
PLD_UP_TO = 100.0

#: The grid of privacy losses, dp-accounting's own.
INTERVAL = 1e-4


class Accountant(Protocol):
    """Composes privacy events and answers with (ε, δ). It never answers below the truth."""

    name: str

    def compose(self, event: dp_accounting.DpEvent, count: int = 1) -> None:
        """Add `count` releases of `event`.

        Raises:
            UnsupportedEventError: when the accountant has no proof for this event under its
                adjacency.
        """
        ...

    def epsilon(self, delta: float) -> float:
        """Return the smallest ε this accountant proves at `delta`; inf for non-private runs."""
        ...

    def delta(self, epsilon: float) -> float:
        """Return the smallest δ this accountant proves at `epsilon`."""
        ...


@lru_cache(maxsize=256)
def _rdp_curve(
    event: dp_accounting.DpEvent, adjacency: Adjacency, orders: tuple[float, ...]
) -> np.ndarray:
    """Return a bound on the Rényi divergence of one `event` at `orders`: float64 `[len(orders)]`.

    It is what dp-accounting computes and the most that rounding can have taken from it: with much
    noise the divergence itself is lost in rounding, and could come out as zero or below.
    """
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return _frozen(event.count * _rdp_curve(event.event, adjacency, orders))
    if isinstance(event, dp_accounting.ComposedDpEvent):
        parts = [_rdp_curve(each, adjacency, orders) for each in event.events]
        return _frozen(np.sum(parts, axis=0))
    if isinstance(event, RandomAllocationDpEvent):
        if adjacency is Adjacency.REPLACE_ONE:
            raise dp_accounting.UnsupportedEventError(f"no proof for {event} under replace_one")
        return _frozen(renyi(event, orders))
    accountant = rdp.RdpAccountant(orders, adjacency.relation)
    accountant.compose(event)
    # Where the noise is so small that the series overflows there is no bound at all.
    known = np.nan_to_num(accountant.rdp, nan=np.inf, posinf=np.inf)
    rounding = [_rounding(event, *point) for point in zip(orders, known, strict=True)]
    return _frozen(np.maximum(known, 0) + rounding)


def _frozen(curve: np.ndarray) -> np.ndarray:
    # A unit in the last place for the operations that made it.
    curve = curve * (1 + CONVERSION)
    curve.setflags(write=False)
    return curve


def _rounding(event: dp_accounting.DpEvent, order: float, found: float) -> float:
    """Return how far `found`, the divergence of `event` at `order`, may be below the truth."""
    if not math.isfinite(found):
        return 0.0
    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        rate, noise = event.sampling_probability, event.event.noise_multiplier
        return of_poisson_sampling(rate, noise, order, found) if 0 < rate < 1 else 0.0
    if isinstance(event, dp_accounting.SampledWithoutReplacementDpEvent):
        rate = event.sample_size / event.source_dataset_size
        return of_sampling_without_replacement(rate, order, found)
    return 0.0


class RdpAccountant:
    """Rényi differential privacy (Mironov 2017), converted by Canonne et al. 2020, Prop. 12.

    Between whole orders dp-accounting bounds the sampled Gaussian from above (it adds the terms
    of an alternating series without their signs). So ε is exact where the best order is whole,
    as it is for ε below about 10, and up to a few percent too large, never too small, beyond.

        >>> from fedpriv.privacy import GaussianMechanism, GlobalClipping, PoissonSampling
        >>> mechanism = GaussianMechanism(noise_multiplier=1.0, clipping=GlobalClipping(0.1))
        >>> event = PoissonSampling(population=1000, expected_cohort=50).event(mechanism)
        >>> accountant = RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE)
        >>> accountant.compose(event, 100)
        >>> round(accountant.epsilon(1e-5), 3)
        4.039
    """

    name = "rdp"

    def __init__(self, adjacency: Adjacency, orders: tuple[float, ...] = ORDERS) -> None:
        self._adjacency = adjacency
        self._orders = orders
        self._counts: Counter[dp_accounting.DpEvent] = Counter()

    def compose(self, event: dp_accounting.DpEvent, count: int = 1) -> None:
        """Add the curve of `event`, `count` times."""
        _rdp_curve(event, self._adjacency, self._orders)
        self._counts[event] += count

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta`."""
        return self._converted(self._counts, delta)[0]

    def best_order(self, delta: float) -> float:
        """Return the Rényi order that gives `epsilon(delta)`."""
        return self._converted(self._counts, delta)[1]

    def delta(self, epsilon: float) -> float:
        """Return δ at `epsilon`."""
        curve = self._curve(self._counts)
        found, order = compute_delta(self._orders, curve, epsilon)
        # Its logarithm is (order - 1)·(divergence - ε ...), rounded like any other number.
        size = order * (float(curve[self._orders.index(order)]) + epsilon + 1)
        return min(1.0, float(found) * math.exp(CONVERSION * size))

    def epsilon_after(self, event: dp_accounting.DpEvent, delta: float, count: int = 1) -> float:
        """Return ε at `delta` as it would be after `count` more of `event`, composing nothing."""
        return self._converted(self._counts + Counter({event: count}), delta)[0]

    def _curve(self, counts: Mapping[dp_accounting.DpEvent, int]) -> np.ndarray:
        """Return the composed curve; by counts, so that no rounding adds up over the rounds."""
        total = np.zeros(len(self._orders))
        for event, count in counts.items():
            total += count * _rdp_curve(event, self._adjacency, self._orders)
        return total * (1 + len(counts) * CONVERSION)

    def _converted(
        self, counts: Mapping[dp_accounting.DpEvent, int], delta: float
    ) -> tuple[float, float]:
        """Return ε at `delta`, rounded up, and its order."""
        if not counts:
            return 0.0, 0.0
        if delta < SMALLEST_DELTA:
            return math.inf, 0.0
        curve = self._curve(counts)
        found, order = (float(value) for value in compute_epsilon(self._orders, curve, delta))
        if not math.isfinite(found):
            return math.inf, order
        # Where δ ≥ √(1 - e^-divergence), which bounds the total variation, ε = 0 holds.
        if found == 0 and np.any(delta**2 * (1 - CONVERSION) + np.expm1(-curve) > 0):
            return 0.0, order
        size = found + 1 + abs(math.log(delta * order)) / (order - 1)
        return found + CONVERSION * size, order


class PldAccountant:
    """Privacy loss distributions: tight, and a few tenths of a second for an answer.

    Events are only counted until an answer is asked for; equal questions are answered from
    memory. Everything is rounded to the safe side but the Fourier transforms that compose: these
    may take from δ what `_rounding` says, so ε is asked for at a δ that is smaller by as much.

        >>> from fedpriv.privacy import GaussianMechanism, GlobalClipping, PoissonSampling
        >>> mechanism = GaussianMechanism(noise_multiplier=1.0, clipping=GlobalClipping(0.1))
        >>> event = PoissonSampling(population=1000, expected_cohort=50).event(mechanism)
        >>> accountant = PldAccountant(Adjacency.ADD_OR_REMOVE_ONE)
        >>> accountant.compose(event, 100)
        >>> round(accountant.epsilon(1e-5), 3)
        3.502
    """

    name = "pld"

    def __init__(self, adjacency: Adjacency, interval: float = INTERVAL) -> None:
        """Answer by a grid of losses `interval` apart: a coarser one is faster, and proves less."""
        self._adjacency = adjacency
        self._interval = interval
        self._counts: Counter[dp_accounting.DpEvent] = Counter()
        self._composed: PrivacyLossDistribution | None = None

    def compose(self, event: dp_accounting.DpEvent, count: int = 1) -> None:
        """Count `event`, `count` times."""
        for part, times in _parts(event, count):
            plain = isinstance(
                part, dp_accounting.GaussianDpEvent | dp_accounting.NonPrivateDpEvent
            )
            sampled = isinstance(
                part, dp_accounting.PoissonSampledDpEvent | RandomAllocationDpEvent
            )
            if isinstance(part, dp_accounting.NoOpDpEvent):
                continue
            replaced = self._adjacency is Adjacency.REPLACE_ONE
            if not (plain or (sampled and not replaced)):
                raise dp_accounting.UnsupportedEventError(
                    f"PLD accounting has no proof for {event} under {self._adjacency.value}"
                )
            self._counts[part] += times
        self._composed = None

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta`; inf where rounding may come to `delta`, which proves nothing."""
        if not self._counts:
            return 0.0
        left = delta - self._rounding
        if left <= 0 or self._without_noise:
            return math.inf
        return float(self._distribution().get_epsilon_for_delta(left)) * (1 + CONVERSION)

    def delta(self, epsilon: float) -> float:
        """Return δ at `epsilon`."""
        if not self._counts:
            return 0.0
        if self._without_noise:
            return 1.0
        found = self._distribution().get_delta_for_epsilon(epsilon)
        return min(1.0, float(found) + self._rounding)

    @property
    def _without_noise(self) -> bool:
        return any(isinstance(event, dp_accounting.NonPrivateDpEvent) for event in self._counts)

    @property
    def _rounding(self) -> float:
        """What transforms may take from δ: twenty times the worst that tests could find.

        It grows with the number of sampled releases, which are composed as a power of one
        transform.
        """
        releases = sum(
            1 if isinstance(event, dp_accounting.GaussianDpEvent) else count
            for event, count in self._counts.items()
        )
        return 1e-13 + 1e-15 * releases

    def _distribution(self) -> PrivacyLossDistribution:
        if self._composed is None:
            counts = _with_one_gaussian(self._counts)
            if len(counts) > 1 and any(isinstance(e, RandomAllocationDpEvent) for e in counts):
                raise NoDistribution(
                    "the losses of random allocation are on a grid of their own, beside which "
                    "nothing else is composed"
                )
            each = [_composed_pld(event, self._interval, count) for event, count in counts.items()]
            self._composed = reduce(lambda one, other: one.compose(other), each)
        return self._composed


def _parts(event: dp_accounting.DpEvent, count: int) -> Iterator[tuple[dp_accounting.DpEvent, int]]:
    """Yield what `count` of `event` are composed of."""
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        yield from _parts(event.event, event.count * count)
    elif isinstance(event, dp_accounting.ComposedDpEvent):
        for each in event.events:
            yield from _parts(each, count)
    else:
        yield event, count


def _with_one_gaussian(
    counts: Mapping[dp_accounting.DpEvent, int],
) -> Mapping[dp_accounting.DpEvent, int]:
    """Return `counts` with all unsampled Gaussians as one: their inverse squares add up."""
    plain = {e: n for e, n in counts.items() if isinstance(e, dp_accounting.GaussianDpEvent)}
    if len(plain) < 2:
        return counts
    inverse_square = math.fsum(n / event.noise_multiplier**2 for event, n in plain.items())
    # Rounded down, for all that was rounded on the way.
    one = dp_accounting.GaussianDpEvent(inverse_square**-0.5 * (1 - CONVERSION))
    return {**{e: n for e, n in counts.items() if e not in plain}, one: 1}


def _composed_pld(
    event: dp_accounting.DpEvent, interval: float, count: int
) -> PrivacyLossDistribution:
    if isinstance(event, RandomAllocationDpEvent):
        return loss_distribution(event).self_compose(count)
    if isinstance(event, dp_accounting.GaussianDpEvent):
        # So many Gaussians are one.
        return _pld_of(event.noise_multiplier / math.sqrt(count), 1.0, interval)
    noise = event.event.noise_multiplier
    return _pld_of(noise, event.sampling_probability, interval).self_compose(count)


# Our events carry the sensitivity 2C of replace-one in their multiplier, as dp-accounting's RDP
# expects. Its PLD would double the sensitivity itself, and count it twice: so no adjacency here.
@lru_cache(maxsize=8)
def _pld_of(noise_multiplier: float, rate: float, interval: float) -> PrivacyLossDistribution:
    """Return the distribution of one release, which takes longer to make than to compose."""
    return sampled_gaussian(noise_multiplier, rate, interval)


#: The accountants by their name in a config.
ACCOUNTANTS: dict[str, Callable[[Adjacency], Accountant]] = {
    "rdp": RdpAccountant,
    "pld": PldAccountant,
}
