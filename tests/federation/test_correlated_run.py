"""Whole runs with correlated noise, in this process."""

import json

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from in_process import SILOS, BreaksIn, InProcessGrid, resume_small, small_config, train_small
from scipy.linalg import toeplitz

from fedpriv import experiment
from fedpriv.errors import BudgetError, InputError
from fedpriv.federation.plan import workload_of
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.privacy import CorrelatedMechanism, Ledger, Purpose, Workload
from fedpriv.privacy import factorizations as matrices
from fedpriv.privacy.band_planning import best, choices, chosen
from fedpriv.privacy.factorizations import Banded, Buffered, InverseBanded
from fedpriv.privacy.mechanisms.correlated import group_of
from fedpriv.privacy.planning import BudgetQuestion, answer
from fedpriv.reporting.ledgers import verify
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.reporting.spent import spent

BANDS, SIGMA = 3, 0.1
CORRELATED = {"privacy__mechanism": {"kind": "correlated", "bands": BANDS}, "rounds": 7}
#: Next to nothing is learnt, and parameters move by the noise alone.
NOISE_ALONE = {**CORRELATED, "local__lr": 1e-6, "server": {"optimizer": "sgd", "lr": 1.0}}


def parameters(prepared):
    return prepared.server.parameters().double()


def noise(prepared, first, attempts):
    """Σ of the noise of rounds from `first` on, by matrices alone."""
    size, rounds = prepared.plan.layout.total, len(attempts)
    series = np.array([1, 1 / 2, 3 / 8])[: min(BANDS, rounds)]
    column = np.zeros(rounds)
    column[: len(series)] = series / np.linalg.norm([1, 1 / 2, 3 / 8])
    generators = [
        prepared.plan.randomness.numpy(Purpose.NOISE, first + i, attempt)
        for i, attempt in enumerate(attempts)
    ]
    standard = np.array([generator.standard_normal(size) for generator in generators])
    rows = np.linalg.inv(toeplitz(column, np.zeros(rounds))) @ standard
    return torch.from_numpy(SIGMA * rows.sum(0))


def test_a_run_adds_row_after_row_and_each_group_pays_for_its_own(tmp_path):
    grid = InProcessGrid()
    directory, prepared = train_small(tmp_path / "run", grid, **NOISE_ALONE)
    before = parameters(experiment.prepare(prepared.config))
    moved = before - parameters(prepared)
    torch.testing.assert_close(moved, noise(prepared, 1, [0] * 7) / 8, rtol=1e-4, atol=1e-5)

    ids = prepared.trainer.dataset.user_ids
    for message in (m for m in grid.sent if m.metadata.message_type == "train"):
        work = message.content["config"]
        assert {group_of(ids[user], BANDS) for user in work["users"]} <= {(work["round"] - 1) % 3}

    # Rounds 1, 4 and 7 draw from the first group.
    event = dp_accounting.PoissonSampledDpEvent(3 * 8 / 60, dp_accounting.GaussianDpEvent(1.0))
    epsilon = RdpAccountant().compose(event, 3).get_epsilon(1e-3)
    assert prepared.plan.planned_cost().epsilon == pytest.approx(epsilon, rel=1e-9)
    rows = directory.read_metrics()
    assert rows[-1]["epsilon"]["rdp"] == pytest.approx(epsilon, rel=1e-9)
    assert [row["epsilon"]["rdp"] for row in rows[1:3]] == [rows[0]["epsilon"]["rdp"]] * 2
    assert rows[-1]["groups"]["worst_group"] == 0
    two = RdpAccountant().compose(event, 2).get_epsilon(1e-3)
    assert rows[-1]["groups"]["median"] == pytest.approx(two, rel=1e-9)

    account = spent(read_run(directory.path))
    assert account.disagreements == ()
    assert account.epsilons["rdp"] == pytest.approx(epsilon, rel=1e-9)
    assert verify(directory.path).bill.first.epsilon_rdp == pytest.approx(epsilon, rel=1e-9)
    text = render([directory.path], "md")
    for said in ("row t of C⁻¹Z", "one of 3 groups", "worst group (number 0)", "correlated noise"):
        assert said in text
    document = json.loads(render([directory.path], "json"))["runs"][0]
    assert document["ledger"]["mechanism"] == "correlated"
    assert document["groups"]["worst_group"] == 0


def test_what_stands_beside_the_update_is_the_noise_of_the_round(tmp_path):
    """It grows while nothing is taken back yet, and never above what C⁻¹ says."""
    directory, prepared = train_small(tmp_path / "run", **{**NOISE_ALONE, "evaluation__every": 9})
    sizes = np.array(prepared.plan.layout.sizes)
    for row in directory.read_metrics():
        measured = np.array(list(row["released_block_norms"].values()))
        expected = np.array(list(row["noise_block_norms"].values()))
        many = sizes >= 64
        np.testing.assert_allclose(measured[many], expected[many], rtol=0.35)


def test_a_resumed_run_makes_the_noise_again_that_it_goes_on_from(tmp_path):
    settings = {**CORRELATED, "checkpoint__keep": 9}
    whole, prepared = train_small(tmp_path / "whole", **settings)
    train_small(tmp_path / "run", **settings)
    for round_ in (5, 6, 7):
        (tmp_path / "run" / "checkpoints" / f"round-{round_:06d}.safetensors").unlink()
    _, resumed = resume_small(tmp_path / "run")
    assert parameters(resumed).equal(parameters(prepared))
    assert list(Ledger.open(tmp_path / "run" / "ledger.jsonl")) == list(Ledger.open(whole.ledger))


def test_a_round_that_is_drawn_afresh_begins_anew_and_its_group_pays_twice(tmp_path, monkeypatch):
    changes, paid = {**NOISE_ALONE, "rounds": 3}, PrivateFedAvg._paid_release

    def crash(self, *args):
        released = paid(self, *args)
        if self.next_round == 3:
            raise RuntimeError("crash")
        return released

    with monkeypatch.context() as patched:
        patched.setattr(PrivateFedAvg, "_paid_release", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train_small(tmp_path / "run", **changes)
    directory, prepared = resume_small(tmp_path / "run", InProcessGrid(dead=[1]))
    charged = [(each.round, each.attempt, each.group) for each in Ledger.open(directory.ledger)]
    assert charged == [(1, 0, 0), (2, 0, 1), (3, 0, 2), (3, 1, 2)]
    moved = parameters(experiment.prepare(prepared.config)) - parameters(prepared)
    expected = noise(prepared, 1, [0, 0]) + noise(prepared, 3, [1])
    torch.testing.assert_close(moved, expected / 8, rtol=1e-4, atol=1e-5)
    assert directory.read_metrics()[-1]["groups"]["worst_group"] == 2


def test_a_budget_stops_before_the_round_that_would_exceed_it(tmp_path):
    event = dp_accounting.PoissonSampledDpEvent(0.4, dp_accounting.GaussianDpEvent(1.0))
    two, three = (RdpAccountant().compose(event, n).get_epsilon(1e-3) for n in (2, 3))
    changes = {**CORRELATED, "privacy__budget": {"epsilon": (two + three) / 2}}
    plan = experiment.prepare(small_config(**changes)).plan
    assert plan.affordable_rounds() == 6
    with pytest.raises(BudgetError, match="round 7 is not run"):
        train_small(tmp_path / "run", **changes)


def test_noise_is_calibrated_for_the_group_that_is_drawn_from_most(tmp_path):
    changes = {"privacy__noise_multiplier": None, "privacy__target_epsilon": 4.0}
    plan = experiment.prepare(small_config(**{**CORRELATED, **changes})).plan
    gaussian = dp_accounting.GaussianDpEvent(plan.mechanism.gaussian.noise_multiplier)
    event = dp_accounting.PoissonSampledDpEvent(0.4, gaussian)
    epsilon = RdpAccountant().compose(event, 3).get_epsilon(1e-3)
    assert epsilon == pytest.approx(4.0, abs=1e-4)


# ---------------------------------------------------------------- without trusted coins


def separated(factorization, bands, **changes):
    """Seven rounds over 60 users of whom nobody is in two of three."""
    return {
        **NOISE_ALONE,
        "privacy__sampling": {"kind": "min_separation", "rounds": 3},
        "privacy__accountants": ["rdp", "pld"],
        "privacy__mechanism": {
            "kind": "correlated",
            "bands": bands,
            "factorization": factorization,
        },
        "server": {"optimizer": "sgd", "lr": 1.0, "options": {"momentum": 0.5}},
        **changes,
    }


@pytest.mark.parametrize(("factorization", "bands"), [("optimized", 3), ("bisr", 3), ("blt", 2)])
def test_a_run_whose_coins_nobody_trusts(factorization, bands, tmp_path):
    """Groups take part whole; noise, ledger, statement and a resumed run are of one matrix."""
    settings = separated(factorization, bands, checkpoint__keep=9)
    grid = InProcessGrid()
    directory, prepared = train_small(tmp_path / "run", grid, **settings)
    mechanism, ids = prepared.plan.mechanism, prepared.trainer.dataset.user_ids
    assert mechanism.workload == Workload((1.0,) * 7, 0.5)
    for work in (m.content["config"] for m in grid.sent if m.metadata.message_type == "train"):
        group = {
            user for user, each in enumerate(ids) if group_of(each, 3) == (work["round"] - 1) % 3
        }
        assert set(work["users"]) <= group

    c = toeplitz(mechanism.matrix.column(7), np.zeros(7))
    standard = np.array(
        [
            prepared.plan.randomness.numpy(Purpose.NOISE, round_, 0).standard_normal(
                prepared.plan.layout.total
            )
            for round_ in range(1, 8)
        ]
    )
    velocity = expected = 0.0
    for row in SIGMA / 20 * np.linalg.inv(c) @ standard:
        velocity = 0.5 * velocity + row
        expected = expected + velocity
    moved = parameters(experiment.prepare(prepared.config)) - parameters(prepared)
    torch.testing.assert_close(moved, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)

    squared = (c[:, ::3].sum(1) ** 2).sum() if factorization in ("bisr", "blt") else 3
    epsilon = dp_accounting.get_epsilon_gaussian(1 / np.sqrt(squared), 1e-3)
    assert prepared.plan.planned_cost().epsilon == pytest.approx(epsilon, rel=1e-3)
    account = spent(read_run(directory.path))
    assert account.disagreements == ()
    assert account.epsilons["pld"] == pytest.approx(epsilon, rel=1e-3)
    assert verify(directory.path).bill.first.epsilon == pytest.approx(epsilon, rel=1e-3)
    text = render([directory.path], "md")
    assert "Nothing is claimed for these coins" in text
    assert "but not who was drawn" not in text

    whole = parameters(prepared)
    for round_ in (5, 6, 7):
        (directory.path / "checkpoints" / f"round-{round_:06d}.safetensors").unlink()
    _, resumed = resume_small(directory.path)
    assert parameters(resumed).equal(whole)


OTHERS = {
    "optimized": Banded((0.8, 0.6), "optimized"),
    "bisr": InverseBanded((1.0, -0.4), 7),
    "blt": Buffered((0.99, 0.2, 0.01, 0.9), 7),
}


@pytest.mark.parametrize(("factorization", "bands"), [("optimized", 3), ("bisr", 2), ("blt", 2)])
def test_a_run_goes_on_with_the_matrix_that_it_began_with(
    factorization, bands, tmp_path, monkeypatch
):
    """Another machine may find another one, and with it another z."""
    target = {"privacy__noise_multiplier": None, "privacy__target_epsilon": 6.0}
    settings = separated(factorization, bands, **target)
    whole, prepared = train_small(tmp_path / "whole", **settings)
    planned = prepared.plan.planned_cost()
    with pytest.raises(RuntimeError, match="crash"):
        train_small(tmp_path / "run", BreaksIn(5), **settings)
    monkeypatch.setitem(matrices.MADE, factorization, lambda *_: OTHERS[factorization])
    directory, resumed = resume_small(tmp_path / "run")
    assert parameters(resumed).equal(parameters(prepared))
    assert list(Ledger.open(directory.ledger)) == list(Ledger.open(whole.ledger))
    assert resumed.plan.planned_cost() == planned
    assert verify(directory.path).bill == verify(whole.path).bill


def test_a_run_whose_bands_nobody_wrote_down_is_read_and_does_not_go_on(tmp_path, monkeypatch):
    """Earlier versions did not write down what they had optimised."""
    record = CorrelatedMechanism.record
    with monkeypatch.context() as patched:
        patched.setattr(
            CorrelatedMechanism, "record", lambda *given: record(*given) | {"parameters": None}
        )
        with pytest.raises(RuntimeError, match="crash"):
            train_small(tmp_path / "run", BreaksIn(5), **separated("optimized", 3))
    assert verify(tmp_path / "run").bill.first.epsilon > 0
    with pytest.raises(InputError, match="optimized: the ledger of this run does not say") as told:
        resume_small(tmp_path / "run")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("factorization", ["optimized", "bisr"])
def test_a_run_of_what_was_planned_spends_what_was_planned(factorization, tmp_path):
    """With a schedule and momentum; the plan is made from a population and a server alone."""
    server = {
        "optimizer": "sgd",
        "lr": 1.0,
        "options": {"momentum": 0.5},
        "schedule": {"kind": "linear", "warmup_rounds": 2},
    }
    target = {"privacy__noise_multiplier": None, "privacy__target_epsilon": 6.0}
    settings = separated(factorization, 3, server=server, **target)
    config = small_config(**settings)
    asked = BudgetQuestion(
        population=60,
        deltas=(1e-3,),
        rounds=7,
        cohort=20,
        epsilon=6.0,
        sampling="min_separation",
        factorization=factorization,
        workload=workload_of(config.server, 7),
    )
    tried = choices(asked)
    found = best(tried)
    assert found.separation == 3
    assert found.factorization == factorization
    planned = answer(chosen(asked, tried))

    settings["privacy__mechanism"] = {
        "kind": "correlated",
        "bands": found.bands,
        "factorization": factorization,
    }
    directory, prepared = train_small(tmp_path / "run", **settings)
    mechanism = prepared.plan.mechanism
    assert mechanism.matrix == planned.recipe.mechanism.matrix
    assert mechanism.gaussian.noise_multiplier == planned.recipe.noise_multiplier
    said = directory.read_metrics()[-1]["epsilon"]
    assert said["rdp"] == pytest.approx(planned.total.first.epsilon_rdp, rel=1e-9)
    assert said["pld"] == pytest.approx(planned.total.first.epsilon_pld, rel=1e-9)


def test_a_budget_stops_a_run_with_buffers_too(tmp_path):
    settings = separated("blt", 2)
    plan = experiment.prepare(small_config(**settings)).plan
    spent = [plan.mechanism._squared_sensitivity(rounds) for rounds in (4, 7)]
    within, beyond = (dp_accounting.get_epsilon_gaussian(s**-0.5, 1e-3) for s in spent)
    budget = {"privacy__budget": {"epsilon": (within + beyond) / 2}}
    assert experiment.prepare(small_config(**settings, **budget)).plan.affordable_rounds() == 6
    with pytest.raises(BudgetError, match="round 7 is not run"):
        train_small(tmp_path / "run", **settings, **budget)


def test_noise_is_calibrated_for_the_whole_run_of_a_dense_matrix():
    changes = {"privacy__noise_multiplier": None, "privacy__target_epsilon": 4.0}
    plan = experiment.prepare(small_config(**separated("bisr", 4, **changes))).plan
    c = toeplitz(plan.mechanism.matrix.column(7), np.zeros(7))
    multiplier = plan.mechanism.gaussian.noise_multiplier / np.linalg.norm(c[:, ::3].sum(1))
    assert dp_accounting.get_epsilon_gaussian(multiplier, 1e-3) == pytest.approx(4.0, rel=1e-3)


def test_the_workload_is_the_servers_own():
    """Rates by round, and the momentum that the optimizer has, written down or not."""
    schedule = {"kind": "exponential", "factor": 0.5}
    server = {"optimizer": "adam", "lr": 0.01, "schedule": schedule}
    for options, momentum in (({}, 0.9), ({"betas": [0.7, 0.9]}, 0.7)):
        settings = separated("optimized", 3, server={**server, "options": options})
        workload = experiment.prepare(small_config(**settings)).plan.mechanism.workload
        assert workload == Workload(tuple(0.5**t for t in range(7)), momentum)


def test_without_correlation_separated_users_are_charged_unsampled():
    settings = separated("square_root", 1)
    plan = experiment.prepare(small_config(**settings)).plan
    epsilon = dp_accounting.get_epsilon_gaussian(1 / np.sqrt(3), 1e-3)
    assert plan.planned_cost().epsilon == pytest.approx(epsilon, rel=1e-3)


REFUSED = {
    "fixed size": ({"privacy__sampling": {"kind": "fixed_size", "expected_cohort": 8}}, "fixed"),
    "everybody": ({"privacy__sampling": {"kind": "all"}}, r"sampling\.kind: all"),
    "nodes": ({"privacy__noise_by": "nodes"}, "noise_by: nodes"),
    "users": ({"privacy__noise_by": "users"}, "noise_by: users"),
    "silos": ({**SILOS, "rounds": 3}, "unit: example"),
    "independent": (
        {"privacy__sampling": {"kind": "min_separation", "rounds": 3}, "privacy__mechanism": {}},
        "min_separation goes with mechanism.kind: correlated",
    ),
    "separated silos": (
        {**SILOS, "privacy__sampling": {"kind": "min_separation", "rounds": 3}, "rounds": 3},
        "unit: example",
    ),
    "adaptive": ({"privacy__clipping": {"kind": "adaptive", "bound": 0.1}}, "adaptive"),
    "memories": ({"privacy__error_feedback": "user"}, "error_feedback: user"),
    "deployment": ({"runtime__deployment": True}, "does not go with runtime.deployment"),
    "no bands": ({"privacy__mechanism": {"kind": "correlated"}}, r"mechanism\.bands: this key is"),
    "bands alone": ({"privacy__mechanism": {"bands": 2}}, r"mechanism\.bands: unknown key"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_proof_is_refused_with_the_reason(changes, reason):
    with pytest.raises(InputError, match=reason):
        small_config(**{**CORRELATED, **changes})


def dense(factorization):
    mechanism = {"kind": "correlated", "bands": 2, "factorization": factorization}
    return {"privacy__mechanism": mechanism}


def test_more_groups_than_the_cohort_can_be_drawn_from_are_refused():
    mechanism = {"kind": "correlated", "bands": 8}
    config = small_config(rounds=2, privacy__mechanism=mechanism)
    with pytest.raises(InputError, match="must be at most the population of 60"):
        experiment.prepare(config)
    for changes, reason in (
        (separated("optimized", 4), "4 bands are more than the 3 rounds"),
        ({**CORRELATED, **dense("blt")}, "blt has no proof with poisson sampling"),
        ({**CORRELATED, **dense("bisr")}, "bisr has no proof with poisson sampling"),
    ):
        with pytest.raises(InputError, match=reason):
            experiment.prepare(small_config(**changes))
