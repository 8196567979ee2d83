import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpriv.data.federated import Examples
from fedpriv.models.parameters import Layout, load_parameters, parameters_of
from fedpriv.optimizers.local import SGD
from fedpriv.tasks.classification import Classification
from fedpriv.training.local import LocalTraining, batches, train_user


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def some_examples(count: int = 11) -> Examples:
    generator = torch.Generator().manual_seed(1)
    return Examples(
        torch.randn(count, 5, generator=generator),
        torch.randint(0, 3, (count,), generator=generator),
    )


def streams(seed: int) -> tuple[torch.Generator, torch.Generator]:
    """The stream of a user's own and the one that all users share, each from its start."""
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)


def start_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in parameters_of(model).items()}


def by_hand(start, examples, recipe, seed):
    """Local SGD written out: gradients by autograd, everything else in plain tensors."""
    model = small_model()
    load_parameters(model, start)
    theta = [p for _, p in sorted(model.named_parameters())]
    origin = [p.detach().clone() for p in theta]
    velocity = [torch.zeros_like(p) for p in theta]
    for index in batches(examples.sizes, recipe, *streams(seed)):
        value = F.cross_entropy(model(examples.inputs[index]), examples.targets[index])
        grads = torch.autograd.grad(value, theta)
        grads = [
            g + recipe.proximal_mu * (p.detach() - o)
            for g, p, o in zip(grads, theta, origin, strict=True)
        ]
        if recipe.max_grad_norm is not None:
            norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads))
            grads = [g * min(1.0, recipe.max_grad_norm / float(norm)) for g in grads]
        with torch.no_grad():
            for p, g, v in zip(theta, grads, velocity, strict=True):
                v.mul_(recipe.momentum).add_(g)
                p.sub_(recipe.lr * v)
    names = [name for name, _ in sorted(model.named_parameters())]
    return {n: o - p.detach() for n, o, p in zip(names, origin, theta, strict=True)}


@pytest.mark.parametrize(
    "recipe",
    [
        LocalTraining(epochs=2, batch_size=4, lr=0.1),
        LocalTraining(steps=7, batch_size=3, lr=0.2, optimizer=SGD(0.9)),
        LocalTraining(steps=5, batch_size=4, lr=0.1, max_grad_norm=0.05),
        LocalTraining(epochs=3, batch_size=20, lr=0.3, proximal_mu=0.7),
    ],
)
def test_the_update_equals_sgd_written_out(recipe):
    model, examples = small_model(), some_examples()
    start = start_of(model)
    result = trained(model, start, examples, recipe, 9)
    expected = by_hand(start, examples, recipe, 9)
    for name, block in result.update.items():
        torch.testing.assert_close(block, expected[name], rtol=1e-5, atol=1e-6)


def trained(model, start, examples, recipe, seed):
    steps = [examples.take(index) for index in batches(examples.sizes, recipe, *streams(seed))]
    return train_user(model, start, steps, recipe, Classification())


def test_a_strong_proximal_term_keeps_the_user_near_the_start():
    examples, norms = some_examples(), []
    for mu in (0.0, 5.0):
        model = small_model()
        recipe = LocalTraining(epochs=40, batch_size=11, lr=0.1, proximal_mu=mu)
        result = trained(model, start_of(model), examples, recipe, 0)
        norms.append(float(torch.cat([b.flatten() for b in result.update.values()]).norm()))
    assert norms[1] < 0.5 * norms[0]


@pytest.mark.parametrize(
    ("count", "recipe", "sizes"),
    [
        (10, LocalTraining(epochs=2, batch_size=4), [4, 4, 2, 4, 4, 2]),
        (10, LocalTraining(steps=4, batch_size=4), [4, 4, 2, 4]),
        (1, LocalTraining(steps=3, batch_size=8), [1, 1, 1]),
    ],
)
def test_batches_pass_over_all_examples_in_turn(count, recipe, sizes):
    found = list(batches(torch.ones(count), recipe, *streams(0)))
    assert [len(index) for index in found] == sizes
    one_pass = torch.cat(found[: -(-count // recipe.batch_size)])
    assert sorted(one_pass.tolist()) == list(range(count))


def test_by_length_like_meets_like_and_every_example_is_taken_once():
    recipe = LocalTraining(epochs=1, batch_size=4, order="by_length")
    sizes = torch.randperm(19, generator=torch.Generator().manual_seed(3))
    found = list(batches(sizes, recipe, *streams(0)))
    spans = sorted((int(sizes[i].min()), int(sizes[i].max())) for i in found)
    assert spans == [(0, 3), (4, 7), (8, 11), (12, 15), (16, 18)]
    again = list(batches(sizes, recipe, *streams(1)))
    assert [i.tolist() for i in found] != [i.tolist() for i in again]


def test_users_of_a_round_meet_long_examples_at_the_same_time():
    recipe = LocalTraining(epochs=3, batch_size=2, order="by_length")
    ranks = []
    for user in range(2):
        sizes = torch.randperm(12, generator=torch.Generator().manual_seed(user)) * (user + 1)
        own, shared = torch.Generator().manual_seed(user), torch.Generator().manual_seed(7)
        longest = [int(sizes[index].max()) for index in batches(sizes, recipe, own, shared)]
        ranks.append([sorted(set(longest)).index(length) for length in longest])
    assert ranks[0] == ranks[1]
    passes = [ranks[0][first : first + 6] for first in (0, 6, 12)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_batch_with_its_padding_stays_within_the_largest_size():
    recipe = LocalTraining(epochs=1, batch_size=6, batch_sizes=20)
    sizes = torch.tensor([9, 3, 30, 1, 8, 2, 2, 2, 2, 2, 2, 2])
    found = list(batches(sizes, recipe, *streams(2)))
    assert sorted(torch.cat(found).tolist()) == list(range(12))
    for index in found:
        assert len(index) <= 6
        assert len(index) == 1 or len(index) * int(sizes[index].max()) <= 20


def test_the_streams_alone_decide_the_order():
    recipe = LocalTraining(epochs=1, batch_size=3)
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + len(orders))
        orders.append(torch.cat(list(batches(torch.ones(30), recipe, *streams(seed)))).tolist())
    assert orders[0] == orders[1] != orders[2]


def test_layout_splits_and_joins_without_loss():
    model = small_model()
    layout = Layout.of(model)
    flat = layout.join(parameters_of(model))
    assert flat.shape == (layout.total,) == (5 * 7 + 7 + 7 * 3 + 3,)
    other = copy.deepcopy(model)
    nn.init.zeros_(other[0].weight)
    load_parameters(other, layout.split(flat))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.equal(b)
    layout.split(flat)["0.bias"].fill_(4.0)
    assert (flat == 4.0).sum() == 7
