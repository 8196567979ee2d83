"""What releases cost against those who see more than the released models.

ε of a run holds against whoever sees released models and knows neither a share of the noise nor
who was drawn. A node knows who of its own users was drawn, and its own share of the noise where
nodes add it. The server drew the cohorts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedpriv.privacy.accounting import RdpAccountant
from fedpriv.privacy.ledger import Release
from fedpriv.privacy.mechanisms.shares import multiplier_against_a_node
from fedpriv.privacy.sampling import Adjacency


def epsilon_against_a_node(
    releases: Iterable[Release], adjacency: Adjacency, delta: float
) -> float | None:
    """Return the RDP ε of a user at another node against one curious node; None for no privacy.

    Where nodes add the noise it takes its own share off. It knows who of its own users was drawn:
    under Poisson sampling that says nothing of others. Of a fixed number it leaves so many for the
    others, and their chance is not q any more, so there no amplification is claimed.
    """
    seen = []
    for release in releases:
        stddev: float | None = release.stddev
        if release.shares is not None:
            stddev = multiplier_against_a_node(release.stddev, release.shares)
        if stddev is None:
            return None
        left = replace(release, stddev=stddev)
        seen.append(_unsampled(left) if release.sampling == "fixed_size" else left)
    return _epsilon(seen, adjacency, delta)


def epsilon_against_the_server(
    releases: Iterable[Release], adjacency: Adjacency, delta: float
) -> float:
    """Return the RDP ε against a server that sees sums alone, of a user drawn in every round.

    The server draws the cohorts, so sampling hides nobody from it.
    """
    return _epsilon([_unsampled(release) for release in releases], adjacency, delta)


def _unsampled(release: Release) -> Release:
    return replace(release, sampling="all", expected_cohort=None)


def _epsilon(releases: Iterable[Release], adjacency: Adjacency, delta: float) -> float:
    accountant = RdpAccountant(adjacency)
    for release in releases:
        accountant.compose(release.event())
    return accountant.epsilon(delta)
