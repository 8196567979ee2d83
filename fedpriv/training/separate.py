"""Whether what a model computes of one example depends on the others of its batch.

Many users are trained in one batch, and an example's gradient is bounded alone: both take for
granted that a row's loss is a function of that row. Our own models and tasks are tested for it;
those from outside are asked here, about examples that nobody holds.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedpriv.data.federated import Batch
from fedpriv.draws import drawing_from
from fedpriv.errors import InputError
from fedpriv.tasks.base import Task

_ROWS = 8
# What is added to parameters: a layer that begins with zeros would hide what lies below it.
_SHAKEN = 0.05


class Rows(NamedTuple):
    """How the rows of a batch go together, and one batch with the next.

    Attributes:
        separate: no row's loss depends on another row.
        carried: what one batch held changes the losses of the next, so that the model keeps it.
        drawn: losses depend on global generators, as with `nn.Dropout`: which numbers a row gets
            then depends on its place among others.
    """

    separate: bool
    carried: bool
    drawn: bool


@torch.no_grad()
def look_at_rows(model: nn.Module, task: Task[Any], examples: Batch | None) -> Rows:
    """Exchange a row for another one, and see whether the losses of the others change.

    `examples` are prepared, and at least two; None where there are fewer: nothing can be seen then,
    nor is it claimed.

    Raises:
        InputError: the task does not return one loss an example.
    """
    if examples is None:
        return Rows(separate=False, carried=False, drawn=True)
    part = examples.take(torch.arange(min(len(examples), _ROWS)))
    shaken = copy.deepcopy(model).train()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in shaken.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * _SHAKEN)

    def losses(first: int, seed: int = 0) -> Tensor:
        index = torch.arange(len(part))
        index[0] = first
        with drawing_from(seed, device):
            found = task.losses(shaken, part.take(index).to(device))
        if found.shape != (len(part),):
            raise InputError(
                f"task.name: {type(task).__name__} returns losses {list(found.shape)} for "
                f"{len(part)} examples; it must return one for each"
            )
        return found[1:]

    as_they_are = losses(0)
    others = {1, len(part) // 2, len(part) - 1}
    separate = all(_equal(as_they_are, losses(other)) for other in others)
    again, drawn = losses(0), losses(0, seed=1)
    return Rows(separate, not _equal(as_they_are, again), not _equal(again, drawn))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Say whether losses are the same, but for rounding."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
