"""Our accountant in Flower's own wrappers: what it charges, when, and what it proves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from flower_apps import app_of, node_of, start_record
from flwr.app import ArrayRecord
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)

from fedpriv.errors import InputError
from fedpriv.federation.grids.local import LocalGrid
from fedpriv.flower import PrivacyAccountant
from fedpriv.privacy.composition import Account, merge
from fedpriv.privacy.ledger import Ledger, read_ledger

Z, CLIENTS, ROUNDS, DELTA = 2.0, 6, 3, 1e-3
EVENT = GaussianPrivacyEvent(Z, CLIENTS, CLIENTS)


def accountant(path: Path, **changes: Any) -> PrivacyAccountant:
    given = {"population": CLIENTS, "delta": DELTA, "clipping_norm": 0.5, "ledger": path}
    return PrivacyAccountant(**{**given, **changes})


def flowers_own(**changes: Any) -> RdpAccountant:
    config = {
        "target_delta": DELTA,
        "population_size": CLIENTS,
        "neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "sampling_method": SamplingMethod.NO_AMPLIFICATION,
    }
    return RdpAccountant(PrivacyConfig(**{**config, **changes}))


def wrapper(
    own: Any, kind: Any = DifferentialPrivacyServerSideFixedClipping, strategy: Any = None
) -> Any:
    fedavg = strategy or FedAvg(fraction_evaluate=0.0, min_available_nodes=CLIENTS)
    return kind(fedavg, Z, 0.5, CLIENTS, accountant=own)


def alike(trained: list[int]) -> LocalGrid:
    """Nodes with one example each: Flower accounts for equal weights alone."""
    app = app_of(trained, mods=[])

    def train(message, context):
        reply = app(message, context)
        reply.content["metrics"]["num-examples"] = 1
        return reply

    return LocalGrid(CLIENTS, node_of(train))


def test_in_flowers_own_wrapper_every_release_is_charged_and_claimed_for_what_holds(tmp_path):
    """Flower's figure is that of a node whose update becomes zero; one exchanged costs z/2."""
    own, theirs = accountant(tmp_path / "a.jsonl"), flowers_own()
    zero = accountant(tmp_path / "zero.jsonl", adjacency="zero_out")
    for each in (own, theirs, zero):
        wrapper(each).start(alike([]), start_record(), num_rounds=ROUNDS)
    exact = pld.PLDAccountant()
    exact.compose(dp_accounting.GaussianDpEvent(Z / 2), ROUNDS)
    spent = own.get_privacy_spent()
    assert spent.epsilon == pytest.approx(exact.get_epsilon(DELTA), rel=1e-5)
    assert (spent.num_releases, spent.accounting_method) == (ROUNDS, "pld")
    by_flower = theirs.get_privacy_spent().epsilon
    assert zero.get_privacy_spent().epsilon < by_flower < spent.epsilon
    # By RDP alone, for the same neighbours, the two are one number.
    plain = rdp.RdpAccountant()
    plain.compose(dp_accounting.GaussianDpEvent(Z), ROUNDS)
    assert by_flower == pytest.approx(plain.get_epsilon(DELTA), rel=1e-9)
    assert zero._cost(DELTA).epsilon_rdp == pytest.approx(by_flower, rel=1e-9)


def test_the_wrapper_with_clipping_at_clients_charges_too(tmp_path):
    from flwr.clientapp.mod import fixedclipping_mod

    app = app_of([], mods=[fixedclipping_mod])

    def train(message, context):
        reply = app(message, context)
        reply.content["metrics"]["num-examples"] = 1
        return reply

    own = accountant(tmp_path / "a.jsonl")
    dp = wrapper(own, DifferentialPrivacyClientSideFixedClipping)
    dp.start(LocalGrid(CLIENTS, node_of(train)), start_record(), num_rounds=2)
    assert own.num_releases == 2


def test_a_release_is_on_the_disk_before_the_wrapper_hands_it_on(tmp_path):
    path, seen = tmp_path / "a.jsonl", []

    def look(round_: int, arrays: ArrayRecord) -> None:
        seen.append(len(read_ledger(path).releases))

    dp = wrapper(accountant(path))
    dp.start(alike([]), start_record(), num_rounds=2, evaluate_fn=look)
    assert seen == [0, 1, 2]


def test_an_app_that_is_started_again_goes_on_with_its_ledger(tmp_path):
    path = tmp_path / "a.jsonl"
    accountant(path).compose(EVENT, 2)
    again = accountant(path)
    again.compose(EVENT)
    assert again.num_releases == 3
    fresh = accountant(tmp_path / "b.jsonl")
    fresh.compose(EVENT, 3)
    assert again.get_epsilon(DELTA) == fresh.get_epsilon(DELTA)
    again.load_state_dict(json.loads(json.dumps(again.state_dict())))
    with pytest.raises(ValueError, match="lacks"):
        accountant(tmp_path / "c.jsonl").load_state_dict(again.state_dict())
    with pytest.raises(InputError, match="differs"):
        accountant(path, population=7)
    with pytest.raises(InputError, match="differs"):
        accountant(path, adjacency="zero_out")


def test_the_budget_is_held_against_the_smallest_epsilon_with_a_proof(tmp_path):
    from flwr.serverapp.exception import PrivacyBudgetExhausted

    costs = []
    free = accountant(tmp_path / "free.jsonl")
    for _ in range(4):
        free.compose(EVENT)
        costs.append(free.get_epsilon(DELTA))
    own = accountant(tmp_path / "a.jsonl", max_epsilon=(costs[2] + costs[3]) / 2)
    with pytest.raises(PrivacyBudgetExhausted):
        wrapper(own).start(alike([]), start_record(), num_rounds=6)
    assert own.num_releases == 3
    assert own.would_exceed(EVENT)
    assert not own.would_exceed(EVENT, max_epsilon=costs[3])
    assert own.would_exceed(EVENT, max_epsilon=costs[3], count=2)


def test_delta_is_never_below_the_truth(tmp_path):
    own = accountant(tmp_path / "a.jsonl")
    assert own.get_epsilon(DELTA) == 0
    own.compose(EVENT, ROUNDS)
    epsilon = own.get_epsilon(DELTA)
    assert own.get_delta(epsilon) == pytest.approx(DELTA, rel=1e-3)
    assert own.get_delta(epsilon) >= DELTA * (1 - 1e-9)


def test_what_is_not_earned_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not earned"):
        accountant(tmp_path / "a.jsonl", adjacency="add_or_remove_one")
    with pytest.raises(InputError, match="below 1/population"):
        accountant(tmp_path / "a.jsonl", delta=0.2)
    with pytest.raises(InputError, match="target_delta"):
        accountant(tmp_path / "a.jsonl", delta=2.0)
    with pytest.raises(ValueError, match="population_size"):
        accountant(tmp_path / "a.jsonl").compose(GaussianPrivacyEvent(Z, 2, 9))
    # Flower itself: no amplification, and FedAvg alone.
    sampled = flowers_own(
        sampling_method=SamplingMethod.WITHOUT_REPLACEMENT,
        neighboring_relation=NeighboringRelation.REPLACE_ONE,
    )
    with pytest.raises(ValueError, match="no-amplification"):
        wrapper(sampled)
    assert accountant(tmp_path / "b.jsonl").config.sampling_method is (
        SamplingMethod.NO_AMPLIFICATION
    )


def test_two_apps_of_equal_settings_add_up_and_one_counts_once(tmp_path):
    accounts = []
    for name in ("a", "b"):
        accountant(tmp_path / "new" / f"{name}.jsonl").compose(EVENT, 2)
        file = read_ledger(tmp_path / "new" / f"{name}.jsonl")
        accounts.append(Account(name, file.header, file.releases))
    both = accountant(tmp_path / "both.jsonl")
    both.compose(EVENT, 4)
    assert merge(accounts).total.first.epsilon == both.get_epsilon(DELTA)
    with pytest.raises(InputError, match="give each ledger once"):
        merge([accounts[0], accounts[0]])


def test_a_ledger_that_died_as_it_began_is_begun_again_and_none_is_overwritten(tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"kind": "head')
    assert accountant(tmp_path / "torn.jsonl").num_releases == 0
    for mine in ("mine\n", "mine"):
        (tmp_path / "other.jsonl").write_text(mine)
        with pytest.raises(InputError, match="not a fedpriv ledger"):
            accountant(tmp_path / "other.jsonl")
        assert (tmp_path / "other.jsonl").read_text() == mine
    with pytest.raises(InputError, match="cannot write"):
        accountant(tmp_path / "other.jsonl" / "in_a_file.jsonl")


def test_its_ledger_is_one_of_ours(tmp_path):
    accountant(tmp_path / "a.jsonl").compose(EVENT, 2)
    ledger = Ledger.open(tmp_path / "a.jsonl")
    assert [release.round for release in ledger] == [1, 2]
    assert {(r.bound, r.stddev, r.sensitivity) for r in ledger} == {(0.5, 1.0, 1.0)}
