"""Targets of somebody's own data set that its task cannot learn end a run in one line."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from own_data import RUN
from torch import Tensor, nn

from fedpriv import experiment
from fedpriv.config_files import parse_config
from fedpriv.data.content import Content
from fedpriv.data.facts import UNCHECKED, DataFacts
from fedpriv.data.federated import Examples
from fedpriv.errors import ClientFault, InputError

ROWS, USERS = 4, 8


@dataclass(frozen=True)
class Own:
    """Users with four examples each; either theirs or the held-out ones have wrong targets."""

    task: str
    classes: int
    right: Examples
    wrong: Examples
    held_out_wrong: bool
    description: str = "own"
    sizes: str = ""
    facts: DataFacts = UNCHECKED
    population: int = USERS
    user_ids: tuple[str, ...] = tuple(f"user-{number}" for number in range(USERS))

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.right.inputs.shape[1:])

    def user(self, index: int) -> Examples:
        return self.right if self.held_out_wrong else self.wrong

    def evaluation(self) -> Iterator[Examples]:
        yield self.right
        yield self.wrong if self.held_out_wrong else self.right

    def digest(self) -> str:
        return Content("own").hexdigest()

    def __hash__(self) -> int:
        return id(self)


def linear(input_shape, classes):
    return nn.Linear(input_shape[0], classes)


def scores(input_shape, classes):
    return nn.Embedding(classes, classes)


def numbers(targets: Tensor) -> Examples:
    return Examples(torch.ones(ROWS, 3), targets)


def tokens(largest: int, length: int = 5) -> Examples:
    whole = torch.arange(ROWS * (length + 1)).reshape(ROWS, -1) % (largest + 1)
    return Examples(whole[:, :-1], whole[:, 1:])


CLASSES = numbers(torch.arange(ROWS) % 2)
TWO = numbers(torch.ones(ROWS, 2))
CASES = {
    "too many numbers": (
        "regression",
        2,
        numbers(torch.ones(ROWS, 2)),
        numbers(torch.ones(ROWS, 3)),
    ),
    "one number of two": ("regression", 2, TWO, numbers(torch.ones(ROWS))),
    "whole numbers": ("regression", 1, numbers(torch.ones(ROWS, 1)), CLASSES),
    "a class too many": ("classification", 2, CLASSES, numbers(torch.arange(ROWS))),
    "a class below 0": ("classification", 2, CLASSES, numbers(torch.arange(ROWS) - 3)),
    "short classes": ("classification", 2, CLASSES, numbers((torch.arange(ROWS) % 2).int())),
    "true and false": ("classification", 2, CLASSES, numbers(torch.ones(ROWS).bool())),
    "fractions": ("classification", 2, CLASSES, numbers(torch.ones(ROWS))),
    "one of several": ("classification", 2, CLASSES, numbers(torch.ones(ROWS, 2).long())),
    "a token too many": ("next_token", 4, tokens(3), tokens(4)),
    "one token short": (
        "next_token",
        4,
        tokens(3),
        Examples(tokens(3).inputs, tokens(3).targets[:, :-1]),
    ),
    "short tokens": (
        "next_token",
        4,
        tokens(3),
        Examples(tokens(3).inputs.int(), tokens(3).targets.int()),
    ),
}


@pytest.mark.parametrize("held_out", [True, False], ids=["held-out", "users'"])
@pytest.mark.parametrize("case", CASES)
def test_targets_that_a_task_cannot_learn_are_told_in_a_line(case, held_out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task, classes, right, wrong = CASES[case]
    data = Own(task, classes, right, wrong, held_out)
    model = scores if task == "next_token" else linear
    config = parse_config({**RUN, "data": {"name": lambda: data}, "model": {"name": model}})
    if held_out:
        with pytest.raises(InputError, match="data") as caught:
            experiment.prepare(config)
    else:
        prepared = experiment.prepare(config)
        with pytest.raises((InputError, ClientFault), match="data") as caught:
            experiment.train(prepared, experiment.create(prepared), Quiet())
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


class Quiet:
    """Hears of everything and says nothing."""

    def begin(self, prepared) -> None: ...
    def finished(self, row) -> None: ...
    def say(self, sentence) -> None: ...
