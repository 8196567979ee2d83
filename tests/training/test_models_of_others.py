"""What models from outside do that ours do not: draw anywhere, and leave parameters unused."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from in_process import small_config
from torch import nn

from fedpriv.federation.parts import build_trainer
from fedpriv.models.stochastic import Dropout
from fedpriv.privacy import GlobalClipping
from fedpriv.training.cohort import train_cohort
from fedpriv.training.parameters import Layout, parameters_of

DRAWS = {
    "torch": lambda n: torch.rand(n),
    "numpy": lambda n: torch.from_numpy(np.random.rand(n)).float(),
    "python": lambda n: torch.tensor([random.random() for _ in range(n)]),
}


class Draws(nn.Module):
    def __init__(self, library: str = "torch") -> None:
        super().__init__()
        self.library, self.head = library, nn.Linear(64, 10)
        self.own = Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.head(self.own(x * (DRAWS[self.library](x.shape[1]) > 0.5)))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask, self.head = nn.Parameter(torch.ones(64)), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


def trained(model: nn.Module, users: list[int], **changes: object) -> torch.Tensor:
    trainer = build_trainer(small_config(**changes))
    clipping = GlobalClipping(1.0)
    trainer = dataclasses.replace(trainer, model=model, clipping=clipping)
    start = Layout.of(model).join(parameters_of(model)).clone()
    total = train_cohort(trainer, start, users, round_=1).total
    parameters = Layout.of(model).split(start)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    return total


def states() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("library", sorted(DRAWS))
def test_a_users_draws_are_its_own_and_leave_global_generators_alone(library):
    model = Draws(library)
    before = states()
    both = trained(model, [3, 17])
    assert states() == before
    for number in (1, 2):
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        alone = [trained(model, [user]) for user in (17, 3)]
        torch.testing.assert_close(both, sum(alone), rtol=0, atol=1e-7)
    assert not alone[0].equal(alone[1])


@pytest.mark.parametrize("changes", [{}, {"local__momentum": 0.5}, {"local__proximal_mu": 0.1}])
def test_a_parameter_that_no_loss_depends_on_stays_where_it_is(changes):
    torch.manual_seed(0)
    model = Unused()
    total = trained(model, [3, 17], **changes)
    blocks = Layout.of(model).split(total)
    assert not blocks["mask"].any()
    assert blocks["head.weight"].norm() > 0
