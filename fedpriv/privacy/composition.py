"""Composition: what releases cost together, within one run and across several.

A run after a run over the same population spends the same users' budget: their releases compose
in sequence, in any order. The users of two runs are assumed to be the same people, which is the
worst case: where they are not, the true ε of each person is smaller. Of runs over silos the one
that has spent most is likewise taken to be the same in all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import dp_accounting

from fedpriv.errors import InputError
from fedpriv.privacy.accounts import most_charged
from fedpriv.privacy.charging import NO_PRIVACY, Bill, charge
from fedpriv.privacy.ledger import Header, Release
from fedpriv.privacy.sampling import Adjacency
from fedpriv.privacy.trials import Tuning


@dataclass(frozen=True)
class Account:
    """What one ledger holds.

    Attributes:
        name: how messages call it, such as its path.
        header: for which run it is.
        releases: every release that it charges, in order.
        ahead: those that it also answers for, since its run ended early by what it had released,
            and might have made them (docs/privacy.md, "The best model, and when to end").
        tunings: of the best of several trials, those that it was chosen by; its release then costs
            what they cost, and not what it was charged itself (docs/privacy.md, "Tuning").
    """

    name: str
    header: Header
    releases: tuple[Release, ...]
    ahead: tuple[Release, ...] = ()
    tunings: tuple[Tuning, ...] = ()

    @property
    def adjacency(self) -> Adjacency:
        """The adjacency of all its events."""
        return Adjacency(self.header.adjacency)

    def events(self) -> Counter[dp_accounting.DpEvent]:
        """Return what it costs, in events: its own, or those of the tunings that chose it."""
        if self.tunings:
            return Counter(tuning.event() for tuning in self.tunings)
        return self.own_events()

    def own_events(self) -> Counter[dp_accounting.DpEvent]:
        """Return how many releases there are of each event, for whoever pays most.

        That is every user, or the silo that took part most often.
        """
        answered_for = (*self.releases, *self.ahead)
        return Counter(release.event() for release in most_charged(answered_for))

    def bill(self, delta: float | None) -> Bill:
        """Return what the ledger alone costs at `delta`; without a δ there is no privacy."""
        if delta is None:
            return Bill((NO_PRIVACY,))
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
    if {each.source for each in one.tunings} & {each.source for each in other.tunings}:
        raise InputError(
            f"{one.name} and {other.name} were chosen by one tuning, or by two that began with one "
            "seed, of which no ε is known together; give the later one of a folder alone, whose ε "
            "is that of all tunings there, or tune with another seed"
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
    """Yield `releases` in groups of equal sampling and privacy event, by first appearance.

    Rounds of one dense matrix, each of which has a share of one event, are one group, and so are
    those of blocks whose first rounds pay for all.
    """
    groups: dict[object, list[Release]] = {}
    for release in releases:
        paid = replace(release, slot=release.slot and 1)
        event = release.parameters or paid.event()
        key = (release.sampling, release.population, release.expected_cohort, event)
        groups.setdefault(key, []).append(release)
    for group in groups.values():
        yield Group(tuple(group))
