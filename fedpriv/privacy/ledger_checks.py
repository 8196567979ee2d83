"""What a ledger must say to be believed: nothing unknown, and nothing that nobody has paid for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpriv.errors import InputError
from fedpriv.privacy.factorizations import MADE
from fedpriv.privacy.sampling import PROVEN, Adjacency

if TYPE_CHECKING:
    from fedpriv.privacy.ledger import Header, Release

VERSION = 3

_ADJACENCIES = tuple(each.value for each in Adjacency)
# What header and releases may say of themselves: nothing is signed that is not understood.
_KNOWN_OF_HEADER: Mapping[str, tuple[Any, ...]] = {
    "version": (1, 2, VERSION),
    "unit": ("user", "example"),
    "noise_by": ("server", "nodes", "users"),
    "mechanism": ("", "correlated", "allocated"),
    "adjacency": _ADJACENCIES,
}
_KNOWN_OF_RELEASE: Mapping[str, tuple[Any, ...]] = {
    "sampling": tuple(PROVEN),
    "adjacency": _ADJACENCIES,
    "noise_shape": ("spherical", "per_block"),
    "factorization": (None, *MADE),
}


def require_known(path: Path, header: Header, releases: Sequence[Release]) -> None:
    """Raise InputError where a ledger says something of which this version knows nothing."""
    for record, known in ((header, _KNOWN_OF_HEADER), *((r, _KNOWN_OF_RELEASE) for r in releases)):
        for name, values in known.items():
            if (found := getattr(record, name)) not in values:
                raise InputError(
                    f"{path}: {name} is {found!r}, which this version of fedpriv does not know; "
                    "read it with the version that wrote it"
                )


def require_begun(path: Path, releases: Sequence[Release]) -> None:
    """Raise InputError where a release says that an earlier one paid for it, and none did."""
    before: Release | None = None
    for release in releases:
        if release.slot is not None and release.slot != 1:
            first = before and replace(before, slot=1).event()
            follows = before and (before.round + 1, before.separation) == (
                release.round,
                release.separation,
            )
            in_turn = before and before.slot is not None and before.slot + 1 == release.slot
            within = release.separation is not None and 1 < release.slot <= release.separation
            paid = first == replace(release, slot=1).event()
            if not (follows and in_turn and within and paid) or release.attempt:
                raise InputError(
                    f"{path}: round {release.round} is recorded as a part of a block of rounds "
                    "that no release before it has paid for: edited, dropped or reordered"
                )
        before = release
