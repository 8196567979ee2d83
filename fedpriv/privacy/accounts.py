"""What has been spent, by all users together or by each of those who pay apart.

A silo pays for the rounds in which it took part, and no others. Which silo took part when is public
here: it is the schedule, drawn without a look at any data, and no amplification is claimed for it.
A user that adds noise of its own pays in the same way: read "user" for "silo" then.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import dp_accounting
import numpy as np

from fedpriv.privacy.accounting import RdpAccountant
from fedpriv.privacy.charging import Budget, Cost
from fedpriv.privacy.ledger import Release
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.privacy.sampling import Adjacency


@dataclass(frozen=True)
class PayerCosts:
    """RDP ε of the silos at one δ.

    Attributes:
        worst: the largest ε of a silo.
        worst_payer: the first of them that has it.
        median: the median over all silos, those that never took part (ε = 0) among them. Of groups
            of which a user of one may be replaced by one of another: the worst.
    """

    worst: float
    worst_payer: int
    median: float


class Accounts(Protocol):
    """What has been spent."""

    def charge_all(self, releases: Iterable[Release]) -> None:
        """Charge whoever pays for each of `releases`."""
        ...

    def epsilon(self, delta: float) -> float:
        """Return the RDP ε of whoever has spent most, at `delta`."""
        ...

    def costs(self, delta: float) -> PayerCosts | None:
        """Return what those who pay apart have spent; None where nobody does."""
        ...

    def above(self, budget: Budget, release: Release) -> Cost | None:
        """Return what who pays would have spent with one more `release`, where above `budget`."""
        ...


class CommonAccount:
    """The account of all users, who pay for every release together."""

    def __init__(self, adjacency: Adjacency) -> None:
        self._accountant = RdpAccountant(adjacency)
        self._charged: Counter[dp_accounting.DpEvent] = Counter()

    def charge_all(self, releases: Iterable[Release]) -> None:
        """Charge all users for each of `releases`."""
        for release in releases:
            event = release.event()
            if isinstance(event, dp_accounting.NoOpDpEvent):
                continue  # an earlier release has paid for it
            self._accountant.compose(event)
            self._charged[event] += 1

    def epsilon(self, delta: float) -> float:
        """Return the RDP ε of every user at `delta`."""
        return self._accountant.epsilon(delta)

    def costs(self, delta: float) -> None:
        """Return nothing: nobody pays apart."""
        return

    def above(self, budget: Budget, release: Release) -> Cost | None:
        """Return what all would have spent with one more `release`, where above `budget`."""
        event = release.event()
        if isinstance(event, dp_accounting.NoOpDpEvent):
            return None
        return budget.refuses(self._charged, event)


class PayerAccounts:
    """An account for each of `silos` silos under one adjacency of examples.

    `payer` is what pays: see `Mechanism.payer`.
    """

    def __init__(self, adjacency: Adjacency, silos: int, payer: str | None = None) -> None:
        self._adjacency = adjacency
        self._silos = silos
        # A person's group follows from the id. One who is replaced by a person of another group
        # is gone from the rounds of the one and in those of the other.
        self._exchanged = payer == "group" and adjacency is Adjacency.REPLACE_ONE
        # Of those that took part: a population may be large, and most runs have users, not silos.
        self._charged: defaultdict[int, Counter[dp_accounting.DpEvent]] = defaultdict(Counter)

    def charge_all(self, releases: Iterable[Release]) -> None:
        """Charge the silos that took part in each of `releases`.

        Raises:
            ValueError: a release is one that every user pays for.
        """
        alike: Counter[tuple[dp_accounting.DpEvent, tuple[int, ...]]] = Counter()
        for release in releases:
            for event, payers in release.bills():
                if payers is None:
                    raise ValueError("a release that every user pays for has no silos to charge")
                alike[event, tuple(payers)] += 1
        for (event, payers), count in alike.items():
            for silo in payers:
                self._charged[silo][event] += count

    def epsilons(self, delta: float) -> np.ndarray:
        """Return ε of every silo at `delta`: float64 `[silos]`; 0 for one that sent nothing."""
        found: dict[frozenset[tuple[dp_accounting.DpEvent, int]], float] = {frozenset(): 0.0}
        epsilons = np.zeros(self._silos)
        for silo, charged in self._charged.items():
            epsilons[silo] = self._epsilon(charged, delta, found)
        return epsilons

    def epsilon(self, delta: float) -> float:
        """Return the ε of the worst silo at `delta`."""
        return self.costs(delta).worst

    def costs(self, delta: float) -> PayerCosts:
        """Return the worst and the median ε at `delta`."""
        epsilons = self.epsilons(delta)
        worst = int(np.argmax(epsilons))
        median = epsilons[worst] if self._exchanged else np.median(epsilons)
        return PayerCosts(float(epsilons[worst]), worst, float(median))

    def above(self, budget: Budget, release: Release) -> Cost | None:
        """Return the worst cost above `budget` among who pays if each were charged `release`.

        None where all stay within it; those that have paid the same are asked about once.
        """
        asked = {}
        for event, payers in release.bills():
            for paid in (self._charged.get(silo, Counter()) for silo in payers or ()):
                asked[event, frozenset(paid.items())] = paid
        refused = (budget.refuses(paid, event) for (event, _), paid in asked.items())
        return max(filter(None, refused), key=lambda cost: cost.epsilon, default=None)

    def _epsilon(
        self,
        charged: Counter[dp_accounting.DpEvent],
        delta: float,
        found: dict[frozenset[tuple[dp_accounting.DpEvent, int]], float],
    ) -> float:
        """Return ε of what was charged; silos that paid the same are computed once."""
        key = frozenset(charged.items())
        if key not in found:
            accountant = RdpAccountant(self._adjacency)
            for event, count in charged.items():
                accountant.compose(event, count)
            found[key] = accountant.epsilon(delta)
        return found[key]


def accounts_of(mechanism: Mechanism) -> Accounts:
    """Return the accounts of a run of `mechanism`, of whom nobody has spent anything yet."""
    if mechanism.payer is None:
        return CommonAccount(mechanism.adjacency)
    return PayerAccounts(mechanism.adjacency, mechanism.accounts, mechanism.payer)


def most_charged(releases: Sequence[Release]) -> Sequence[Release]:
    """Return the releases that the party with the largest ε pays for.

    Every user pays for every release. Of silos, and of users with noise of their own, it is the
    one that took part most often, since one config gives all its releases one event; of silos on a
    schedule the one with most steps. Where all events are unsampled Gaussians it is the one whose
    inverse squared multipliers add up to most. Where events differ otherwise, all of them: an upper
    bound.
    """
    if any(release.payers is None for release in releases):
        return releases
    alike: Counter[tuple[dp_accounting.DpEvent, tuple[int, ...]]] = Counter()
    for release in releases:
        alike.update((event, tuple(payers or ())) for event, payers in release.bills())
    weigh = _weight_of({event for event, _ in alike})
    if weigh is None:
        return releases
    paid: defaultdict[int, list[float]] = defaultdict(list)
    for (event, payers), count in alike.items():
        for silo in payers:
            paid[silo].append(count * weigh(event))
    if not paid:
        return []
    worst = min(paid, key=lambda silo: (-math.fsum(paid[silo]), silo))
    return [each.billed_to(worst) for each in releases if worst in (each.payers or ())]


def _weight_of(
    events: Collection[dp_accounting.DpEvent],
) -> Callable[[dp_accounting.DpEvent], float] | None:
    """Return what says how much dearer one of `events` is than another; None where nothing does."""
    if all(isinstance(event, dp_accounting.GaussianDpEvent) for event in events):
        return lambda event: float(event.noise_multiplier**-2)
    if len(events) == 1:
        return lambda event: 1.0
    repeated = all(isinstance(event, dp_accounting.SelfComposedDpEvent) for event in events)
    if repeated and len({event.event for event in events}) == 1:
        return lambda event: float(event.count)
    return None
