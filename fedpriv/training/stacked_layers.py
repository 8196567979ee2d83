"""Layers of many users: user u's parameters meet user u's rows.

Rows of all users lie end to end, `[U·B, ...]`, so that whatever has no parameters works on them as
it is. Each layer with parameters is exchanged for a sibling whose parameters are `[U, ...]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpriv.models.vit import LearnedPositions


class StackedLayer(nn.Module):
    """A layer of `users` users; `weight` and `bias` are `[U, ...]` and are set before each pass."""

    users: int
    weight: Tensor
    bias: Tensor | None = None

    def _per_user(self, x: Tensor) -> Tensor:
        """Return rows `[U·B, ..., d]` as `[U, B·..., d]`."""
        return x.reshape(self.users, -1, x.shape[-1])


class StackedLinear(StackedLayer):
    """Linear maps of many users, whose weights' gradients are left as the factors they are made of.

    The gradient of user u's weight is gᵀx, with g the gradient at its outputs and x its inputs.
    Written out for every user it would take as much memory as all their parameters; as factors it
    can be taken straight into the step. Where users still share their parameters, before the first
    step, `weight` is `[out, in]`, `bias` is `[out]`, and one product serves all of them.

    Attributes:
        factors: g `[U, n, out]` and x `[U, n, in]` of the last backward pass.
    """

    factors: tuple[Tensor, Tensor]

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._anchor = layer.weight.new_zeros(()).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        """Map rows `[U·B, ..., in]` to `[U·B, ..., out]`."""
        out = _Linear.apply(self._per_user(x), self._anchor, self)
        return out.view(*x.shape[:-1], -1)

    def mapped(self, rows: Tensor) -> Tensor:
        """Map `[U, n, in]` to `[U, n, out]`."""
        if self.weight.dim() == 2:
            return F.linear(rows, self.weight, self.bias)
        weight = self.weight.transpose(1, 2)
        if self.bias is None:
            return torch.bmm(rows, weight)
        return torch.baddbmm(self.bias[:, None], rows, weight)

    def passed_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient at the inputs `[U, n, in]` from that at the outputs `[U, n, out]`."""
        return torch.matmul(gradient, self.weight.to(gradient.dtype))


class _Linear(torch.autograd.Function):
    """The linear map as autograd sees it: it keeps the factors and asks for no weight gradient.

    `anchor` takes a gradient, so that backward comes by even where the inputs take none.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor: Tensor, layer: StackedLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(rows)
        return layer.mapped(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        gradient = gradients[0].contiguous()
        (rows,) = ctx.saved_tensors
        # In a forward pass of lower precision the outputs are rounded, and so are their gradients.
        ctx.layer.factors = gradient, rows.detach().to(gradient.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return ctx.layer.passed_back(gradient).to(rows.dtype), None, None


class StackedNorm(StackedLayer):
    """LayerNorm or RMSNorm of many users."""

    def __init__(self, layer: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__()
        self.norm = type(layer)(layer.normalized_shape, layer.eps, elementwise_affine=False)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise rows `[U·B, ..., d]`."""
        rows = self.norm(x).reshape(self.users, -1, *self.norm.normalized_shape)
        if self.bias is None:
            return (rows * self.weight[:, None]).view(x.shape)
        return torch.addcmul(self.bias[:, None], rows, self.weight[:, None]).view(x.shape)


class StackedPositions(StackedLayer):
    """Learned positions of many users."""

    def __init__(self, layer: LearnedPositions) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Add each user's positions to its tokens `[U·B, T, d]`."""
        return (x.view(self.users, -1, *x.shape[1:]) + self.weight[:, None]).view(x.shape)


SIBLINGS: dict[type[nn.Module], Any] = {
    nn.Linear: StackedLinear,
    nn.LayerNorm: StackedNorm,
    nn.RMSNorm: StackedNorm,
    LearnedPositions: StackedPositions,
}
