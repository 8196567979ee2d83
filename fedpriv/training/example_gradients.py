"""Per-example gradients by Opacus' `GradSampleModule`, for fedpriv's models and tasks.

Importing this module registers the layers that are fedpriv's own. Everything else in the models is
a layer that Opacus knows, and what a model takes besides its inputs (the lengths of utterances)
goes through, for Opacus' hooks sit on the layers with parameters. The model must be in training
mode, where alone those hooks listen.

    model = GradSampleModule(model, loss_reduction="sum")
    example_gradients(model, task, batch)
    optimizer.step()
"""

from __future__ import annotations

from typing import TypeVar

import torch
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn

from fedpriv.data.federated import Batch
from fedpriv.models.vit import LearnedPositions
from fedpriv.training.tasks import Task

B = TypeVar("B", bound=Batch)


@register_grad_sampler(LearnedPositions)
def positions_grad_sample(
    layer: LearnedPositions, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return each example's gradient of x + weight: the output's own, `[n, tokens, dim]`."""
    return {layer.weight: backprops}


def example_gradients(model: GradSampleModule, task: Task[B], batch: B) -> Tensor:
    """Leave each example's gradient of its own loss in `grad_sample`, `[n, ...]` a parameter.

    Returns the losses `[n]`, detached.

    A batch may be empty, as Poisson samples can be; CTC alone could not be taken of one.

    Raises:
        ValueError: the model would rescale the gradients of losses that are added up.
    """
    if model.loss_reduction != "sum":
        raise ValueError('the losses are added up: GradSampleModule(..., loss_reduction="sum")')
    if len(batch) > 0:
        losses = task.losses(model, batch)
        losses.sum().backward()
        return losses.detach()
    for p in model.parameters():
        if p.requires_grad:
            p.grad_sample = p.new_zeros((0, *p.shape))
    return torch.zeros(0)
