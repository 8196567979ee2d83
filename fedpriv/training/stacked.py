"""Many users in one forward and one backward pass.

The users of a cohort start from the same parameters, so their parameters can be stacked to
`[U, ...]` and their batches laid end to end, `[U·B, ...]`. Each layer with parameters is exchanged
for a sibling that applies user u's parameters to user u's rows; all else in the model works on
rows and needs no change. A user's loss depends on its own slice alone, so that one backward pass
of the sum of losses gives every user's own gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fedpriv.data.federated import Batch
from fedpriv.models.stochastic import Stochastic
from fedpriv.models.vit import LearnedPositions
from fedpriv.training.local import LocalTraining
from fedpriv.training.parameters import Layout
from fedpriv.training.tasks import Task


class _Stacked(nn.Module):
    """A layer of U users; `weight` and `bias` are `[U, ...]` and are set before use."""

    weight: Tensor
    bias: Tensor | None = None

    def _per_user(self, x: Tensor) -> Tensor:
        """Return rows `[U·B, ..., d]` as `[U, B·..., d]`."""
        return x.reshape(len(self.weight), -1, x.shape[-1])


class _StackedLinear(_Stacked):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = self._per_user(x), self.weight.transpose(1, 2)
        if self.bias is None:
            out = torch.bmm(rows, weight)
        else:
            out = torch.baddbmm(self.bias[:, None], rows, weight)
        return out.view(*x.shape[:-1], -1)


class _StackedNorm(_Stacked):
    def __init__(self, layer: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__()
        self.norm = type(layer)(layer.normalized_shape, layer.eps, elementwise_affine=False)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).reshape(len(self.weight), -1, *self.norm.normalized_shape)
        scaled = rows * self.weight[:, None]
        if self.bias is not None:
            scaled = scaled + self.bias[:, None]
        return scaled.view(x.shape)


class _StackedPositions(_Stacked):
    def __init__(self, layer: LearnedPositions) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        users = len(self.weight)
        return (x.view(users, -1, *x.shape[1:]) + self.weight[:, None]).view(x.shape)


_SIBLINGS: dict[type[nn.Module], Any] = {
    nn.Linear: _StackedLinear,
    nn.LayerNorm: _StackedNorm,
    nn.RMSNorm: _StackedNorm,
    LearnedPositions: _StackedPositions,
}


def can_stack(model: nn.Module) -> bool:
    """Say whether every parameter of `model` is trainable and lies in a layer that is known here.

    A layer that is used in two places counts as unknown.
    """
    owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    shared = len(list(model.named_parameters(remove_duplicate=False))) > len(
        list(model.parameters())
    )
    known = all(type(owner) in _SIBLINGS for owner in owners)
    return known and not shared and all(p.requires_grad for p in model.parameters())


class StackedModel:
    """A model of many users at once; `module` maps rows as the plain model does.

    Memory for the parameters of the largest stack is kept between stacks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layout = Layout.of(model)
        self.module = copy.deepcopy(model)
        self._owners: list[tuple[_Stacked, str]] = []
        for name in self.layout.names:
            path, _, attribute = name.rpartition(".")
            self._owners.append((self._exchanged(path), attribute))
        self._buffer = torch.empty(0, self.layout.total)
        self.parameters: list[Tensor] = []

    def _exchanged(self, path: str) -> _Stacked:
        """Return the stacked sibling at `path`, which takes the plain layer's place."""
        layer = self.module.get_submodule(path)
        if isinstance(layer, _Stacked):
            return layer
        sibling = _SIBLINGS[type(layer)](layer)
        self.module.set_submodule(path, sibling)
        return sibling

    def start(self, parameters: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Give each of U users the flat `parameters` `[P]` and its random stream.

        Returns the users' own parameters, `[U, P]`, which training changes in place; they are
        valid until the next call.
        """
        users = len(generators)
        if len(self._buffer) < users or self._buffer.device != parameters.device:
            self._buffer = parameters.new_empty(users, self.layout.total)
        flat = self._buffer[:users].copy_(parameters)
        self.parameters = []
        blocks = flat.split(self.layout.sizes, dim=1)
        for block, shape, (owner, name) in zip(
            blocks, self.layout.shapes, self._owners, strict=True
        ):
            parameter = block.view(users, *shape).requires_grad_()
            self.parameters.append(parameter)
            setattr(owner, name, parameter)
        draw = _PerUserDraw(generators)
        for module in self.module.modules():
            if isinstance(module, Stochastic):
                module.draw = draw
        return flat


@lru_cache(maxsize=1)
def stacked_model(model: nn.Module) -> StackedModel | None:
    """Return the stacked sibling of `model`, the same one each time; None where it has none.

    It is kept here because a trainer is replaced in every round in which clip bounds have moved.
    """
    return StackedModel(model) if can_stack(model) else None


@dataclass(frozen=True)
class _PerUserDraw:
    """Draws each user's rows from the user's own generator."""

    generators: Sequence[torch.Generator]

    def __call__(self, shape: Sequence[int], device: torch.device) -> Tensor:
        rows = shape[0] // len(self.generators)
        parts = [torch.rand(rows, *shape[1:], generator=g) for g in self.generators]
        return torch.cat(parts).to(device)


@dataclass(frozen=True)
class StackedUser:
    """What one user of a stack trains on.

    Attributes:
        user: the user's number.
        examples: the user's examples.
        steps: the example indices of each local step.
        dropout: the random stream of layers such as dropout.
        augmentation: the random stream of augmentation.
    """

    user: int
    examples: Batch
    steps: Sequence[Tensor]
    dropout: torch.Generator
    augmentation: torch.Generator

    @property
    def largest_step(self) -> int:
        """What the largest step costs: rows times the largest example among them."""
        sizes = self.examples.sizes
        return max(len(index) * int(sizes[index].max()) for index in self.steps)


@dataclass(frozen=True)
class StackedResult:
    """What a stack's training gives, users in the order in which they were given.

    Attributes:
        updates: float32 `[U, P]`, start parameters minus parameters after training.
        losses: float32 `[U]`, mean loss over the local steps, before each step. Private.
    """

    updates: Tensor
    losses: Tensor


def train_stack(
    stacked: StackedModel,
    parameters: Tensor,
    users: Sequence[StackedUser],
    recipe: LocalTraining,
    task: Task[Any],
    round_: int,
) -> StackedResult:
    """Train all `users` from the flat `parameters` at once, each as `train_user` trains it alone.

    A user with fewer steps, or fewer examples in a step, than others is filled up with rows that
    weigh nothing.
    """
    flat = stacked.start(parameters, [user.dropout for user in users])
    stacked.module.train()
    origin = parameters.split(stacked.layout.sizes)
    losses = parameters.new_zeros(len(users))
    momenta: list[Tensor] = []
    for step in range(max(len(user.steps) for user in users)):
        batch, weights = _joined(users, step, task, round_)
        per_example = task.losses(stacked.module, batch).view(len(users), -1)
        active = weights.any(dim=1)
        weights = weights.to(per_example)
        per_user = (per_example * weights).masked_fill(weights == 0, 0.0).sum(1)
        gradients = list(torch.autograd.grad(per_user.sum(), stacked.parameters))
        losses += per_user.detach()
        with torch.no_grad():
            _step(stacked.parameters, gradients, origin, momenta, active, recipe)
    counts = torch.tensor([len(user.steps) for user in users], device=losses.device)
    return StackedResult(parameters - flat.detach(), losses / counts)


def _joined(
    users: Sequence[StackedUser], step: int, task: Task[Any], round_: int
) -> tuple[Batch, Tensor]:
    """Return the rows of one step, equally many a user, and the weight of each: `[U, B]`."""
    parts, counts = [], []
    for user in users:
        done = step >= len(user.steps)
        index = user.steps[0][:1] if done else user.steps[step]
        part = user.examples.take(index)
        parts.append(part if done else task.augment(part, round_, user.augmentation))
        counts.append(0 if done else len(index))
    rows = max(len(part) for part in parts)
    filled = [_filled_up(part, rows) for part in parts]
    real = torch.tensor(counts)[:, None]
    weights = (torch.arange(rows) < real) / real.clamp(min=1).double()
    return type(parts[0]).join(filled), weights


def _filled_up(part: Batch, rows: int) -> Batch:
    """Return a batch with its first example repeated to a length of `rows`."""
    if len(part) == rows:
        return part
    index = torch.arange(rows)
    return part.take(torch.where(index < len(part), index, 0))


def _step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    origin: Sequence[Tensor],
    momenta: list[Tensor],
    active: Tensor,
    recipe: LocalTraining,
) -> None:
    """Take one SGD step of every active user, in place; `momenta` holds what SGD remembers.

    `active`, boolean `[U]`, is on the CPU: to ask it is no wait for a GPU.
    """
    idle, everyone = ~active.to(parameters[0].device), bool(active.all())
    if recipe.proximal_mu:
        for gradient, parameter, start in zip(gradients, parameters, origin, strict=True):
            gradient.add_(parameter - start.view(parameter.shape[1:]), alpha=recipe.proximal_mu)
    if not everyone:  # at a finished user's parameters it may hold anything, and 0 · Inf is NaN
        for gradient in gradients:
            gradient.masked_fill_(_column(idle, gradient), 0.0)
    factors = torch.ones_like(idle, dtype=parameters[0].dtype)
    if recipe.max_grad_norm is not None:
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        # The same constant as torch's clip_grad_norm_, for equal results.
        factors = factors * (recipe.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        scaled = gradient * _column(factors, gradient)
        if recipe.momentum:
            if len(momenta) <= index:
                momenta.append(torch.zeros_like(scaled))
            scaled = momenta[index].mul_(recipe.momentum).add_(scaled)
            if not everyone:
                scaled = scaled.masked_fill(_column(idle, scaled), 0.0)
        parameter.sub_(scaled, alpha=recipe.lr)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` `[U]` shaped to scale `like` `[U, ...]`."""
    return values.view(-1, *(1,) * (like.dim() - 1))
