"""Layers of many users: user u's parameters meet user u's rows.

Rows of all users lie end to end, `[U·B, ...]`, so that whatever has no parameters works on them as
it is. Each layer with parameters is exchanged for a sibling whose parameters are `[U, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable
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

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        """Say whether this layer can be exchanged: a setting may be one that is not known here."""
        return True

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

    A step may be taken in the backward pass, as soon as gradients may be asked for and the pass
    needs the parameters no more: it finds all of them in the caches.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer.weight, Tensor)
        self._anchor = layer.weight.new_zeros(()).requires_grad_()
        self._factors: tuple[Tensor, ...] = ()
        self._gradients: dict[str, Tensor] = {}
        self._take_step: Callable[[], None] | None = None
        self._passed = self.stepped = False

    def begin_pass(self, take_step: Callable[[], None] | None) -> None:
        """Make ready for a pass; where `take_step` is given, its backward pass calls it once.

        `stepped` then says whether it was called.
        """
        self._take_step, self._passed, self.stepped = take_step, False, False
        self._factors, self._gradients = (), {}

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
        self._factors = gradient, rows
        (users, rows_each, outputs), inputs = gradient.shape, rows.shape[2]
        if self.bias is not None:  # at once, while g is in the processor's caches
            self._gradients["bias"] = gradient.sum(1, dtype=self.weight.dtype)
        if inputs * outputs < rows_each * (inputs + outputs):
            self._gradients["weight"] = self._product(0, users)
            self._factors = ()

    def end_pass(self) -> None:
        """Take the step where it is to be taken in the backward pass; then forget the gradients.

        Raises:
            RuntimeError: the layer was there twice in one forward pass, and has stepped already.
        """
        if self._passed:
            raise RuntimeError("a linear layer can only be used once in a stack's forward pass")
        self._passed = True
        if self._take_step is not None:
            self._take_step()
            self._take_step, self.stepped = None, True
            self._factors, self._gradients = (), {}

    def gradient(self, name: str, low: int, high: int) -> Tensor:
        """Return the pass's gradient by "weight" or "bias" of users `low` to `high`.

        Raises:
            RuntimeError: the pass was not here, or its gradients are forgotten.
        """
        if not self._passed or self.stepped:
            raise RuntimeError("a stacked linear layer was not in the forward pass")
        if name in self._gradients:
            return of_users(self._gradients[name], low, high)
        return self._product(low, high)

    def _product(self, low: int, high: int) -> Tensor:
        gradient, rows = (of_users(factor, low, high) for factor in self._factors)
        return torch.bmm(gradient.transpose(1, 2), rows).to(self.weight.dtype)


class StackedTransposed(StackedLinear):
    """Linear maps whose weights are `[in, out]`, as those of transformers' GPT-2."""

    def mapped(self, rows: Tensor) -> Tensor:
        """Map `[U, n, in]` to `[U, n, out]`."""
        mapped = torch.matmul(rows, self.weight)
        assert self.bias is not None
        return mapped.add_(self.bias if self.bias.dim() == 1 else self.bias[:, None])

    def passed_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient at the inputs `[U, n, in]` from that at the outputs `[U, n, out]`."""
        return torch.matmul(gradient, self.weight.mT.to(gradient.dtype))

    def _product(self, low: int, high: int) -> Tensor:
        gradient, rows = (of_users(factor, low, high) for factor in self._factors)
        return torch.bmm(rows.transpose(1, 2), gradient).to(self.weight.dtype)


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
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = ctx.layer.passed_back(gradient).to(rows.dtype).view(ctx.inputs)
        # In a forward pass of lower precision the outputs are rounded, and so are their gradients.
        ctx.layer.keep(gradient, rows.to(gradient.dtype))
        ctx.layer.end_pass()
        return of_x, None, None


class StackedNorm(StackedLayer):
    """LayerNorm or RMSNorm of many users."""

    def __init__(self, layer: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__()
        # A class of another library that is derived from it normalises alike.
        kind = nn.RMSNorm if isinstance(layer, nn.RMSNorm) else nn.LayerNorm
        self.norm = kind(layer.normalized_shape, layer.eps, elementwise_affine=False)  # type: ignore[arg-type]

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


class StackedGroupNorm(StackedLayer):
    """GroupNorm of many users, who lie side by side among the channels: `[B, U, C, ...]`.

    Their groups are then as many times more, and the library scales them in the same pass.
    """

    def __init__(self, layer: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = layer.num_groups, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, U, C, ...]`."""
        groups = self.groups * x.shape[1]
        bias = None if self.bias is None else self.bias.flatten()
        weight = self.weight.flatten()
        rows = x.flatten(1, 2)
        return nn.functional.group_norm(rows, groups, weight, bias, self.eps).view(x.shape)


class StackedPositions(StackedLayer):
    """Learned positions of many users."""

    def __init__(self, layer: LearnedPositions) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Add each user's positions to its tokens `[U·B, T, d]`."""
        return (x.view(self.users, -1, *x.shape[1:]) + self.weight[:, None]).view(x.shape)


class StackedEmbedding(StackedLayer):
    """Embeddings of many users."""

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        """Say whether its rows are looked up and nothing else is done with them."""
        assert isinstance(layer, nn.Embedding)
        beside = layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse
        return not beside and layer.padding_idx is None

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens, int64 `[U·B, T]`, to vectors `[U·B, T, d]`, each by its user's `[V, d]`."""
        users, size = self.weight.shape[:2]
        first = torch.arange(0, users * size, size, device=tokens.device)
        whose = first.repeat_interleave(len(tokens) // users)
        rows = tokens + whose.view(-1, *(1,) * (tokens.dim() - 1))
        return nn.functional.embedding(rows, self.weight.flatten(0, 1))


SIBLINGS: dict[type[nn.Module], Any] = {
    nn.Embedding: StackedEmbedding,
    nn.Linear: StackedLinear,
    nn.LayerNorm: StackedNorm,
    nn.RMSNorm: StackedNorm,
    LearnedPositions: StackedPositions,
}

#: What has no parameters of its own and treats each row by itself, without drawing anything.
ROW_BY_ROW: tuple[type[nn.Module], ...] = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Tanh,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
)


def rows_apart(module: nn.Module) -> bool:
    """Say whether a module is known to treat each row by itself, and to draw nothing by itself.

    One that looks at other rows, such as a mean over a batch, would let one user's data into
    another's update; one that draws from a global generator would let users decide about one
    another's draws; and one that passes a layer twice has gradients that the siblings do not take.
    None of that can be seen from outside, so a class of somebody's own says that it is none of
    them: `stackable = True`, which those derived from it do not inherit.
    """
    kind = type(module)
    if kind is nn.Flatten:
        return cast(nn.Flatten, module).start_dim > 0
    own = kind.__module__.startswith("fedpriv.") or kind in ROW_BY_ROW or kind in SIBLINGS
    return own or vars(kind).get("stackable") is True
