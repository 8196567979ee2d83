"""Layers of many users: user u's parameters meet user u's rows.

Rows of all users lie end to end, `[U·B, ...]`, so that whatever has no parameters works on them as
it is. Each layer with parameters is exchanged for a sibling whose parameters are `[U, ...]`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpriv.models.vit import LearnedPositions


def of_users(stacked: Tensor, low: int, high: int) -> Tensor:
    """Return `stacked[low:high]`: itself where that is all of it, since even a view takes time."""
    return stacked if high - low == stacked.shape[0] else stacked[low:high]


class StackedLayer(nn.Module):
    """A layer of `users` users; `weight` and `bias` are `[U, ...]` and are set before each pass."""

    users: int
    weight: Tensor
    bias: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # In every pass plain tensors are set. A module would first look for parameters and buffers
        # of their names, which takes longer than the arithmetic of a small layer.
        if isinstance(value, nn.Module):
            super().__setattr__(name, value)
        else:
            object.__setattr__(self, name, value)


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
        return cast(Tensor, _Linear.apply(x, self._anchor, self))

    def mapped(self, rows: Tensor) -> Tensor:
        """Map `[U, n, in]` to `[U, n, out]`."""
        mapped = torch.matmul(rows, self.weight.mT)
        if self.bias is None:
            return mapped
        # Faster than `F.linear` and `baddbmm`, which write the bias out first.
        return mapped.add_(self.bias if self.bias.dim() == 1 else self.bias[:, None])

    def passed_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient at the inputs `[U, n, in]` from that at the outputs `[U, n, out]`."""
        return torch.matmul(gradient, self.weight.to(gradient.dtype))

    def keep(self, gradient: Tensor, rows: Tensor) -> None:
        """Keep what gradients are made of: g `[U, n, out]` and x `[U, n, in]`."""
        self._factors, self._gradients = (gradient, rows), {}
        (users, rows_each, outputs), inputs = gradient.shape, rows.shape[2]
        if inputs * outputs < rows_each * (inputs + outputs):
            written_out = {"weight": self.gradient("weight", 0, users)}
            if self.bias is not None:
                written_out["bias"] = self.gradient("bias", 0, users)
            self._factors, self._gradients = (), written_out

    def gradient(self, name: str, low: int, high: int) -> Tensor:
        """Return the last pass's gradient by "weight" or "bias" of users `low` to `high`."""
        if self._gradients:
            return of_users(self._gradients[name], low, high)
        gradient, rows = (of_users(factor, low, high) for factor in self._factors)
        if name == "bias":
            return gradient.sum(1, dtype=self.weight.dtype)
        return torch.bmm(gradient.transpose(1, 2), rows).to(self.weight.dtype)


class _Linear(torch.autograd.Function):
    """The linear map as autograd sees it, which asks for no gradient of its parameters.

    `anchor` takes a gradient, so that backward comes by even where the inputs take none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: StackedLinear) -> Tensor:
        ctx.layer, ctx.inputs = layer, x.shape
        rows = x.reshape(layer.users, -1, x.shape[-1])
        ctx.save_for_backward(rows)
        return layer.mapped(rows).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (rows,) = ctx.saved_tensors
        gradient = gradients[0].contiguous().view(*rows.shape[:-1], -1)
        # In a forward pass of lower precision the outputs are rounded, and so are their gradients.
        ctx.layer.keep(gradient, rows.to(gradient.dtype))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return ctx.layer.passed_back(gradient).to(rows.dtype).view(ctx.inputs), None, None


class StackedNorm(StackedLayer):
    """LayerNorm or RMSNorm of many users."""

    def __init__(self, layer: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__()
        self.norm = type(layer)(layer.normalized_shape, layer.eps, elementwise_affine=False)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise rows `[U·B, ..., d]`."""
        return cast(Tensor, _Scaled.apply(self.norm(x), self.weight, self.bias))


class _Scaled(torch.autograd.Function):
    """x · weight + bias: each user's rows `[U·B, ..., d]` by the user's own `[U, d]`.

    Written out, since autograd would go through the rows once more in its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(weight.shape[0], -1, *weight.shape[1:])
        ctx.save_for_backward(rows, weight)
        ctx.biased = bias is not None
        if bias is None:
            return (rows * weight[:, None]).view(x.shape)
        return torch.addcmul(bias[:, None], rows, weight[:, None]).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(rows.shape)
        of_x = (gradient * weight[:, None]).to(rows.dtype).view(gradients[0].shape)
        of_bias = gradient.sum(1) if ctx.biased else None
        return of_x, (gradient * rows).sum(1), of_bias


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
