"""Accountants: from the events of a run to (ε, δ).

The mathematics is dp-accounting's. Added here is what makes it cost microseconds a round: the
Rényi curve of each distinct event is computed once, and composition adds curves.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp
from dp_accounting.rdp.rdp_privacy_accountant import (
    DEFAULT_RDP_ORDERS,
    compute_delta,
    compute_epsilon,
)

from fedpriv.privacy.sampling import Adjacency

# dp-accounting warns for each order at which its series does not converge. It leaves those orders
# out, which can only raise ε, so the warning says nothing that a user could act on.
logging.getLogger("absl").addFilter(lambda record: "Excluding this order" not in record.msg)

#: The Rényi orders, dp-accounting's own, so that our ε is the one that its users get.
ORDERS: tuple[float, ...] = tuple(float(order) for order in DEFAULT_RDP_ORDERS)


_ROUNDING = 1e-12

#: Above this ε a privacy-loss distribution takes seconds and gigabytes, and says nothing of use.
PLD_UP_TO = 100.0


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
    """Return the Rényi divergence of one `event` at `orders`: float64 `[len(orders)]`."""
    accountant = rdp.RdpAccountant(orders, adjacency.relation)
    accountant.compose(event)
    # A divergence below this is lost in the rounding of the series, which can come out as zero or
    # below: ε = 0 would follow. A floor keeps the answer above the truth.
    # Where the noise is so small that the series overflows there is no bound at all.
    known = np.nan_to_num(accountant.rdp, nan=np.inf, posinf=np.inf)
    curve = np.maximum(known, _ROUNDING)
    curve.setflags(write=False)
    return curve


class RdpAccountant:
    """Rényi differential privacy (Mironov 2017), converted by Canonne et al. 2020, Prop. 12.

    Between whole orders dp-accounting bounds the sampled Gaussian from above (it adds the terms
    of an alternating series without their signs). So ε is exact where the best order is whole,
    as it is for ε below about 10, and up to a few percent too large, never too small, beyond.
    """

    name = "rdp"

    def __init__(self, adjacency: Adjacency, orders: tuple[float, ...] = ORDERS) -> None:
        self._adjacency = adjacency
        self._orders = orders
        self._curve = np.zeros(len(orders))

    def compose(self, event: dp_accounting.DpEvent, count: int = 1) -> None:
        """Add the curve of `event`, `count` times."""
        self._curve = self._curve + count * _rdp_curve(event, self._adjacency, self._orders)

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta`."""
        return float(compute_epsilon(self._orders, self._curve, delta)[0])

    def best_order(self, delta: float) -> float:
        """Return the Rényi order that gives `epsilon(delta)`."""
        return float(compute_epsilon(self._orders, self._curve, delta)[1])

    def delta(self, epsilon: float) -> float:
        """Return δ at `epsilon`."""
        return float(compute_delta(self._orders, self._curve, epsilon)[0])

    def epsilon_after(self, event: dp_accounting.DpEvent, delta: float, count: int = 1) -> float:
        """Return ε at `delta` as it would be after `count` more of `event`, composing nothing."""
        curve = self._curve + count * _rdp_curve(event, self._adjacency, self._orders)
        return float(compute_epsilon(self._orders, curve, delta)[0])


class PldAccountant:
    """Privacy loss distributions: tight, and a few tenths of a second for an answer.

    Events are only counted until an answer is asked for; equal questions are answered from
    memory.
    """

    name = "pld"

    def __init__(self, adjacency: Adjacency) -> None:
        self._adjacency = adjacency
        self._counts: Counter[dp_accounting.DpEvent] = Counter()
        self._composed: pld.PLDAccountant | None = None

    def compose(self, event: dp_accounting.DpEvent, count: int = 1) -> None:
        """Count `event`, `count` times."""
        plain = isinstance(event, dp_accounting.GaussianDpEvent | dp_accounting.NonPrivateDpEvent)
        replaced = self._adjacency is Adjacency.REPLACE_ONE
        if (replaced and not plain) or not self._empty().supports(event):
            raise dp_accounting.UnsupportedEventError(
                f"PLD accounting has no proof for {event} under {self._adjacency.value}"
            )
        self._counts[event] += count
        self._composed = None

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta`."""
        return float(self._accountant().get_epsilon(delta))

    def delta(self, epsilon: float) -> float:
        """Return δ at `epsilon`."""
        return float(self._accountant().get_delta(epsilon))

    def _accountant(self) -> pld.PLDAccountant:
        if self._composed is None:
            self._composed = self._empty()
            for event, count in self._counts.items():
                self._composed.compose(event, count)
        return self._composed

    def _empty(self) -> pld.PLDAccountant:
        # Our events carry the sensitivity 2C of replace-one in their multiplier, as dp-accounting's
        # RDP expects. Its PLD doubles the sensitivity itself, and would count it twice.
        if self._adjacency is Adjacency.REPLACE_ONE:
            return pld.PLDAccountant(Adjacency.ADD_OR_REMOVE_ONE.relation)
        return pld.PLDAccountant(self._adjacency.relation)


#: The accountants by their name in a config.
ACCOUNTANTS: dict[str, Callable[[Adjacency], Accountant]] = {
    "rdp": RdpAccountant,
    "pld": PldAccountant,
}
