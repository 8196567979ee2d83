"""What models from outside do that ours do not: draw anywhere, and leave parameters unused."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from in_process import small_config, train_small
from torch import nn

from fedpriv.errors import InputError
from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.stochastic import Dropout
from fedpriv.privacy import GlobalClipping
from fedpriv.training.cohort import train_cohort

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


class Counts(nn.Module):
    """Keeps something of what passes, in a buffer or in another one in its place."""

    def __init__(self, persistent: bool, in_place: bool = True, fails: bool = False) -> None:
        super().__init__()
        self.head, self.in_place, self.fails = nn.Linear(64, 10), in_place, fails
        self.register_buffer("seen", torch.zeros(64), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if self.training and self.in_place:
            self.seen += x.detach().sum(0)
        elif self.training:
            self.seen = self.seen + x.detach().sum(0)
        if self.fails:
            raise ValueError("on purpose")
        return self.head(x - self.seen)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_what_a_model_keeps_of_a_user_ends_the_training(persistent, in_place, tmp_path):
    with pytest.raises(InputError, match=r"^model: its buffer seen changes in training"):
        trained(Counts(persistent, in_place), [3])
    with pytest.raises(InputError, match=r"^model: its buffer seen changes in training"):
        train_small(tmp_path / "run", model=Counts(persistent, in_place))
    assert not (tmp_path / "run").exists()


def test_nor_does_it_stay_where_a_deployment_leaves_its_user_out():
    trainer = build_trainer(small_config())
    model = Counts(persistent=False, fails=True)
    trainer = dataclasses.replace(
        trainer, model=model, clipping=GlobalClipping(1.0), tolerant=True, engine="sequential"
    )
    start = Layout.of(model).join(parameters_of(model)).clone()
    with pytest.raises(InputError, match=r"its buffer seen changes in training"):
        train_cohort(trainer, start, [3, 17], round_=1)


class TiedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x.flatten(1)).tanh()))


def test_tied_weights_get_the_gradients_of_both_places():
    torch.manual_seed(0)
    model = TiedTwice()
    changes = {"local": {"epochs": 1, "batch_size": 6, "lr": 0.01}}
    trainer = build_trainer(small_config(**changes))
    examples = trainer.dataset.user(3)
    loss = nn.functional.cross_entropy(model(examples.inputs), examples.targets)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    blocks = Layout.of(model).split(trained(model, [3], **changes))
    assert len(blocks) == 5
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(blocks[name].float(), 0.01 * gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), r"returns 7 numbers an example; .* 10: a"),
        (nn.Sequential(nn.Flatten(), nn.Linear(63, 10)), r"fails on examples of these data: mat1"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Flatten(0)), r"returns \(18,\) for 2 ex"),
        (nn.Conv2d(1, 10, 3), r"returns 10 x 6 x 6 numbers an example; it must return 10"),
        (nn.Conv2d(3, 10, 3), r"fails on examples of these data: .*3 channels"),
        (nn.LSTM(8, 10), r"fails on examples of these data"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_told_in_a_line_before_anything_starts(
    model, told, tmp_path
):
    with pytest.raises(InputError, match=told) as caught:
        train_small(tmp_path / "run", model=model)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.name: given:")
    assert not (tmp_path / "run").exists()
