"""Users who train on tokens: embeddings and causal attention, many at once."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fedpriv.data.federated import Examples
from fedpriv.models.gpt import GPTOptions
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.registry import build_model
from fedpriv.optimizers.local import SGD
from fedpriv.tasks.next_token import NO_TOKEN, NextToken
from fedpriv.training.local import LocalTraining, batches, train_user
from fedpriv.training.stacked import StackedModel, StackedUser, Stream, can_stack, train_stack

VOCABULARY, LENGTH = 5, 8


def gpt(**changes: object) -> nn.Module:
    options = GPTOptions(dim=8, depth=2, heads=2, **changes)
    return build_model(options, (LENGTH,), VOCABULARY, seed=1).double()


def sequences(user: int) -> Examples:
    generator = torch.Generator().manual_seed(user)
    tokens = torch.randint(VOCABULARY, (1 + user, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, LENGTH - user :] = NO_TOKEN
    return Examples(tokens[:, :-1], targets)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stacked_user(user: int, recipe: LocalTraining) -> StackedUser:
    examples = sequences(user)
    steps = list(batches(examples.sizes, recipe, seeded(100 + user), seeded(9)))
    streams = (Stream(partial(seeded, 200 + user)), Stream(partial(seeded, 300 + user)))
    return StackedUser(user, examples, steps, *streams)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_each_user_of_a_stack_is_trained_as_if_alone(placement, momentum):
    model, task = gpt(norm_placement=placement), NextToken()
    assert can_stack(model)
    recipe = LocalTraining(epochs=2, batch_size=2, lr=0.2, optimizer=SGD(momentum))
    start, layout = Layout.of(model).join(parameters_of(model)).clone(), Layout.of(model)
    users = [stacked_user(user, recipe) for user in (4, 2, 1)]
    result = train_stack(StackedModel(copy.deepcopy(model)), start, users, recipe, task, round_=1)
    updates = result.deltas.written_out()
    for place, user in enumerate(users):
        steps = [user.examples.take(index) for index in user.steps]
        alone = train_user(model, layout.split(start), steps, recipe, task)
        torch.testing.assert_close(updates[place], layout.join(alone.update), rtol=1e-6, atol=1e-10)
        assert float(result.losses[place]) == pytest.approx(alone.loss, rel=1e-8)


@pytest.mark.parametrize(
    "beside",
    [{"padding_idx": 0}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}],
)
def test_embeddings_that_do_more_than_look_rows_up_are_not_stacked(beside):
    assert can_stack(nn.Sequential(nn.Embedding(4, 2)))
    assert not can_stack(nn.Sequential(nn.Embedding(4, 2, **beside)))
