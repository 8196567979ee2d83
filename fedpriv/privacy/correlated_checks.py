"""What a line of correlated noise must say for its proof to cover it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedpriv.privacy.factorizations import DENSE, on_record
from fedpriv.privacy.sampling import PROVEN, Adjacency

if TYPE_CHECKING:
    from fedpriv.privacy.ledger import Release

# What one matrix, made for one run, leaves alone from round to round.
_OF_THE_RUN = (
    "sampling",
    "adjacency",
    "population",
    "separation",
    "bands",
    "factorization",
    "horizon",
    "noise_shape",
)
# How far numbers may be apart that different machines have computed.
_AGREEMENT = 1e-9


def uncovered(first: Release | None, release: Release) -> str | None:
    """Return why no proof covers a release, if it is of correlated noise; None where one does.

    `first` is the first release of the run, or one that agrees with it; None where this is it.
    """
    if release.bands is None:
        if release.group is not None:
            return f"round {release.round} has a group that pays, and no correlated noise"
        return None
    if (reason := _no_groups(release) or _wrong_payers(release)) is not None:
        return reason
    if first is None:
        if _has_a_matrix(release):
            return None
        return f"round {release.round} records no matrix that correlated noise is made with"
    for name in _OF_THE_RUN:
        if getattr(first, name) != getattr(release, name):
            return _changed(name, release)
    return None if _alike(first, release) else _changed("noise, bound or parameters", release)


def _changed(what: str, release: Release) -> str:
    return (
        f"round {release.round} has other {what} than the run began with, and correlated noise "
        "that is made in two ways takes back what was never added"
    )


def _no_groups(release: Release) -> str | None:
    """Return why there are no groups of users that a proof is about."""
    round_, sampling = release.round, release.sampling
    if sampling not in ("poisson", "min_separation"):
        return f"round {round_} has correlated noise, which has no proof with {sampling} sampling"
    if Adjacency(release.adjacency) not in PROVEN[sampling]:
        return f"round {round_} has no proof under {release.adjacency}"
    if release.factorization in DENSE and sampling == "poisson":
        return (
            f"round {round_} has factorization {release.factorization}, which has no proof with "
            "poisson sampling"
        )
    if not _counted(release.bands) or (sampling == "poisson") != (release.separation is None):
        return f"round {round_} has no groups of users that fit its sampling"
    groups = _groups(release)
    if not _counted(groups) or groups * (release.expected_cohort or 0.0) > release.population:
        return f"round {round_} cannot draw its cohort from one of {groups!r} groups"
    return None


def _wrong_payers(release: Release) -> str | None:
    """Return why others pay than those whose rounds the proof counts."""
    round_, groups = release.round, _groups(release)
    if release.silos or release.users or release.shares or release.counts:
        return f"round {round_} of correlated noise says that others pay, add noise, or are counted"
    if not _counted(round_) or release.group != (round_ - 1) % groups:
        return (
            f"round {round_!r} draws from group {release.group!r} of {groups}, and rounds take "
            "the groups in turn, from group 0 on"
        )
    return None


def _groups(release: Release) -> int:
    """Return how many groups users of a release of correlated noise are in."""
    assert release.bands is not None
    return release.separation or release.bands


def _counted(number: object) -> bool:
    return isinstance(number, int) and number >= 1


def _has_a_matrix(release: Release) -> bool:
    """Say whether the numbers on record make a matrix of the kind and size that is named."""
    name, parameters, bands = release.factorization, release.parameters, release.bands
    assert bands is not None
    if name is None or (name not in DENSE and parameters is None):
        return True  # follows from its bands, or was recorded by a version that left them out
    if not parameters or not all(map(math.isfinite, parameters)):
        return False
    if name not in DENSE:
        norm = math.fsum(number * number for number in parameters)
        return len(parameters) <= bands and parameters[0] > 0 and norm <= 1 + _AGREEMENT
    long = 2 * bands if name == "blt" else bands
    if len(parameters) != long or not _counted(release.horizon) or parameters[0] == 0:
        return False
    horizon = release.horizon or 0
    with np.errstate(all="ignore"):
        column = on_record(name, parameters, horizon).column(horizon)
    return bool(np.isfinite(column).all() and column[0] > 0)


def _alike(first: Release, release: Release) -> bool:
    one, other = _numbers(first), _numbers(release)
    if one == other:
        return True
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=_AGREEMENT) for a, b in zip(one, other, strict=True)
    )


def _numbers(release: Release) -> tuple[float, ...]:
    payloads = tuple(number for _, *numbers in release.payloads or () for number in numbers)
    return (release.stddev, release.bound or 0.0, *payloads, *(release.parameters or ()))
