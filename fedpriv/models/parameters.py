"""A model's parameters as one flat vector and as named blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpriv.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the blocks, in the order in which they lie in the flat vector.

    Every process derives it from its own copy of the model, so that only numbers travel.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Return the layout of the trainable parameters of `model`."""
        named = [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad]
        return cls(tuple(name for name, _ in named), tuple(shape for _, shape in named))

    @property
    def sizes(self) -> list[int]:
        """Number of parameters of each block."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the blocks as views into the vector `flat` `[total]`."""
        parts = flat.split(self.sizes)
        return {
            name: part.view(shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }

    def join(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return a new vector `[total]` with the blocks laid end to end."""
        return torch.cat([blocks[name].reshape(-1) for name in self.names])


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters of `model` by name, detached but sharing memory."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Let the body train or try `model`, whose buffers must be as they were when it has ended.

    Raises:
        InputError: one has changed, and would carry one user's data into the next user's update.
    """
    before = [(name, buffer, buffer._version) for name, buffer in model.named_buffers()]
    yield
    after = dict(model.named_buffers())
    for name, buffer, version in before:
        if after.get(name) is not buffer or buffer._version != version:
            raise InputError(
                f"model: its buffer {name} changes in training, which would carry one user's data "
                "to the next; it must keep nothing beside its parameters"
            )


def load_parameters(model: nn.Module, blocks: Mapping[str, Tensor]) -> None:
    """Copy `blocks` into the trainable parameters of `model`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(blocks[name])
