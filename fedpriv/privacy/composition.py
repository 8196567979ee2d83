"""Composition: what releases cost together, within one run and across several.

A run after a run over the same population spends the same users' budget: their releases compose
in sequence, in any order. The users of two runs are assumed to be the same people, which is the
worst case: where they are not, the true ε of each person is smaller. Of runs over silos the one
that has spent most is likewise taken to be the same in all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import dp_accounting

from fedpriv.errors import InputError
from fedpriv.privacy.accounting import PLD_UP_TO, PldAccountant, RdpAccountant
from fedpriv.privacy.ledger import Header, Release
from fedpriv.privacy.sampling import Adjacency
from fedpriv.privacy.silos import most_charged


@dataclass(frozen=True)
class Cost:
    """What releases cost at one δ.

    Attributes:
        delta: δ; None where none was ever set, as in a run without privacy.
        epsilon: ε by RDP, the one that budgets are held against; inf without privacy.
        best_order: the Rényi order that gives `epsilon`; None without privacy.
        epsilon_pld: ε by PLD, tighter; None where it is not known.
    """

    delta: float | None
    epsilon: float
    best_order: float | None = None
    epsilon_pld: float | None = None


@dataclass(frozen=True)
class Bill:
    """What releases cost.

    Attributes:
        costs: one for each δ that was asked for, in that order; never empty.
        without_pld: why `epsilon_pld` is not known; None where it is, or was not asked for.
    """

    costs: tuple[Cost, ...]
    without_pld: str | None = None

    @property
    def first(self) -> Cost:
        """The cost at the first δ."""
        return self.costs[0]


def charge(
    events: Mapping[dp_accounting.DpEvent, int],
    adjacency: Adjacency,
    deltas: Sequence[float],
    tight: bool = True,
) -> Bill:
    """Return what `events`, each with its number of releases, cost together.

    Args:
        events: how many releases there are of each event.
        adjacency: the adjacency of all of them.
        deltas: at least one δ, each in (0, 1).
        tight: whether to compute ε by PLD too, where that has a proof and is affordable.

    Raises:
        UnsupportedEventError: RDP has no proof for an event under `adjacency`.
    """
    rdp = RdpAccountant(adjacency)
    for event, count in events.items():
        rdp.compose(event, count)
    epsilons = [rdp.epsilon(delta) for delta in deltas]
    pld = _tight(events, adjacency, max(epsilons)) if tight else None
    costs = tuple(
        Cost(
            delta=delta,
            epsilon=epsilon,
            best_order=rdp.best_order(delta) if math.isfinite(epsilon) else None,
            epsilon_pld=pld.epsilon(delta) if isinstance(pld, PldAccountant) else None,
        )
        for delta, epsilon in zip(deltas, epsilons, strict=True)
    )
    return Bill(costs, pld if isinstance(pld, str) else None)


def _tight(
    events: Mapping[dp_accounting.DpEvent, int], adjacency: Adjacency, rdp_epsilon: float
) -> PldAccountant | str:
    """Return a PLD accountant charged with `events`, or why there is none."""
    if math.isinf(rdp_epsilon):
        return "no PLD: there is no privacy to account for"
    if rdp_epsilon > PLD_UP_TO:
        return f"no PLD: it is left out where RDP gives an ε above {PLD_UP_TO:g}"
    accountant = PldAccountant(adjacency)
    try:
        for event, count in events.items():
            accountant.compose(event, count)
    except dp_accounting.UnsupportedEventError:
        return f"no PLD: it has no proof for this sampling under {adjacency.value}"
    return accountant


@dataclass(frozen=True)
class Account:
    """What one ledger holds.

    Attributes:
        name: how messages call it, such as its path.
        header: for which run it is.
        releases: every release that it charges, in order.
    """

    name: str
    header: Header
    releases: tuple[Release, ...]

    @property
    def adjacency(self) -> Adjacency:
        """The adjacency of all its events."""
        return Adjacency(self.header.adjacency)

    def events(self) -> Counter[dp_accounting.DpEvent]:
        """Return how many releases there are of each event, for whoever pays most.

        That is every user, or the silo that took part most often.
        """
        return Counter(release.event() for release in most_charged(self.releases))

    def bill(self, delta: float | None) -> Bill:
        """Return what the ledger alone costs at `delta`; without a δ there is no privacy."""
        if delta is None:
            return Bill((Cost(None, math.inf),), "no PLD: there is no privacy to account for")
        return charge(self.events(), self.adjacency, [delta])


@dataclass(frozen=True)
class Merged:
    """Several ledgers as one.

    Attributes:
        accounts: the ledgers.
        bills: what each costs alone, in their order.
        total: what all cost together.
    """

    accounts: tuple[Account, ...]
    bills: tuple[Bill, ...]
    total: Bill


def merge(accounts: Sequence[Account], delta: float | None = None) -> Merged:
    """Compose `accounts` in sequence, as if their populations were the same people.

    Args:
        accounts: at least one ledger; all of one population, unit, adjacency and trust
            model.
        delta: the δ of the answer; by default the one that all ledgers share.

    Raises:
        InputError: ledgers that do not belong together, one given twice, or no common δ.
    """
    _check_belong_together(accounts)
    for one, other in combinations(accounts, 2):
        _check_distinct(one, other)
    delta = _common_delta(accounts) if delta is None else delta
    everything = sum((account.events() for account in accounts), Counter())
    return Merged(
        accounts=tuple(accounts),
        bills=tuple(account.bill(delta) for account in accounts),
        total=charge(everything, accounts[0].adjacency, [delta]),
    )


def _check_belong_together(accounts: Sequence[Account]) -> None:
    first = accounts[0]
    for other in accounts[1:]:
        for field in ("population", "unit", "adjacency", "noise_by"):
            one, two = getattr(first.header, field), getattr(other.header, field)
            if one != two:
                raise InputError(
                    f"{other.name}: its {field} is {two}, that of {first.name} is {one}: "
                    "only ledgers of one population, unit, adjacency and trust model compose"
                )


def _check_distinct(one: Account, other: Account) -> None:
    """Refuse a ledger that is the other or its beginning, and one with the other's noise."""
    shared = min(len(one.releases), len(other.releases))
    same = one.header == other.header and one.releases[:shared] == other.releases[:shared]
    if same and (shared or one.releases == other.releases):
        raise InputError(
            f"{one.name} and {other.name} record the same releases: give each ledger once"
        )
    if _one_source(one.header, other.header):
        raise InputError(
            f"{one.name} and {other.name} have noise from one seed: the difference of their "
            "releases is free of it, and no ε holds for both together; write another seed"
        )


def _one_source(one: Header, other: Header) -> bool:
    """Say whether two runs drew the same cohorts and noise, as far as the headers tell.

    Simulations draw from seed and fingerprint. A header of before deployments were recorded may be
    of a simulation.
    """
    deployed = "deployment" in (one.mode, other.mode)
    return one.fingerprint == other.fingerprint and not deployed


def _common_delta(accounts: Sequence[Account]) -> float:
    deltas = sorted({a.header.delta for a in accounts if a.header.delta is not None})
    if len(deltas) != 1:
        found = ", ".join(f"{delta:g}" for delta in deltas) or "none"
        raise InputError(
            f"--delta: say at which δ; the ledgers have no common one (found: {found})"
        )
    return deltas[0]


@dataclass(frozen=True)
class Group:
    """The releases of a ledger that cost the same.

    Attributes:
        releases: at least one, in order.
    """

    releases: tuple[Release, ...]

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds that were charged, each once, in order."""
        return tuple(sorted({release.round for release in self.releases}))

    @property
    def repeated(self) -> int:
        """How many of the releases charge a round that was charged before."""
        return sum(release.attempt > 0 for release in self.releases)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The smallest and the largest clip bound; None where nothing bounds a contribution."""
        bounds = [release.bound for release in self.releases if release.bound is not None]
        return (min(bounds), max(bounds)) if bounds else None


def grouped(releases: Sequence[Release]) -> Iterator[Group]:
    """Yield `releases` in groups of equal sampling and privacy event, by first appearance."""
    groups: dict[object, list[Release]] = {}
    for release in releases:
        key = (release.sampling, release.population, release.expected_cohort, release.event())
        groups.setdefault(key, []).append(release)
    for group in groups.values():
        yield Group(tuple(group))
