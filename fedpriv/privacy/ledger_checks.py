"""What a ledger must say to be believed: nothing unknown, and nothing that nobody has paid for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpriv.errors import InputError
from fedpriv.privacy.correlated_checks import uncovered
from fedpriv.privacy.factorizations import MADE
from fedpriv.privacy.sampling import PROVEN, Adjacency
from fedpriv.privacy.turns import SCHEDULE

if TYPE_CHECKING:
    from fedpriv.privacy.ledger import Header, Release

VERSION = 3

_ADJACENCIES = tuple(each.value for each in Adjacency)
# What header and releases may say of themselves: nothing is signed that is not understood.
_KNOWN_OF_HEADER: Mapping[str, tuple[Any, ...]] = {
    "version": (1, 2, VERSION),
    "unit": ("user", "example"),
    "noise_by": ("server", "nodes", "users"),
    "mechanism": ("", "correlated", "allocated", "scheduled"),
    "adjacency": _ADJACENCIES,
}
_KNOWN_OF_RELEASE: Mapping[str, tuple[Any, ...]] = {
    "sampling": (*PROVEN, SCHEDULE),
    "adjacency": _ADJACENCIES,
    "noise_shape": ("spherical", "per_block"),
    "factorization": (None, *MADE),
}


def check_same_run(path: Path, found: Header, expected: Header) -> None:
    """Raise InputError, with what differs, unless `found` is the header of the expected run."""
    if found == expected:
        return
    check_version(path, found)
    if found.outside != expected.outside:
        raise InputError(
            f"{path} was charged with {_listed(found.outside)} from outside, and what is there now "
            f"is {_listed(expected.outside)}: a run continues only with the code that it began with"
        )
    if found.data != expected.data:
        raise InputError(
            f"{path} was charged for other data than there are now, or belongs to another "
            "configuration: a run continues only with the users, and the examples of each user, "
            "that it began with"
        )
    differing = (k for k, v in asdict(expected).items() if getattr(found, k) != v)
    raise InputError(
        f"{path} belongs to another configuration ({next(differing)} differs): "
        "a run continues only with the configuration that it was charged under"
    )


def check_version(path: Path, found: Header) -> None:
    """Raise InputError where another version of fedpriv began the run with the header `found`."""
    if found.version != VERSION:
        raise InputError(
            f"{path} was written by another version of fedpriv, which identified runs by other "
            "facts: the run can be reported on, but not continued"
        )


def _listed(outside: Sequence[str]) -> str:
    return "; ".join(outside) or "nothing"


def require_known(path: Path, header: Header, releases: Sequence[Release]) -> None:
    """Raise InputError where a ledger says something of which this version knows nothing."""
    for record, known in ((header, _KNOWN_OF_HEADER), *((r, _KNOWN_OF_RELEASE) for r in releases)):
        for name, values in known.items():
            if (found := getattr(record, name)) not in values:
                raise InputError(
                    f"{path}: {name} is {found!r}, which this version of fedpriv does not know; "
                    "read it with the version that wrote it"
                )


def require_one_kind(path: Path, header: Header, releases: Sequence[Release]) -> None:
    """Raise InputError where a release is of another mechanism than the header says.

    By the header it is known who pays: of another mechanism's releases it would be somebody else.
    """
    for release in releases:
        kind = release.mechanism
        for name, said in kind.header.items():
            if (found := getattr(header, name)) != said:
                raise InputError(
                    f"{path}: round {release.round} is of mechanism {kind.kind}, and the header "
                    f"says {name} {found!r} where that has {said!r}: edited, dropped or reordered"
                )


def require_begun(path: Path, releases: Sequence[Release]) -> None:
    """Raise InputError where a release costs more than its line says: see `unpaid`."""
    begun: list[Release] = []
    for release in releases:
        if (reason := unpaid(begun, release)) is not None:
            raise InputError(f"{path}: {reason}: edited, dropped or reordered")
        if release.slot == 1:
            begun = []
        begun.append(release)


def unpaid(before: Sequence[Release], release: Release) -> str | None:
    """Return why a release costs more than its line says, by what stands before it; else None.

    `before` are the releases before it, at least those of its block, each paid for. A release of a
    block of rounds that its first one did not pay for, or with less noise than was paid for, is
    dearer; one with more is its block's with noise added afterwards, which costs nothing. So is
    correlated noise that no proof covers.
    """
    if (release.sampling == "random_allocation") != (release.slot is not None):
        return (
            f"round {release.round} has a place in a block of rounds, or none, against its sampling"
        )
    if not _payers_are_there(release):
        return f"round {release.round} says of others than the {release.population:,} that they pay"
    if not _turns_are_told(release):
        return f"round {release.round} says of its silos other steps than a schedule can have"
    if release.slot is None:
        return uncovered(before[0] if before else None, release)
    length = release.separation
    if not (isinstance(length, int) and 1 <= release.slot <= length):
        return f"round {release.round} has no place in a block of {length!r} rounds"
    expected = release.expected_cohort
    if expected is not None and not math.isclose(expected * length, release.population):
        return f"round {release.round} expects other users than one block of {length} rounds has"
    if Adjacency(release.adjacency) not in PROVEN[release.sampling]:
        return f"round {release.round} has no proof under {release.adjacency}"
    if release.silos or release.users or release.shares or release.bands:
        return f"round {release.round} of random allocation says that others pay, or add the noise"
    if release.slot == 1:
        return None
    last = before[-1] if before else None
    if (
        last is None
        or release.attempt
        or (last.slot, last.round) != (release.slot - 1, release.round - 1)
        or _described(last) != _described(release)
    ):
        return (
            f"round {release.round} is recorded as a part of a block of rounds that no release "
            "before it has paid for"
        )
    first = before[1 - release.slot]  # since the last one has been looked at in its turn
    paid, found = (_multiplier(replace(each, slot=1)) for each in (first, release))
    if found < paid:
        return (
            f"round {release.round} has noise of multiplier {found:.12g}, and the block of rounds "
            f"that it is in began with {paid:.12g}"
        )
    return None


def _payers_are_there(release: Release) -> bool:
    """Say whether silos, or users who pay apart, are places in the population, each once."""
    there = release.silos if release.silos is not None else release.users or ()
    known = all(type(each) is int and 0 <= each < release.population for each in there)
    return known and len(set(there)) == len(there)


def _turns_are_told(release: Release) -> bool:
    """Say whether each silo on a schedule has steps of its own, none more than the round's most."""
    if release.turns is None:
        return release.sampling != SCHEDULE
    silos, most = release.silos or (), release.steps or 0
    told = release.sampling == SCHEDULE and len(silos) == len(release.turns) > 0
    return told and all(type(steps) is int and 1 <= steps <= most for steps in release.turns)


def _described(release: Release) -> tuple[Any, ...]:
    names = ("sampling", "adjacency", "population", "expected_cohort", "separation")
    return tuple(getattr(release, name) for name in names)


def _multiplier(release: Release) -> float:
    event = release.event()
    return event.event.noise_multiplier if hasattr(event, "event") else 0.0
