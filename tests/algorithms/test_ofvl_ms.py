"""Tasks that count alike, against the formula, and what their release costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from in_process import SILOS, BreaksIn, InProcessGrid, resume_small, small_config, train_small

from fedpriv.algorithms.fedavg import FedAvg
from fedpriv.algorithms.ofvl_ms import OfvlMs
from fedpriv.errors import InputError
from fedpriv.experiment import prepare
from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.optimizers.normalize import NORMALIZERS
from fedpriv.privacy import Ledger, Purpose
from fedpriv.reporting.plots import noise_norms
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.training.cohort import train_cohort

SGD = {"optimizer": "sgd", "lr": 0.7}
COHORT, SIGMA = 8, 0.1
#: Of users 0 to 59 these have 11, 11 and 38.
TASKS = {"name": "ofvl_ms", "tasks": ["user-1*", "user-2*", "user-?"]}


def task(user):
    return {"1": 0, "2": 1}.get(str(user)[0], 2)


def parameters(prepared):
    return prepared.server.parameters().double()


def balanced(averages):
    norms = [np.sqrt((g**2).sum()) for g in averages]
    return np.mean(norms) * sum(g / n for g, n in zip(averages, norms, strict=True) if n > 0)


# ---------------------------------------------------------------- what the server makes of tasks


def test_all_tasks_count_alike_whatever_their_norms():
    averages = np.random.default_rng(0).standard_normal((3, 500))
    averages[1] *= 10
    found = OfvlMs(("a*", "b*", "c*")).combined(torch.as_tensor(averages)).numpy()
    np.testing.assert_allclose(found, balanced(averages), rtol=1e-6)
    along = [found @ g / np.linalg.norm(g) for g in averages]
    assert along == pytest.approx([along[0]] * 3, rel=0.2)
    # Where all have one norm it is their sum.
    alike = averages / np.linalg.norm(averages, axis=1, keepdims=True)
    found = OfvlMs(("a*", "b*", "c*")).combined(torch.as_tensor(alike)).numpy()
    np.testing.assert_allclose(found, alike.sum(0), rtol=1e-6, atol=1e-12)


def test_a_task_of_zeros_adds_nothing():
    averages = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    found = OfvlMs(("a", "b", "c")).combined(averages)
    torch.testing.assert_close(found, torch.tensor([1.2, 3.6]), rtol=1e-6, atol=0)
    assert OfvlMs(("a", "b")).combined(torch.zeros(2, 3)).tolist() == [0, 0, 0]


def test_a_user_belongs_to_the_first_pattern_that_its_id_fits_or_to_the_last():
    tasks = OfvlMs(("north-*", "north-1", "[ab]?", "south-*"))
    fits = {"north-1": 0, "north-": 0, "a1": 2, "south-7": 3, "east": 3, "North-1": 3, "": 3}
    assert {each: tasks.slot(each) for each in fits} == fits


@pytest.mark.parametrize("private", [True, False], ids=["private", "without privacy"])
def test_the_server_balances_what_was_released(tmp_path, private):
    """Every task trained alone by FedAvg, noise by its formula, and the rest by numpy."""
    changes = {} if private else {"privacy": None, "cohort": float(COHORT)}
    changes = {"server": SGD, "algorithm": TASKS, "rounds": 3, **changes}
    _, prepared = train_small(tmp_path / "run", **changes)
    plain = replace(prepared.trainer, algorithm=FedAvg())
    start = parameters(prepare(prepared.config))
    model = start.numpy()
    for round_ in (1, 2, 3):
        drawn = prepared.plan.sampling.draw(
            prepared.plan.randomness.numpy(Purpose.SAMPLING, round_, 0)
        )
        sums = np.zeros((3, len(model)))
        for number in range(3):
            own = [user for user in drawn.tolist() if task(user) == number]
            sent = train_cohort(plain, torch.as_tensor(model).float(), own, round_)
            sums[number] = sent.total.numpy()
        if private:
            generator = prepared.plan.randomness.numpy(Purpose.NOISE, round_, 0)
            sums += SIGMA * generator.standard_normal(sums.shape)
        model = model - 0.7 * balanced(sums / COHORT)
    torch.testing.assert_close(parameters(prepared), torch.as_tensor(model), rtol=1e-6, atol=1e-6)
    assert np.linalg.norm(model - start.numpy()) > 0.01


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_one_user_moves_the_sum_of_its_own_task_alone_by_the_bound_at_most(engine):
    changes = {"algorithm": TASKS, "runtime__engine": engine}
    trainer = build_trainer(small_config(**changes, privacy__clipping__bound=0.01))
    layout = Layout.of(trainer.model)
    start = layout.join(parameters_of(trainer.model))
    everybody = list(range(25))
    whole = train_cohort(trainer, start, everybody, 1).total.view(3, -1)
    for user in (0, 1, 2, 15, 24):
        others = [each for each in everybody if each != user]
        less = train_cohort(trainer, start, others, 1).total.view(3, -1)
        moved = (whole - less).norm(dim=1)
        assert 0.0099 < moved[task(user)] <= 0.01 * (1 + 1e-6)
        assert moved[[each for each in range(3) if each != task(user)]].max() < 1e-12


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy__noise": "per_block"},
        {"privacy__clipping": {"kind": "adaptive", "bound": 0.1}},
        {"privacy__sampling": {"kind": "fixed_size", "expected_cohort": COHORT}},
        {"privacy__error_feedback": "user"},
        {"privacy__noise_by": "nodes"},
        {"privacy__mechanism": {"kind": "correlated", "bands": 2}},
    ],
    ids=str,
)
def test_a_run_with_tasks_costs_what_a_run_of_fedavg_costs(tmp_path, changes):
    directory, prepared = train_small(tmp_path / "run", **changes, algorithm=TASKS)
    plain, flat = train_small(tmp_path / "flat", **changes)
    assert prepared.plan.planned_cost() == flat.plan.planned_cost()
    releases, of_flat = list(Ledger.open(directory.ledger)), list(Ledger.open(plain.ledger))
    assert [one.event() for one in releases] == [one.event() for one in of_flat]
    assert [one.noise_multiplier for one in releases] == [one.noise_multiplier for one in of_flat]
    assert len(releases) == 4
    assert all(one.payloads is None for one in releases)
    said = "which task a user is in is taken to be public"
    assert said in render([directory.path], "md")
    assert said not in render([plain.path], "md")


def test_no_noise_is_told_that_nobody_knows(tmp_path):
    directory, _ = train_small(tmp_path / "run", algorithm=TASKS, rounds=2)
    assert all("noise_block_norms" not in row for row in directory.read_metrics())
    assert noise_norms(read_run(directory.path)) is None
    shares = directory.read_metrics()[-1]["simulation_only"]["block_coherence"].values()
    assert all(0 < share <= 1 for share in shares)  # of the sums, which are not balanced
    render([directory.path], "html")


# ---------------------------------------------------------------- runs


def test_a_run_that_is_resumed_is_the_run_that_was_not(tmp_path):
    whole, prepared = train_small(tmp_path / "whole", algorithm=TASKS)
    with pytest.raises(RuntimeError, match="crash"):
        train_small(tmp_path / "other", BreaksIn(3), algorithm=TASKS)
    other, resumed = resume_small(tmp_path / "other")
    assert parameters(resumed).equal(parameters(prepared))
    assert list(Ledger.open(other.ledger)) == list(Ledger.open(whole.ledger))


def test_a_deployments_nodes_find_the_tasks_of_their_users(tmp_path):
    deployed = {"runtime__deployment": True, "data__users": 60}
    directory, prepared = train_small(
        tmp_path / "run", InProcessGrid(2), **deployed, algorithm=TASKS
    )
    assert len(Ledger.open(directory.ledger)) == 4
    assert parameters(prepared).isfinite().all()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (SILOS, r"privacy\.unit: example: silos"),
        ({"privacy__noise_by": "users"}, r"privacy\.noise_by: users"),
        (
            {
                "privacy__clipping": {"kind": "global", "bound": 0.1, "undo": True},
                "local__layer_decay": 0.5,
            },
            r"privacy\.clipping\.undo: tasks would have one size",
        ),
        ({"server__normalize": "dp_adam_bc"}, r"dp_adam_bc takes .* nobody knows the variance"),
        ({"algorithm": {"name": "ofvl_ms"}}, r"algorithm\.tasks"),
        ({"algorithm": TASKS | {"tasks": ["user-*"]}}, r"algorithm\.tasks: .* at least 2"),
        ({"algorithm": TASKS | {"tasks": ["a", "b", "a"]}}, r"algorithm\.tasks: .* pattern once"),
        ({"algorithm": TASKS | {"tasks": [f"{n}" for n in range(65)]}}, "at most 64"),
        ({"algorithm": TASKS | {"bounds": {"task": 1.0}}}, r"algorithm\.bounds"),
    ],
    ids=str,
)
def test_what_has_no_meaning_or_no_proof_is_refused(changes, reason):
    with pytest.raises(InputError, match=reason):
        build_trainer(small_config(**{"algorithm": TASKS} | changes))


@pytest.mark.parametrize(
    "changes",
    [{"server__normalize": "lanton"}, {"privacy": None, "server__normalize": "dp_adam_bc"}],
    ids=str,
)
def test_normalisers_that_need_no_noise_go_with_it(tmp_path, changes):
    _, prepared = train_small(tmp_path / "run", **changes, algorithm=TASKS, rounds=2)
    assert parameters(prepared).isfinite().all()


def test_as_a_normaliser_it_is_refused_with_what_to_write():
    with pytest.raises(InputError, match=r"write algorithm: \{name: ofvl_ms, tasks: \[\.\.\.\]\}"):
        NORMALIZERS.find("ofvl_ms")
