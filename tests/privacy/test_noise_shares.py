"""Shares of noise: their sum against chi-square, their cost against dp-accounting itself."""

import math
from dataclasses import replace
from itertools import combinations

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from fedpriv.errors import InputError
from fedpriv.privacy import (
    Adjacency,
    CentralMechanism,
    FixedSizeSampling,
    GaussianMechanism,
    GlobalClipping,
    Header,
    Ledger,
    NoiseShares,
    PerLayerClipping,
    PoissonSampling,
    Release,
    SharedMechanism,
    multiplier_against_a_node,
    read_ledger,
)
from fedpriv.privacy.adversaries import epsilon_against_a_node, epsilon_against_the_server
from fedpriv.privacy.composition import Account, merge

DELTA = 1e-5
COORDINATES = 20_000
MECHANISM = GaussianMechanism(1.5, GlobalClipping(0.2))


def has_stddev(noise: torch.Tensor, stddev: float) -> bool:
    """Σx²/σ² of d Gaussians is chi-square with d degrees: two-sided, one in a million."""
    statistic = float((noise / stddev).square().sum())
    low, high = stats.chi2.interval(1 - 1e-6, noise.numel())
    return low < statistic < high


def shares_of(shares: NoiseShares, mechanism=MECHANISM, sizes=(COORDINATES,)) -> list[torch.Tensor]:
    return [
        shares.draw(mechanism, sizes, np.random.default_rng(node)) for node in range(shares.nodes)
    ]


@pytest.mark.parametrize(("nodes", "lost"), [(1, 0), (2, 0), (4, 1), (4, 3)])
def test_the_sum_of_any_shares_that_are_needed_has_the_noise_of_the_mechanism(nodes, lost):
    shares = NoiseShares(nodes, lost)
    drawn = shares_of(shares)
    for chosen in combinations(drawn, nodes - lost):
        assert has_stddev(torch.stack(chosen).sum(0), 1.5 * 0.2)
    everybody = torch.stack(drawn).sum(0)
    assert has_stddev(everybody, 1.5 * 0.2 * math.sqrt(nodes / (nodes - lost)))
    if lost:
        assert not has_stddev(everybody, 1.5 * 0.2)


def test_shares_of_noise_per_block_add_up_in_each_block():
    clipping = PerLayerClipping(0.5, (0.3, 0.4))
    mechanism = GaussianMechanism(2.0, clipping, per_block=True)
    sizes = (COORDINATES, COORDINATES)
    total = torch.stack(shares_of(NoiseShares(3), mechanism, sizes)).sum(0)
    for block, bound in zip(total.split(sizes), clipping.block_bounds, strict=True):
        assert has_stddev(block, 2.0 * math.sqrt(2) * bound)


@pytest.mark.parametrize(("nodes", "lost"), [(2, 2), (1, 3), (2, -1)])
def test_some_share_must_be_left(nodes, lost):
    with pytest.raises(ValueError, match="lost_nodes must be below"):
        NoiseShares(nodes, lost)


def test_a_node_that_takes_its_share_off_leaves_the_noise_that_is_accounted_against_it():
    shares = NoiseShares(4, 1)
    needed = shares_of(shares)[: shares.needed]
    against = multiplier_against_a_node(1.5, shares.needed)
    assert has_stddev(torch.stack(needed).sum(0) - needed[1], against * 0.2)
    assert multiplier_against_a_node(1.5, 1) is None


def release(round_, sampling, shares):
    return Release.of(round_, 0, SharedMechanism(sampling, MECHANISM, shares), "digest")


def by_dp_accounting(event, adjacency, rounds):
    accountant = RdpAccountant(neighboring_relation=adjacency.relation)
    return accountant.compose(event, rounds).get_epsilon(DELTA)


def test_cost_against_a_curious_node_and_a_server_that_sees_sums():
    releases = [release(i, PoissonSampling(1000, 50.0), NoiseShares(4, 1)) for i in (1, 2, 3)]
    adjacency = Adjacency.ADD_OR_REMOVE_ONE
    # A third of the three shares that are surely there is the node's own.
    left = dp_accounting.GaussianDpEvent(1.5 * math.sqrt(2 / 3))
    sampled = dp_accounting.PoissonSampledDpEvent(0.05, left)
    against = epsilon_against_a_node(releases, adjacency, DELTA)
    assert against == pytest.approx(by_dp_accounting(sampled, adjacency, 3), rel=1e-6)
    whole = by_dp_accounting(dp_accounting.GaussianDpEvent(1.5), adjacency, 3)
    against = epsilon_against_the_server(releases, adjacency, DELTA)
    assert against == pytest.approx(whole, rel=1e-6)
    # Released models cost what they cost with central noise.
    central = Release.of(1, 0, CentralMechanism(PoissonSampling(1000, 50.0), MECHANISM), "digest")
    assert releases[0].event() == central.event()


def test_of_a_fixed_number_of_users_a_node_knows_too_much_for_amplification():
    releases = [release(1, FixedSizeSampling(1000, 50), NoiseShares(2))]
    plain = dp_accounting.GaussianDpEvent(1.5 * math.sqrt(1 / 2) / 2)
    against = epsilon_against_a_node(releases, Adjacency.REPLACE_ONE, DELTA)
    expected = by_dp_accounting(plain, Adjacency.REPLACE_ONE, 1)
    assert against == pytest.approx(expected, rel=1e-6)


def test_where_one_share_may_be_all_there_is_nothing_is_said_against_a_node():
    releases = [release(1, PoissonSampling(1000, 50.0), NoiseShares(3, 2))]
    assert epsilon_against_a_node(releases, Adjacency.ADD_OR_REMOVE_ONE, DELTA) is None


HEADER = Header("print", 1000, DELTA, "add_or_remove_one", noise_by="nodes")


def test_the_ledger_says_who_adds_the_noise_and_how_many_shares_are_needed(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.create(path, HEADER)
    ledger.append(release(1, PoissonSampling(1000, 50.0), NoiseShares(4, 1)))
    read = read_ledger(path)
    assert (read.header, read.releases) == (HEADER, tuple(ledger))
    assert read.releases[0].shares == 3
    with pytest.raises(InputError, match="noise_by differs"):
        Ledger.open(path, replace(HEADER, noise_by="server"))


def test_ledgers_of_different_trust_models_do_not_compose():
    releases = (release(1, PoissonSampling(1000, 50.0), NoiseShares(4)),)
    central = Account("central", replace(HEADER, noise_by="server", fingerprint="other"), releases)
    with pytest.raises(InputError, match="trust model"):
        merge([Account("nodes", HEADER, releases), central])
