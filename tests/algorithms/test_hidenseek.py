"""Sign supermasks, against the formula in numpy, and what their release costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from in_process import SILOS, BreaksIn, InProcessGrid, resume_small, small_config, train_small

from fedpriv.algorithms.hidenseek import HideNseek
from fedpriv.errors import Diverged, InputError
from fedpriv.experiment import prepare
from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.optimizers.local import Signs
from fedpriv.privacy import Ledger, Purpose
from fedpriv.training.cohort import train_cohort

COHORT, SIGMA = 8, 0.1
SGD_SERVER = {"optimizer": "sgd", "lr": 5.0, "options": {"momentum": 0.5}}
MASKS = {"name": "hidenseek", "density": 0.6}
LOCAL = {"steps": 3, "batch_size": 2, "lr": 0.4}


def blocks(prepared):
    return {name: p.numpy().copy() for name, p in parameters_of(prepared.server.model).items()}


# ---------------------------------------------------------------- the first model


def test_of_each_matrix_the_largest_weights_are_kept_and_nothing_else_is_changed():
    algorithm = HideNseek(density=0.25)
    matrix = torch.tensor([[0.1, -4.0, 0.2, 3.0], [-0.3, 0.4, -0.5, 0.6]])
    kept = torch.tensor([[0.0, -4.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(algorithm.begun(matrix), kept)
    bias = torch.tensor([0.1, -4.0, 0.0])
    assert torch.equal(algorithm.begun(bias), bias)
    # Of equal weights exactly so many are kept.
    assert int(algorithm.begun(torch.ones(3, 7)).count_nonzero()) == round(0.25 * 21)
    assert int(HideNseek(density=1e-6).begun(matrix).count_nonzero()) == 1
    assert torch.equal(HideNseek(density=1.0).begun(matrix), matrix)


def test_a_run_begins_with_the_pruned_model_and_keeps_its_magnitudes(tmp_path):
    changes = {"server": SGD_SERVER, "local": LOCAL}
    whole = blocks(prepare(small_config(**changes)))
    _, prepared = train_small(tmp_path / "run", **changes, algorithm=MASKS)
    trained, flipped = blocks(prepared), 0
    for name, block in whole.items():
        kept = round(0.6 * block.size) if block.ndim > 1 else np.count_nonzero(block)
        assert np.count_nonzero(trained[name]) == kept
        there = trained[name] != 0
        np.testing.assert_array_equal(np.abs(trained[name][there]), np.abs(block[there]))
        if block.ndim > 1:
            assert np.abs(block[~there]).max() <= np.abs(block[there]).min()
        flipped += np.count_nonzero(trained[name][there] != block[there])
    assert flipped > 20


# ---------------------------------------------------------------- the steps of users and server


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
@pytest.mark.parametrize("rates", [{}, {"multipliers": {"head*": 3.0}}], ids=["one", "apart"])
def test_users_move_scores_past_the_sign(engine, rates):
    """Every engine, against the paper's step by autograd, for one user after another."""
    changes = {"algorithm": MASKS, "local": LOCAL | rates, "runtime__engine": engine}
    trainer = build_trainer(small_config(**changes, privacy=None, cohort=8.0))
    assert trainer.recipe.optimizer == Signs()
    assert (trainer.stacked is not None) == (engine == "stacked")
    layout = Layout.of(trainer.model)
    start = layout.join(parameters_of(trainer.model))
    users = [3, 7, 20]
    found = train_cohort(trainer, start, users, 1).total
    expected = sum(_of_one(trainer, layout, start, user, rates) for user in users)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found.norm() > 0.1


def _of_one(trainer, layout, start, user, rates):
    """|θ|·sign(s), with s the scores; their gradients are those of the weights (straight-through).

    The batches, and the gradients at given weights, are those of FedAvg's engine: its one step at
    rate 1 from any weights gives them.
    """
    origin = layout.split(start.clone())
    factor = {name: 3.0 if rates and name.startswith("head") else 1.0 for name in origin}
    scores = {name: block.clone() for name, block in origin.items()}
    weights = {name: block.clone() for name, block in origin.items()}
    for number in range(LOCAL["steps"]):
        gradients = _gradients(trainer, layout, weights, user, number)
        for name, score in scores.items():
            score -= LOCAL["lr"] * factor[name] * gradients[name]
            weights[name] = torch.where(score < 0, -1.0, 1.0) * origin[name].abs()
    return sum_of(layout, {name: origin[name] - weights[name] for name in origin})


def sum_of(layout, named):
    return layout.join(named).double()


def _gradients(trainer, layout, weights, user, number):
    from fedpriv.privacy.randomness import id_words
    from fedpriv.training.local import batches

    examples = trainer.prepared(user)
    own = id_words(trainer.dataset.user_ids[user])
    order = trainer.randomness.torch(Purpose.LOCAL_TRAINING, 1, 0, *own)
    indices = list(batches(examples.sizes, trainer.recipe, order, torch.Generator()))
    model = trainer.model
    for name, block in parameters_of(model).items():
        block.copy_(weights[name])
    model.train()
    model.zero_grad()
    trainer.task.losses(model, examples.take(indices[number])).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("private", [True, False], ids=["private", "without privacy"])
def test_the_server_moves_votes_and_sends_their_signs(tmp_path, private):
    """What users send by the engine, noise by its formula, and votes and momentum by numpy."""
    changes = {} if private else {"privacy": None, "cohort": float(COHORT)}
    changes = {"server": SGD_SERVER, "local": LOCAL, "rounds": 3, **changes, "algorithm": MASKS}
    _, prepared = train_small(tmp_path / "run", **changes)
    begun = prepare(prepared.config)
    start = begun.server.parameters().double().numpy()
    model, votes, velocity = start.copy(), start.copy(), 0.0
    for round_ in (1, 2, 3):
        plan = prepared.plan
        drawn = plan.sampling.draw(plan.randomness.numpy(Purpose.SAMPLING, round_, 0))
        sent = train_cohort(begun.trainer, torch.as_tensor(model).float(), drawn.tolist(), round_)
        total = sent.total.numpy()
        if private:
            generator = plan.randomness.numpy(Purpose.NOISE, round_, 0)
            total = total + SIGMA * generator.standard_normal(total.shape)
        velocity = 0.5 * velocity + total / COHORT
        votes = votes - 5.0 * velocity
        model = np.abs(start) * np.where(votes < 0, -1, 1)
    np.testing.assert_allclose(prepared.server.parameters().double(), model, rtol=1e-6, atol=1e-7)
    assert np.count_nonzero(model != start) > 5


# ---------------------------------------------------------------- what it costs, and resume


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_one_user_moves_the_sum_by_the_bound_at_most(engine):
    changes = {"algorithm": MASKS, "local": LOCAL, "runtime__engine": engine}
    trainer = build_trainer(small_config(**changes, privacy__clipping__bound=0.01))
    layout = Layout.of(trainer.model)
    start = layout.join(parameters_of(trainer.model))
    everybody = list(range(25))
    whole = train_cohort(trainer, start, everybody, 1).total
    for user in (0, 1, 24):
        others = [each for each in everybody if each != user]
        moved = (whole - train_cohort(trainer, start, others, 1).total).norm()
        assert 0.005 < moved <= 0.01 * (1 + 1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy__clipping": {"kind": "adaptive", "bound": 0.1}},
        {"privacy__error_feedback": "user"},
        {"privacy__noise_by": "users"},
        {"privacy__mechanism": {"kind": "correlated", "bands": 2}},
    ],
    ids=str,
)
def test_a_run_costs_what_a_run_of_fedavg_costs(tmp_path, changes):
    changes = {**changes, "server": SGD_SERVER}
    directory, prepared = train_small(tmp_path / "run", **changes, algorithm=MASKS)
    plain, flat = train_small(tmp_path / "flat", **changes)
    assert prepared.plan.planned_cost() == flat.plan.planned_cost()
    releases, of_flat = list(Ledger.open(directory.ledger)), list(Ledger.open(plain.ledger))
    assert [one.event() for one in releases] == [one.event() for one in of_flat]
    assert len(releases) == 4


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lamb"])
def test_a_resumed_run_ends_where_one_that_was_not_stopped_ends(tmp_path, optimizer):
    changes = {"server": {"optimizer": optimizer, "lr": 0.1}, "local": LOCAL, "algorithm": MASKS}
    _, straight = train_small(tmp_path / "straight", **changes)
    with pytest.raises(RuntimeError, match="crash"):
        train_small(tmp_path / "stopped", BreaksIn(3), **changes)
    _, resumed = resume_small(tmp_path / "stopped")
    assert torch.equal(resumed.server.parameters(), straight.server.parameters())
    assert resumed.server.state().keys() == straight.server.state().keys()
    for name, tensor in straight.server.state().items():
        assert torch.equal(resumed.server.state()[name], tensor), name


def test_a_deployment_and_silos_train_by_it(tmp_path):
    for number, changes in enumerate((SILOS, {"runtime__deployment": True, "data__users": 60})):
        nodes = InProcessGrid(2)
        changes = {**changes, "local__lr": 2.0, "server": SGD_SERVER, "algorithm": MASKS}
        _, prepared = train_small(tmp_path / str(number), nodes, **changes)
        begun = prepare(prepared.config).server.parameters()
        assert torch.equal(prepared.server.parameters().abs(), begun.abs())
        assert not torch.equal(prepared.server.parameters(), begun)


def test_steps_of_another_kind_are_refused():
    for local in ({"optimizer": "adam"}, {"momentum": 0.5}):
        with pytest.raises(InputError, match=r"^algorithm.name: hidenseek does not go with local"):
            prepare(small_config(algorithm=MASKS, local=LOCAL | local))


@pytest.mark.parametrize("model", [{"train": "lora"}, {"initialise": "own"}], ids=str)
def test_a_matrix_of_zeros_is_refused(model):
    """The second half of an adapter, and positions as torch's layers begin."""
    changes = {f"model__{key}": value for key, value in model.items()}
    with pytest.raises(InputError, match=r"signs alone are trained, and .* begins with zeros"):
        prepare(small_config(algorithm=MASKS, local=LOCAL, **changes))


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_whose_scores_are_no_numbers_sends_nothing(engine):
    trainer = build_trainer(small_config(algorithm=MASKS, local=LOCAL, runtime__engine=engine))
    layout = Layout.of(trainer.model)
    start = layout.join(parameters_of(trainer.model))
    wild = replace(trainer, recipe=replace(trainer.recipe, lr=float("inf")))
    found = train_cohort(wild, start, [0, 1, 2], 1)
    assert found.non_finite == 3
    assert float(found.total.norm()) == 0


def test_votes_that_are_no_numbers_end_the_run(tmp_path):
    """Their signs would be some, and every later round would be paid for."""
    server = {"optimizer": "sgd", "lr": 1e6, "options": {"weight_decay": 10.0}}
    with pytest.raises(Diverged, match="numbers in the model that are not finite"):
        train_small(tmp_path / "run", algorithm=MASKS, local=LOCAL, server=server, rounds=9)
