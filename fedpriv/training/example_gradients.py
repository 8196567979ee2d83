"""Per-example gradients by Opacus' `GradSampleModule`, for fedpriv's models and tasks.

Importing this module registers the layers that are fedpriv's own. Everything else in the models is
a layer that Opacus knows, and what a model takes besides its inputs (the lengths of utterances)
goes through, for Opacus' hooks sit on the layers with parameters. The model must be in training
mode, where alone those hooks listen. `GhostGradients` writes no large gradient out.

    model = GradSampleModule(model, loss_reduction="sum")
    example_gradients(model, task, batch)
    optimizer.step()
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn

from fedpriv.data.federated import Batch
from fedpriv.models.vit import LearnedPositions
from fedpriv.privacy.outer_products import OuterProducts
from fedpriv.tasks.base import Task

B = TypeVar("B", bound=Batch)


@register_grad_sampler(LearnedPositions)
def positions_grad_sample(
    layer: LearnedPositions, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return each example's gradient of x + weight: the output's own, `[n, tokens, dim]`."""
    return {layer.weight: backprops}


class GhostGradients(GradSampleModule):
    """Opacus' hooks, but `grad_sample` of a linear map's weight may be `OuterProducts`.

    It is where T·(p + d) numbers of factors are fewer than the p·d of a gradient that is written
    out; by the same rule norms cost less that way (mixed ghost clipping: Bu, Mao, Xu 2022). All
    else is written out: biases, norms, positions.
    """

    def capture_backprops_hook(
        self,
        module: nn.Module,
        _forward_input: Any,
        forward_output: Any,
        loss_reduction: str,
        batch_first: bool,
    ) -> None:
        """Keep the factors of a linear map's gradients; for all else see Opacus.

        Raises:
            ValueError: a weight is used twice in a forward pass.
        """
        backprops = forward_output[0].detach()
        if not (
            self.hooks_enabled
            and isinstance(module, nn.Linear)
            and _factors_are_fewer(module, backprops)
        ):
            super().capture_backprops_hook(
                module, _forward_input, forward_output, loss_reduction, batch_first
            )
            return
        inputs, backprops = self.rearrange_grad_samples(
            module=module,
            backprops=backprops,
            loss_reduction=loss_reduction,
            batch_first=batch_first,
        )
        left, right = _tokens(backprops), _tokens(inputs[0])
        _keep(module.weight, OuterProducts(left, right))
        if module.bias is not None:
            _keep(module.bias, left.sum(1))
        del module.max_batch_len


def _factors_are_fewer(linear: nn.Linear, backprops: Tensor) -> bool:
    tokens = math.prod(backprops.shape[1:-1])
    return tokens * (linear.in_features + linear.out_features) < linear.weight.numel()


def _tokens(x: Tensor) -> Tensor:
    """Reshape `[n, ..., d]` to `[n, T, d]`."""
    return x.flatten(1, -2) if x.dim() > 2 else x[:, None]


def _keep(parameter: Tensor, gradients: Tensor | OuterProducts) -> None:
    if not parameter.requires_grad:
        return
    if parameter._forward_counter != 1 or parameter.grad_sample is not None:  # type: ignore[attr-defined]
        raise ValueError("ghost clipping needs weights that are used once in a forward pass")
    parameter._forward_counter = 0  # type: ignore[attr-defined]
    parameter.grad_sample = gradients  # type: ignore[attr-defined]


#: Names in the config: how per-example gradients are taken.
GRADIENTS: dict[Literal["instantiated", "ghost"], type[GradSampleModule]] = {
    "instantiated": GradSampleModule,
    "ghost": GhostGradients,
}


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
    return next(model.parameters()).new_zeros(0)
