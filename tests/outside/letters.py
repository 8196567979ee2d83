"""A next-token model from outside, data and model: each letter is followed by the next one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpriv.data.content import Content
from fedpriv.data.facts import UNCHECKED, DataFacts
from fedpriv.data.federated import Examples


@dataclass(frozen=True)
class Alphabets:
    """Users who recite the alphabet, each from letters of its own."""

    users: int
    length: int = 12
    task: str = "next_token"
    classes: int = 6  # the vocabulary
    description: str = "recited alphabets"
    sizes: str = ""
    facts: DataFacts = UNCHECKED

    @property
    def population(self) -> int:
        return self.users

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def user_ids(self) -> Sequence[str]:
        return [f"user-{number}" for number in range(self.users)]

    def user(self, index: int) -> Examples:
        generator = torch.Generator().manual_seed(index)
        first = torch.randint(self.classes, (6, 1), generator=generator)
        tokens = (first + torch.arange(self.length + 1)) % self.classes
        return Examples(tokens[:, :-1].clone(), tokens[:, 1:].clone())

    def evaluation(self) -> Iterator[Examples]:
        yield self.user(self.users)

    def digest(self) -> str:
        content = Content(f"alphabets {self.length}")
        for user_id in self.user_ids:
            content.add_user(user_id, 6)
        return content.hexdigest()


def alphabets(users: int, length: int = 12) -> Alphabets:
    """Return the data set."""
    return Alphabets(users, length)


class Recurrent(nn.Module):
    """Tokens `[n, T]` to scores of the next ones, `[n, T, classes]`, by a GRU."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.memory(self.embed(tokens))[0])
