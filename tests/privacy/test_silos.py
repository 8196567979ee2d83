"""What silos spend: against dp-accounting itself, and the ledger that it is read from."""

import json
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant

from fedpriv.errors import InputError
from fedpriv.privacy import (
    Adjacency,
    CentralMechanism,
    CountNoise,
    ExampleLevel,
    GaussianMechanism,
    GlobalClipping,
    Header,
    Ledger,
    PayerAccounts,
    PoissonSampling,
    Release,
    SiloMechanism,
    most_charged,
    read_ledger,
)
from fedpriv.privacy.charging import Budget

DELTA, Z, Q, STEPS = 1e-4, 1.1, 0.05, 20
LEVEL = ExampleLevel(GaussianMechanism(Z, GlobalClipping(0.4)), Q, STEPS, silo_size=100)
TOOK_PART = [(0, 2), (2,), (), (0, 1, 2)]


def release(round_, silos):
    return Release.of(round_, 0, SiloMechanism.of(PoissonSampling(4, 2.0), LEVEL), "digest", silos)


RELEASES = [release(i, silos) for i, silos in enumerate(TOOK_PART, start=1)]


def by_dp_accounting(rounds):
    accountant = RdpAccountant()
    gaussian = dp_accounting.GaussianDpEvent(Z)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(Q, gaussian), rounds * STEPS)
    return accountant.get_epsilon(DELTA)


def test_each_silo_pays_for_the_steps_of_the_rounds_in_which_it_took_part():
    accounts = PayerAccounts(Adjacency.ADD_OR_REMOVE_ONE, 4)
    accounts.charge_all(RELEASES)
    expected = [by_dp_accounting(2), by_dp_accounting(1), by_dp_accounting(3), 0.0]
    np.testing.assert_allclose(accounts.epsilons(DELTA), expected, rtol=1e-9)
    costs = accounts.costs(DELTA)
    assert (costs.worst, costs.worst_payer) == (pytest.approx(by_dp_accounting(3)), 2)
    assert costs.median == pytest.approx((by_dp_accounting(1) + by_dp_accounting(2)) / 2)
    within = Budget(by_dp_accounting(3) * 1.001, DELTA, Adjacency.ADD_OR_REMOVE_ONE, ("rdp",), 4)
    below = replace(within, epsilon=by_dp_accounting(3) * 0.999)
    assert accounts.above(within, release(9, [0, 3])) is None
    refused = accounts.above(below, release(9, [0, 3]))
    assert refused is not None
    assert refused.epsilon == pytest.approx(by_dp_accounting(3))
    assert accounts.above(below, release(9, [3])) is None
    assert accounts.above(below, release(9, [])) is None


def test_what_the_worst_silo_pays_for_is_found_among_the_releases():
    assert [each.round for each in most_charged(RELEASES)] == [1, 2, 4]
    assert most_charged(RELEASES[2:3]) == []


def test_where_events_differ_or_all_pay_nothing_is_left_out():
    other = replace(release(5, (1,)), stddev=2 * RELEASES[0].stddev)
    assert most_charged([*RELEASES, other]) == [*RELEASES, other]
    everybodys = Release.of(
        5, 0, CentralMechanism(PoissonSampling(4, 2.0), LEVEL.mechanism), "digest"
    )
    assert most_charged([*RELEASES, everybodys]) == [*RELEASES, everybodys]
    with pytest.raises(ValueError, match="every user pays for"):
        PayerAccounts(Adjacency.ADD_OR_REMOVE_ONE, 4).charge_all([everybodys])


@pytest.mark.parametrize("multiplier", [0.25, 1.0])
def test_bounds_that_adapt_leave_one_event_so_that_the_worst_silo_is_found(multiplier):
    """Also where the last bits of σ and C would decide between two roundings."""
    counts = CountNoise(1, stddev=5.0)
    level = ExampleLevel(
        GaussianMechanism(multiplier, GlobalClipping(1.0), counts), Q, STEPS, silo_size=100
    )
    bounds = np.random.default_rng(0).lognormal(sigma=5.0, size=100)
    releases = [
        Release.of(
            i,
            0,
            SiloMechanism.of(PoissonSampling(4, 2.0), level).at([bound]),
            "digest",
            (i % 2, 2),
        )
        for i, bound in enumerate(bounds, start=1)
    ]
    assert len({release.bound / release.stddev for release in releases}) > 1
    assert len({release.event() for release in releases}) == 1
    alone = [replace(each, silos=(each.round % 2,)) for each in releases]
    assert {each.round % 2 for each in most_charged(alone)} == {0}


def test_a_ledger_keeps_who_paid_and_refuses_a_line_without_its_steps(tmp_path):
    path = tmp_path / "ledger.jsonl"
    header = Header("print", 4, DELTA, "add_or_remove_one", unit="example")
    ledger = Ledger.create(path, header)
    for each in RELEASES:
        ledger.append(each)
    assert read_ledger(path).releases == tuple(RELEASES)
    assert json.loads(path.read_text().splitlines()[1])["silos"] == [0, 2]
    ledger._write({"kind": "release", **RELEASES[0].__dict__, "steps": None})
    with pytest.raises(InputError, match="another version"):
        read_ledger(path)


def test_samples_are_poisson():
    generator = np.random.default_rng(0)
    sizes = [len(LEVEL.draw(400, generator)) for _ in range(2000)]
    assert np.mean(sizes) == pytest.approx(400 * Q, abs=0.4)
    assert np.var(sizes) == pytest.approx(400 * Q * (1 - Q), rel=0.15)


def test_parties_that_never_took_part_take_no_memory():
    accounts = PayerAccounts(Adjacency.ADD_OR_REMOVE_ONE, 10**12)
    accounts.charge_all([release(1, [10**12 - 1])])
    budget = Budget(1e-6, 1e-5, Adjacency.ADD_OR_REMOVE_ONE, ("rdp",))
    once, twice = (accounts.above(budget, release(2, [silo])) for silo in (5, 10**12 - 1))
    assert once is not None
    assert twice is not None
    assert 0 < once.epsilon < twice.epsilon
