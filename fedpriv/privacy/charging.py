"""What releases cost: the smallest ε that has a proof.

Every accountant bounds the same ε from above, so the smallest of their answers is one as well.
Budgets, targets and headlines hold it; what each accountant says stands beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import dp_accounting
from dp_accounting.dp_event import RepeatAndSelectDpEvent

from fedpriv.privacy.accounting import PLD_UP_TO, PldAccountant, RdpAccountant
from fedpriv.privacy.allocation import NoDistribution
from fedpriv.privacy.sampling import Adjacency

#: Accountants by their name in a config; RDP, which costs nothing and knows every event, is always
#: asked.
ALL_ACCOUNTANTS = ("rdp", "pld")

Events = Mapping[dp_accounting.DpEvent, int]


@dataclass(frozen=True)
class Cost:
    """What releases cost at one δ.

    Attributes:
        delta: δ; None where none was ever set, as in a run without privacy.
        epsilon: the smallest ε that has a proof, which budgets are held against; inf without
            privacy.
        accountant: which accountant proves it: rdp or pld.
        epsilon_rdp: ε by RDP.
        best_order: the Rényi order that gives it; None without privacy.
        epsilon_pld: ε by PLD; None where it has no proof, or proves no less than RDP.
        without_pld: why it is None; None where it is not.
    """

    delta: float | None
    epsilon: float
    accountant: Literal["rdp", "pld"]
    epsilon_rdp: float
    best_order: float | None = None
    epsilon_pld: float | None = None
    without_pld: str | None = None


@dataclass(frozen=True)
class Bill:
    """What releases cost.

    Attributes:
        costs: one for each δ that was asked for, in that order; never empty.
    """

    costs: tuple[Cost, ...]

    @property
    def first(self) -> Cost:
        """The cost at the first δ."""
        return self.costs[0]

    @property
    def without_pld(self) -> str | None:
        """Why ε by PLD is missing at some δ; None where it is not."""
        return next((cost.without_pld for cost in self.costs if cost.without_pld), None)


NO_PRIVACY = Cost(
    None, math.inf, "rdp", math.inf, without_pld="no PLD: there is no privacy to account for"
)


def charge(
    events: Events,
    adjacency: Adjacency,
    deltas: Sequence[float],
    accountants: Sequence[str] = ALL_ACCOUNTANTS,
) -> Bill:
    """Return what `events`, each with its number of releases, cost together.

        >>> from fedpriv.privacy import GaussianMechanism, GlobalClipping, PoissonSampling
        >>> mechanism = GaussianMechanism(noise_multiplier=1.0, clipping=GlobalClipping(0.1))
        >>> event = PoissonSampling(population=1000, expected_cohort=50).event(mechanism)
        >>> bill = charge({event: 100}, Adjacency.ADD_OR_REMOVE_ONE, [1e-5])
        >>> round(bill.first.epsilon, 3), bill.first.accountant
        (3.502, 'pld')

    Args:
        events: how many releases there are of each event.
        adjacency: the adjacency of all of them.
        deltas: at least one δ, each in (0, 1).
        accountants: which may be asked, by name; RDP always is.

    Raises:
        UnsupportedEventError: RDP has no proof for an event under `adjacency`.
    """
    return Bill(tuple(_cost(events, adjacency, delta, accountants) for delta in deltas))


def _cost(events: Events, adjacency: Adjacency, delta: float, accountants: Sequence[str]) -> Cost:
    rdp = RdpAccountant(adjacency)
    for event, count in events.items():
        rdp.compose(event, count)
    by_rdp, order = rdp.epsilon(delta), rdp.best_order(delta)
    if "pld" in accountants:
        by_pld, reason = pld_epsilon(events, adjacency, delta, by_rdp)
    else:
        by_pld, reason = None, "no PLD: privacy.accountants does not list it"
    return Cost(
        delta=delta,
        epsilon=by_rdp if by_pld is None else by_pld,
        accountant="rdp" if by_pld is None else "pld",
        epsilon_rdp=by_rdp,
        best_order=order if math.isfinite(by_rdp) else None,
        epsilon_pld=by_pld,
        without_pld=reason,
    )


def pld_epsilon(
    events: Events, adjacency: Adjacency, delta: float, by_rdp: float
) -> tuple[float | None, str | None]:
    """Return ε by PLD where it proves no more than `by_rdp`, and else None and the reason."""
    if math.isinf(by_rdp):
        return None, NO_PRIVACY.without_pld
    if by_rdp > PLD_UP_TO:
        return None, f"no PLD: it is left out where RDP gives an ε above {PLD_UP_TO:g}"
    if any(isinstance(event, RepeatAndSelectDpEvent) for event in events):
        return None, "no PLD: of the best of several trials a price is known by RDP alone"
    charged = frozenset((event, count) for event, count in events.items() if count)
    try:
        epsilon = _composed_epsilon(charged, adjacency, delta)
    except NoDistribution as reason:
        return None, f"no PLD: {reason}"
    except dp_accounting.UnsupportedEventError:
        return None, f"no PLD: it has no proof for this sampling under {adjacency.value}"
    if math.isinf(epsilon):
        return None, (
            f"no PLD at δ = {delta:g}: the rounding of its transforms may come to as much"
        )
    if epsilon > by_rdp:
        return None, f"no PLD at δ = {delta:g}: what it proves there is above what RDP does"
    return epsilon, None


@lru_cache(maxsize=512)
def _composed_epsilon(
    events: frozenset[tuple[dp_accounting.DpEvent, int]], adjacency: Adjacency, delta: float
) -> float:
    """Return ε by PLD; it takes tenths of a second, and the same is asked in several places."""
    accountant = PldAccountant(adjacency)
    for event, count in sorted(events, key=str):
        accountant.compose(event, count)
    return accountant.epsilon(delta)


def fits(
    events: Events,
    adjacency: Adjacency,
    delta: float,
    epsilon: float,
    accountants: Sequence[str] = ALL_ACCOUNTANTS,
) -> bool:
    """Say whether `events` cost at most ε; PLD is asked only where RDP does not say so."""
    if charge(events, adjacency, [delta], ("rdp",)).first.epsilon <= epsilon:
        return True
    return charge(events, adjacency, [delta], accountants).first.epsilon <= epsilon


@dataclass(frozen=True)
class Budget:
    """The (ε, δ) that releases may cost, held against the smallest ε that has a proof.

    Attributes:
        epsilon: ε.
        delta: δ.
        adjacency: the adjacency of the releases.
        accountants: which may be asked.
        at_most: how many releases there will be, where each is like the first.
    """

    epsilon: float
    delta: float
    adjacency: Adjacency
    accountants: tuple[str, ...] = ALL_ACCOUNTANTS
    at_most: int = 1

    def refuses(self, charged: Events, event: dp_accounting.DpEvent) -> Cost | None:
        """Return what `charged` and one more `event` would cost, or None where that fits.

        Releases of one event are counted: how many fit is found once, and remembered. Fewer of
        them are a part of more of them, so they fit as well.
        """
        after = Counter(charged) + Counter({event: 1})
        if len(after) == 1:
            most = max(self.at_most, after[event])
            fit = after[event] <= affordable(event, self, most)
        else:
            fit = fits(after, self.adjacency, self.delta, self.epsilon, self.accountants)
        if fit:
            return None
        return charge(after, self.adjacency, [self.delta], self.accountants).first


@lru_cache(maxsize=64)
def affordable(event: dp_accounting.DpEvent, budget: Budget, at_most: int) -> int:
    """Return how many of `at_most` releases of `event` fit into `budget`, by bisection.

    >>> from fedpriv.privacy import GaussianMechanism, GlobalClipping, PoissonSampling
    >>> mechanism = GaussianMechanism(noise_multiplier=1.0, clipping=GlobalClipping(0.1))
    >>> event = PoissonSampling(population=1000, expected_cohort=50).event(mechanism)
    >>> budget = Budget(epsilon=2.0, delta=1e-5, adjacency=Adjacency.ADD_OR_REMOVE_ONE)
    >>> affordable(event, budget, at_most=1000)
    20
    """

    def fit(count: int, accountants: tuple[str, ...]) -> bool:
        cost = charge({event: count}, budget.adjacency, [budget.delta], accountants).first
        return cost.epsilon <= budget.epsilon

    by_rdp = most_that_fits(lambda count: fit(count, ("rdp",)), 0, at_most)
    if by_rdp == at_most or "pld" not in budget.accountants:
        return by_rdp
    return most_that_fits(lambda count: fit(count, budget.accountants), by_rdp, at_most, near=True)


def most_that_fits(fit: Callable[[int], bool], low: int, high: int, near: bool = False) -> int:
    """Return the largest of `low` to `high` that fits, by bisection; `low` is taken to.

    Whatever is below one that fits must fit too. With `near` it is looked for near `low` first.
    """
    step = max(1, low // 8)
    while near and low + step < high:
        if not fit(low + step):
            high = low + step - 1
            break
        low, step = low + step, 2 * step
    while low < high:
        middle = (low + high + 1) // 2
        if fit(middle):
            low = middle
        else:
            high = middle - 1
    return low
