import math
from collections import Counter
from dataclasses import replace

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, pld, rdp

from fedpriv.errors import InputError
from fedpriv.privacy import (
    Adjacency,
    CentralMechanism,
    GaussianMechanism,
    GlobalClipping,
    Header,
    Release,
    Unclipped,
    build_sampling,
)
from fedpriv.privacy.composition import Account, charge, grouped, merge

DELTA = 1e-5
ADD_REMOVE = Adjacency.ADD_OR_REMOVE_ONE
HEADER = Header("abc", 1000, DELTA, ADD_REMOVE.value)


def release(round_: int, noise: float = 1.0, cohort: float = 50.0, digest: str = "d") -> Release:
    rule = GlobalClipping(0.5) if noise else Unclipped()
    mechanism = GaussianMechanism(noise, rule)
    return Release.of(
        round_, 0, CentralMechanism(build_sampling("poisson", 1000, cohort), mechanism), digest
    )


def account(name: str, rounds: int = 5, noise: float = 1.0, **header: object) -> Account:
    releases = tuple(release(round_, noise, digest=name) for round_ in range(1, rounds + 1))
    return Account(name, replace(HEADER, fingerprint=name, **header), releases)


def event(noise: float, cohort: float = 50.0) -> PoissonSampledDpEvent:
    return PoissonSampledDpEvent(cohort / 1000, GaussianDpEvent(noise))


def test_a_bill_is_what_dp_accounting_says():
    bill = charge({event(1.0): 30, event(2.0, 20.0): 7}, ADD_REMOVE, [1e-5, 1e-8])
    for cost in bill.costs:
        by_rdp, by_pld = rdp.RdpAccountant(), pld.PLDAccountant()
        for each in (by_rdp, by_pld):
            each.compose(event(1.0), 30)
            each.compose(event(2.0, 20.0), 7)
        epsilon, order = by_rdp.get_epsilon_and_optimal_order(cost.delta)
        assert (cost.epsilon_rdp, cost.best_order) == (pytest.approx(epsilon, rel=1e-9), order)
        assert (cost.epsilon, cost.accountant) == (cost.epsilon_pld, "pld")
        assert cost.epsilon_pld == pytest.approx(by_pld.get_epsilon(cost.delta), rel=1e-6)


def test_pld_is_left_out_where_it_has_no_proof_or_is_unaffordable():
    fixed = build_sampling("fixed_size", 1000, 50)
    mechanism = GaussianMechanism(1.0, GlobalClipping(1.0))
    unproven = charge({fixed.event(mechanism): 10}, fixed.adjacency, [DELTA])
    assert unproven.first.epsilon_pld is None
    assert "no proof" in str(unproven.without_pld)
    huge = charge({event(0.003): 100}, ADD_REMOVE, [DELTA])
    assert huge.first.epsilon_pld is None
    assert "above 100" in str(huge.without_pld)
    assert charge({event(1.0): 1}, ADD_REMOVE, [DELTA], ("rdp",)).first.epsilon_pld is None


@pytest.mark.parametrize("delta", [1e-9, 1e-12, 1e-14, 1e-15, 1e-100])
def test_pld_proves_no_more_than_rdp_or_says_why_not(delta):
    cost = charge({event(1.0, 10.0): 1000}, ADD_REMOVE, [delta]).first
    assert cost.epsilon <= cost.epsilon_rdp
    if cost.epsilon_pld is None:
        assert (cost.accountant, cost.epsilon) == ("rdp", cost.epsilon_rdp)
        assert f"no PLD at δ = {delta:g}" in str(cost.without_pld)
    else:
        assert (cost.without_pld, cost.epsilon_pld < cost.epsilon_rdp) == (None, True)
    assert (cost.epsilon_pld is None) == (delta < 1e-9)


def test_a_release_without_noise_is_no_privacy():
    bill = account("a", noise=0.0).bill(DELTA)
    assert math.isinf(bill.first.epsilon)
    assert bill.first.best_order is None
    assert math.isinf(account("b").bill(None).first.epsilon)


def test_runs_compose_in_sequence():
    one, other = account("one", 5), account("other", 9, noise=2.0)
    merged = merge([one, other])
    direct = rdp.RdpAccountant()
    direct.compose(event(1.0), 5)
    direct.compose(event(2.0), 9)
    assert merged.total.first.epsilon_rdp == pytest.approx(direct.get_epsilon(DELTA), rel=1e-7)
    assert merged.total.first.epsilon < merged.total.first.epsilon_rdp
    assert [bill.first.epsilon for bill in merged.bills] == [
        each.bill(DELTA).first.epsilon for each in (one, other)
    ]
    tight, alone = merged.total.first.epsilon_pld, merged.bills[0].first.epsilon_pld
    assert tight is not None
    assert alone is not None
    assert alone < tight < merged.total.first.epsilon_rdp


def test_merging_one_ledger_is_that_ledger():
    assert merge([account("one")]).total == account("one").bill(DELTA)


@pytest.mark.parametrize(
    ("field", "value"),
    [("population", 2000), ("unit", "example"), ("adjacency", "replace_one")],
)
def test_ledgers_that_do_not_belong_together_are_refused(field, value):
    with pytest.raises(InputError, match=f"its {field} is"):
        merge([account("one"), account("other", **{field: value})])


def test_a_ledger_given_twice_is_refused():
    one = account("one")
    with pytest.raises(InputError, match="same releases"):
        merge([one, account("other"), replace(one, name="a copy")])
    earlier = replace(one, name="an earlier copy", releases=one.releases[:2])
    with pytest.raises(InputError, match="same releases"):
        merge([earlier, one])


def test_equal_configs_with_other_noise_are_two_runs():
    one = account("one", mode="deployment")
    again = replace(one, releases=tuple(replace(r, digest="other") for r in one.releases))
    assert merge([one, again]).total.first.epsilon > one.bill(DELTA).first.epsilon


def test_delta_must_be_common_or_given():
    one, other = account("one"), account("other", delta=1e-6)
    with pytest.raises(InputError, match="--delta"):
        merge([one, other])
    assert merge([one, other], 1e-7).total.first.delta == 1e-7
    assert merge([one, account("public", noise=0.0, delta=None)]).total.first.epsilon == math.inf
    with pytest.raises(InputError, match="found: none"):
        merge([account("public", delta=None)])


def test_releases_are_grouped_by_what_they_cost():
    releases = [release(1), release(2), release(3, noise=2.0), release(4)]
    repeated = replace(release(4), attempt=1, bound=1.0, stddev=1.0, sensitivity=1.0)
    first, second = grouped([*releases, repeated])
    assert (first.rounds, second.rounds) == ((1, 2, 4), (3,))
    assert (len(first.releases), first.repeated) == (4, 1)
    assert first.bounds == (0.5, 1.0)
    assert next(grouped([release(1, noise=0.0)])).bounds is None
    assert Account("a", HEADER, tuple(releases)).events() == Counter(
        {release(1).event(): 3, release(3, noise=2.0).event(): 1}
    )
