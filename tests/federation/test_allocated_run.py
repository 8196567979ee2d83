"""Whole runs whose users are allocated to one round of each block, in this process."""

import dataclasses
import json
import sys

import dp_accounting
import numpy as np
import pytest
from in_process import SILOS, InProcessGrid, resume_small, small_config, train_small

from fedpriv import experiment
from fedpriv.errors import BudgetError, InputError, WorkerLost
from fedpriv.federation.payment import Payments
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.privacy import Ledger, calibration, charging
from fedpriv.privacy.accounting import RdpAccountant
from fedpriv.privacy.allocation import RandomAllocationDpEvent, loss_distribution
from fedpriv.privacy.charging import charge
from fedpriv.privacy.ledger import _fields, read_ledger
from fedpriv.privacy.planning import BudgetQuestion, answer
from fedpriv.privacy.sampling import Adjacency
from fedpriv.reporting.ledgers import verify
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.reporting.spent import spent

BLOCK = 3
ALLOCATED = {"privacy__sampling": {"kind": "random_allocation", "rounds": BLOCK}, "rounds": 7}
EVENT = RandomAllocationDpEvent(BLOCK, dp_accounting.GaussianDpEvent(1.0))


def epsilon(blocks, event=EVENT):
    accountant = RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    accountant.compose(event, blocks)
    return accountant.epsilon(1e-3)


def cohorts(grid):
    found = {}
    for message in (m for m in grid.sent if m.metadata.message_type == "train"):
        work = message.content["config"]
        found.setdefault(work["round"], []).extend(work["users"])
    return {round_: sorted(users) for round_, users in found.items()}


def test_everybody_is_in_one_round_of_each_block_and_its_first_round_pays(tmp_path):
    grid = InProcessGrid()
    directory, prepared = train_small(tmp_path / "run", grid, **ALLOCATED)
    drawn = cohorts(grid)
    for first in (1, 4):
        together = [user for i in range(BLOCK) for user in drawn[first + i]]
        assert sorted(together) == list(range(60))
    assert drawn[1] != drawn[4]
    assert prepared.plan.sampling.expected_cohort == 20

    rows = directory.read_metrics()
    by_blocks = [epsilon(blocks) for blocks in (1, 1, 1, 2, 2, 2, 3)]
    assert [row["epsilon"]["rdp"] for row in rows] == pytest.approx(by_blocks, rel=1e-9)
    assert prepared.plan.planned_cost().epsilon == pytest.approx(epsilon(3), rel=1e-9)
    account = spent(read_run(directory.path))
    assert account.disagreements == ()
    assert account.epsilons["rdp"] == pytest.approx(epsilon(3), rel=1e-9)
    assert verify(directory.path).bill.first.epsilon_rdp == pytest.approx(epsilon(3), rel=1e-9)
    text = render([directory.path], "md")
    assert "draws one round of each block of 3, uniformly" in text
    assert "The first round of a block pays for all of it" in text
    assert "its privacy loss distribution, where one is given, PLD_accounting's" in text
    assert "those who do not know in which round a user took part" in text
    assert "each user's round is drawn independently of all others'" in text
    document = json.loads(render([directory.path], "json"))["runs"][0]
    assert document["ledger"]["mechanism"] == "allocated"


def test_a_resumed_run_draws_whom_it_would_have_drawn(tmp_path):
    settings = {**ALLOCATED, "checkpoint__keep": 9}
    whole, prepared = train_small(tmp_path / "whole", **settings)
    train_small(tmp_path / "run", **settings)
    for round_ in (5, 6, 7):
        (tmp_path / "run" / "checkpoints" / f"round-{round_:06d}.safetensors").unlink()
    grid = InProcessGrid()
    _, resumed = resume_small(tmp_path / "run", grid)
    assert resumed.server.parameters().equal(prepared.server.parameters())
    assert list(Ledger.open(tmp_path / "run" / "ledger.jsonl")) == list(Ledger.open(whole.ledger))


def test_a_round_that_is_drawn_afresh_begins_a_block_that_is_paid_for(tmp_path, monkeypatch):
    paid = PrivateFedAvg._paid_release

    def crash(self, *args):
        released = paid(self, *args)
        if self.next_round == 2:
            raise RuntimeError("crash")
        return released

    with monkeypatch.context() as patched:
        patched.setattr(PrivateFedAvg, "_paid_release", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train_small(tmp_path / "run", **{**ALLOCATED, "rounds": 5})
    dying, grid = InProcessGrid(dead=[1]), InProcessGrid()
    with pytest.raises(WorkerLost):
        resume_small(tmp_path / "run", dying)
    directory, _ = resume_small(tmp_path / "run", grid)
    charged = [(each.round, each.attempt, each.slot) for each in Ledger.open(directory.ledger)]
    assert charged == [(1, 0, 1), (2, 0, 2), (2, 1, 1), (3, 0, 2), (4, 0, 3), (5, 0, 1)]
    # The repetition asks whom the first attempt had asked; then everybody is allocated anew.
    sent = [m.content["config"] for m in dying.sent if m.metadata.message_type == "train"]
    assert len(sent) == 4
    second = [user for work in sent[2:] for user in work["users"]]
    later = cohorts(grid)
    assert sorted([*second, *later[3], *later[4]]) == list(range(60))
    row = directory.read_metrics()[-1]
    assert row["epsilon"]["rdp"] == pytest.approx(epsilon(3), rel=1e-9)


def test_a_budget_ends_a_run_before_a_block_that_does_not_fit(tmp_path):
    budget = {**ALLOCATED, "privacy__budget": {"epsilon": epsilon(2) * 1.001}}
    prepared = experiment.prepare(small_config(**budget))
    assert prepared.plan.affordable_rounds() == 6
    with pytest.raises(BudgetError, match="round 7 is not run"):
        train_small(tmp_path / "run", **budget)
    assert len(read_ledger(tmp_path / "run" / "ledger.jsonl").releases) == 6


def test_a_ledger_whose_block_nobody_paid_for_is_refused(tmp_path):
    """A record of a later round of a block costs nothing, so its first must stand before it."""
    directory, _ = train_small(tmp_path / "run", **{**ALLOCATED, "rounds": 4})
    releases = list(Ledger.open(directory.ledger))
    header = read_ledger(directory.ledger).header
    forged = {
        "first": releases[1:],
        "gap": [releases[0], releases[2]],
        "beyond": [*releases[:3], releases[3].__class__(**{**vars(releases[3]), "slot": 4})],
        "cheaper": [
            releases[0],
            releases[1].__class__(**{**vars(releases[1]), "stddev": releases[1].stddev / 2}),
        ],
    }
    for name, lines in forged.items():
        path = tmp_path / f"{name}.jsonl"
        ledger = Ledger.create(path, header)
        for line in lines:
            ledger._write({"kind": "release", **_fields(line)})  # as nobody who appends can
        with pytest.raises(InputError, match=r"no release before|no place in|has noise of"):
            read_ledger(path)


def test_noise_is_calibrated_for_the_blocks_of_a_run():
    config = small_config(**ALLOCATED, privacy__target_epsilon=2.0, privacy__noise_multiplier=None)
    plan = experiment.prepare(config).plan
    assert plan.planned_cost().epsilon == pytest.approx(2.0, abs=1e-3)
    event = plan.mechanism.event()
    assert event.rounds == BLOCK
    assert epsilon(3, event) == pytest.approx(2.0, abs=1e-3)


def test_a_plan_counts_blocks():
    question = BudgetQuestion(
        population=600,
        deltas=(1e-4,),
        rounds=40,
        cohort=60,
        noise_multiplier=1.2,
        sampling="random_allocation",
    )
    found = answer(question)
    event, blocks = found.recipe.charged(40)
    assert (event.rounds, blocks) == (10, 4)
    accountant = RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    accountant.compose(event, blocks)
    assert found.total.first.epsilon_rdp == pytest.approx(accountant.epsilon(1e-4))
    with pytest.raises(InputError, match="a whole number of cohorts"):
        answer(BudgetQuestion(**{**vars(question), "cohort": 70}))
    with pytest.raises(InputError, match="divides the population"):
        answer(BudgetQuestion(**{**vars(question), "solve": "cohort", "epsilon": 3.0}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({**SILOS, "rounds": 3}, "has no proof with unit: example"),
        ({"privacy__noise_by": "nodes"}, "has no proof with noise_by: nodes"),
        ({"privacy__mechanism": {"kind": "correlated", "bands": 2}}, "mechanism.kind: correlated"),
        ({"privacy__error_feedback": {"kind": "user"}}, "error_feedback: user"),
        ({"privacy__adjacency": "replace_one"}, "come or go"),
        ({"runtime__deployment": True}, "forgotten who was allocated"),
        (
            {
                "algorithm": {"name": "scaffold", "bounds": {"control": 0.5}},
                "local": {"steps": 2, "lr": 0.1},
                "privacy__clipping": {"kind": "global", "bound": 0.1},
            },
            "algorithm.name: scaffold has no proof with privacy.sampling.kind: random_allocation",
        ),
    ],
)
def test_what_has_no_proof_is_refused(changes, reason):
    sampling = {"privacy__sampling": {"kind": "random_allocation", "rounds": 3}}
    with pytest.raises(InputError, match=reason):
        small_config(**{**changes, **sampling})


def test_without_its_accountant_it_is_refused(monkeypatch):
    monkeypatch.setattr("fedpriv.federation.plan.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"fedpriv\[allocation\]"):
        experiment.prepare(small_config(**ALLOCATED, privacy__accountants=["rdp", "pld"]))


def test_bounds_that_adapt_are_charged_alike(tmp_path):
    adaptive = {"kind": "adaptive", "bound": 0.1}
    directory, _ = train_small(tmp_path / "run", **ALLOCATED, privacy__clipping=adaptive)
    row = directory.read_metrics()[-1]
    assert row["epsilon"]["rdp"] == pytest.approx(epsilon(3), rel=1e-6)
    assert np.unique([each.bound for each in Ledger.open(directory.ledger)]).size > 1


CALIBRATED = {
    "privacy__sampling": {"kind": "random_allocation", "rounds": BLOCK},
    "privacy__noise_multiplier": None,
    "privacy__target_epsilon": 2.0,
    "privacy__accountants": ["rdp"],
    "rounds": 3,
}


def begun(folder, monkeypatch):
    """A run that died in the second round of its block."""

    def dies(self, draw, released):
        if draw.round == 2:
            raise KeyError("the process dies")
        return paid(self, draw, released)

    paid = Payments.settle
    with monkeypatch.context() as dying:
        dying.setattr(Payments, "settle", dies)
        with pytest.raises(KeyError):
            train_small(folder, InProcessGrid(), **CALIBRATED)
    return folder


@pytest.mark.parametrize("factor", [0.5, 1 - 1e-9])
def test_a_block_does_not_go_on_with_less_noise_than_it_was_begun_with(
    factor, tmp_path, monkeypatch
):
    folder = begun(tmp_path / "run", monkeypatch)
    before = (folder / "ledger.jsonl").read_bytes()
    calibrated = calibration._calibrated
    monkeypatch.setattr(calibration, "_calibrated", lambda *a: factor * calibrated(*a))
    grid = InProcessGrid()
    with pytest.raises(InputError, match="round 2 has noise of multiplier"):
        resume_small(folder, grid)
    assert not any(message.metadata.message_type == "train" for message in grid.sent)
    assert (folder / "ledger.jsonl").read_bytes() == before


def test_a_block_that_goes_on_with_more_noise_costs_the_same_and_is_believed(tmp_path, monkeypatch):
    folder = begun(tmp_path / "run", monkeypatch)
    paid = epsilon_of(folder)
    calibrated = calibration._calibrated
    monkeypatch.setattr(calibration, "_calibrated", lambda *a: (1 + 1e-9) * calibrated(*a))
    resume_small(folder, InProcessGrid())
    assert len(read_ledger(folder / "ledger.jsonl").releases) == 3
    assert epsilon_of(folder) == pytest.approx(paid, rel=1e-12)


def epsilon_of(folder):
    accountant = RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    Ledger.open(folder / "ledger.jsonl").compose_into(accountant)
    return accountant.epsilon(1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "all"},
        {"sampling": "poisson", "slot": 1},
        {"slot": None},
        {"separation": 2},
        {"separation": 4.5},
        {"separation": 0},
        {"expected_cohort": 30.0},
        {"population": 120, "expected_cohort": 40.0},
        {"adjacency": "zero_out"},
        {"adjacency": "replace_one"},
        {"bands": 2},
        {"silos": (1,)},
        {"noise_multiplier": 0.5, "stddev": 0.05},
    ],
    ids=str,
)
def test_no_release_is_appended_that_nobody_has_paid_for(changes, tmp_path):
    directory, _ = train_small(tmp_path / "run", InProcessGrid(), **{**ALLOCATED, "rounds": 2})
    ledger = Ledger.open(directory.ledger)
    before = directory.ledger.read_bytes()
    third = dataclasses.replace(list(ledger)[-1], round=3, slot=3)
    with pytest.raises(InputError, match="round 3"):
        ledger.append(dataclasses.replace(third, **changes))
    assert directory.ledger.read_bytes() == before
    ledger.append(third)


@pytest.mark.parametrize(
    "other",
    [
        dp_accounting.GaussianDpEvent(3.0),
        dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0)),
        RandomAllocationDpEvent(4, dp_accounting.GaussianDpEvent(1.0)),
        RandomAllocationDpEvent(BLOCK, dp_accounting.GaussianDpEvent(2.0)),
    ],
    ids=str,
)
def test_beside_other_releases_a_block_is_accounted_by_rdp(other):
    added = charge({EVENT: 2, other: 1}, Adjacency.ADD_OR_REMOVE_ONE, [1e-3]).first
    rdp = RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    rdp.compose(EVENT, 2)
    rdp.compose(other)
    assert added.accountant == "rdp"
    assert added.epsilon == pytest.approx(rdp.epsilon(1e-3))
    assert "grid of their own" in added.without_pld or "not installed" in added.without_pld


def test_where_pld_cannot_be_had_a_run_that_had_it_is_not_accused(tmp_path, monkeypatch):
    pytest.importorskip("PLD_accounting")
    changes = {**ALLOCATED, "rounds": 3, "privacy__accountants": ["rdp", "pld"]}
    directory, _ = train_small(tmp_path / "run", InProcessGrid(), **changes)
    assert directory.read_metrics()[-1]["epsilon"]["pld"] is not None
    monkeypatch.setitem(sys.modules, "PLD_accounting", None)
    for kept in (loss_distribution, charging._composed_epsilon):
        kept.cache_clear()
    account = spent(read_run(directory.path))
    assert account.disagreements == ()
    assert "pld" not in account.epsilons
