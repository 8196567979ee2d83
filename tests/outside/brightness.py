"""A regression from outside, data and model: how bright a picture of noise is on the whole."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedpriv.data.content import Content
from fedpriv.data.facts import UNCHECKED, DataFacts
from fedpriv.data.federated import Examples


@dataclass(frozen=True)
class Brightness:
    """Users whose pictures are drawn from a generator of their own."""

    users: int
    examples: int = 6
    task: str = "regression"
    classes: int = 1  # numbers to predict
    input_shape: tuple[int, ...] = (1, 8, 8)
    description: str = "pictures of noise"
    sizes: str = ""
    facts: DataFacts = UNCHECKED

    @property
    def population(self) -> int:
        return self.users

    @property
    def user_ids(self) -> Sequence[str]:
        return [f"user-{number}" for number in range(self.users)]

    def user(self, index: int) -> Examples:
        generator = torch.Generator().manual_seed(index)
        pictures = torch.randn(self.examples, *self.input_shape, generator=generator)
        return Examples(pictures, 3 * pictures.mean(dim=(1, 2, 3)))

    def evaluation(self) -> Iterator[Examples]:
        yield self.user(self.users)

    def digest(self) -> str:
        content = Content(f"brightness {self.examples}")
        for user_id in self.user_ids:
            content.add_user(user_id, self.examples)
        return content.hexdigest()


def pictures(users: int, examples: int = 6) -> Brightness:
    """Return the data set."""
    return Brightness(users, examples)


def weights(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a linear map of all pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))
