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
    """Linear maps of many users, whose weights' gradients are not autograd's.

    The gradient of user u's weight is gᵀx, with g the gradient at its n outputs and x its inputs.
    It is kept as what has fewer numbers: written out it has in·out a user, as its factors
    n·(in + out). A small one is written out while g is in the processor's caches; of a large one
    the factors can be taken straight into the step. Where users still share their parameters,
    before the first step, `weight` is `[out, in]`, `bias` is `[out]`, and one product serves all.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._anchor = layer.weight.new_zeros(()).requires_grad_()
        self._factors: tuple[Tensor, ...] = ()
        self._gradients: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Map rows `[U·B, ..., in]` to `[U·B, ..., out]`."""
        out = _Linear.apply(self._per_user(x), self._anchor, self)
        return out.view(*x.shape[:-1], -1)

    def mapped(self, rows: Tensor) -> Tensor:
        """Map `[U, n, in]` to `[U, n, out]`."""
        if self.weight.dim() == 2:
            return F.linear(rows, self.weight, self.bias)
        mapped = torch.bmm(rows, self.weight.transpose(1, 2))
        # Faster than `baddbmm`, which writes the bias out first.
        return mapped if self.bias is None else mapped.add_(self.bias[:, None])

    def passed_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient at the inputs `[U, n, in]` from that at the outputs `[U, n, out]`."""
        return torch.matmul(gradient, self.weight.to(gradient.dtype))

    def keep(self, gradient: Tensor, rows: Tensor) -> None:
        """Keep what gradients are made of: g `[U, n, out]` and x `[U, n, in]`."""
        self._factors, self._gradients = (gradient, rows), {}
        rows_each, outputs, inputs = *gradient.shape[1:], rows.shape[2]
        if inputs * outputs < rows_each * (inputs + outputs):
            everyone = slice(None)
            self._gradients["weight"] = self.gradient("weight", everyone)
            if self.bias is not None:
                self._gradients["bias"] = self.gradient("bias", everyone)
            self._factors = ()

    def gradient(self, name: str, users: slice) -> Tensor:
        """Return the gradient of the last pass by `name`, "weight" or "bias", for some users."""
        if name in self._gradients:
            return self._gradients[name][users]
        gradient, rows = (factor[users] for factor in self._factors)
        if name == "bias":
            return gradient.sum(1, dtype=self.weight.dtype)
        return torch.bmm(gradient.transpose(1, 2), rows).to(self.weight.dtype)


class _Linear(torch.autograd.Function):
    """The linear map as autograd sees it, which asks for no gradient of its parameters.

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
        ctx.layer.keep(gradient, rows.detach().to(gradient.dtype))
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
