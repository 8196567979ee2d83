"""Local training of one user: from start parameters and examples to an update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fedpriv.data.federated import Batch
from fedpriv.models.parameters import load_parameters, parameters_of
from fedpriv.optimizers.local import SGD, LocalOptimizer
from fedpriv.optimizers.schedules import LocalScheduleConfig, local_factor
from fedpriv.tasks.base import Task
from fedpriv.training.options import Precision

PLAIN, CONSTANT = SGD(), LocalScheduleConfig()


@dataclass(frozen=True)
class LocalTraining:
    """The public recipe that every user follows; the fields are those of the config's `local`.

    `multipliers` are those of the learning rate, one a trained block; empty where all are 1. For
    the `perturbation` see `Algorithm`.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 10
    batch_sizes: int | None = None
    order: Literal["shuffled", "by_length"] = "shuffled"
    optimizer: LocalOptimizer = PLAIN
    lr: float = 0.1
    multipliers: tuple[float, ...] = ()
    schedule: LocalScheduleConfig = CONSTANT
    max_grad_norm: float | None = None
    proximal_mu: float = 0.0
    perturbation: tuple[float, float, bool] = (0.0, 0.0, False)
    precision: Precision = "float32"

    @property
    def momentum(self) -> float:
        """The momentum of SGD; 0 for every other optimizer."""
        return self.optimizer.momentum if isinstance(self.optimizer, SGD) else 0.0

    @property
    def plain(self) -> bool:
        """Whether a step is θ ← θ - η·∇, which each parameter can take by itself."""
        plain = self.optimizer == PLAIN
        return plain and not (self.proximal_mu or self.max_grad_norm is not None)

    @property
    def stackable(self) -> bool:
        """Whether many users' steps can be taken at once."""
        return self.optimizer.stackable and not self.perturbs

    @property
    def perturbs(self) -> bool:
        """Whether a step takes a second gradient, further uphill."""
        return all(self.perturbation[:2])

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, from 1, of a user who takes so many `steps`."""
        return self.lr * local_factor(self.schedule, step, steps)

    def products(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context of a forward pass; products in it, and their gradients, are rounded.

        Parameters, steps, clipping and sums stay as they are. TF32 is a setting of the device.
        """
        if self.precision == "bfloat16":
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()


@dataclass(frozen=True)
class LocalResult:
    """What local training gives.

    Attributes:
        update: start parameters minus parameters after training, by name: the direction that a
            server *subtracts*.
        loss: mean loss over the local steps, before each step. Private.
    """

    update: dict[str, Tensor]
    loss: float


def train_user(
    model: nn.Module,
    start: Mapping[str, Tensor],
    steps: Iterable[Batch],
    recipe: LocalTraining,
    task: Task[Any],
    pull: Sequence[Tensor] = (),
    count: int | None = None,
) -> LocalResult:
    """Train `model` from `start` on one user's batches and return the update.

    Args:
        model: a module to work in; its parameters are overwritten.
        start: the parameters that every user of the round starts from.
        steps: the batch of each local step, on the model's device.
        recipe: optimizer, learning rate, gradient clipping, FedProx.
        task: what is learnt.
        pull: what is added to the gradient of each parameter, where anything is.
        count: how many steps there are, which a schedule asks for; None: as long as `steps` is.

    Each step follows the gradient of loss + μ/2·‖θ − θ_start‖² (FedProx, Li et al. 2020, eq. 2;
    μ = 0 is FedAvg) and the pull, clipped to `max_grad_norm`.
    """
    load_parameters(model, start)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    take = recipe.optimizer.begin(parameters, recipe.lr, recipe.multipliers)
    if count is None:
        count = len(cast(Sized, steps))
    losses = []
    for number, batch in enumerate(steps, 1):
        model.zero_grad()
        with recipe.products(parameters[0].device):
            value = task.losses(model, batch).mean()
        value.backward()
        if recipe.perturbs:
            _look_uphill(model, parameters, batch, recipe, task)
        correct(parameters, list(start.values()), recipe, pull)
        if recipe.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        take(recipe.rate(number, count))
        losses.append(value.detach())
    end = parameters_of(model)
    update = {name: start[name] - end[name] for name in end}
    return LocalResult(update, float(torch.stack(losses).mean()))


def _look_uphill(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batch: Batch,
    recipe: LocalTraining,
    task: Task[Any],
) -> None:
    """Make the gradients g, in place, (1-α)g + α∇(θ + ρg) (Sun et al. 2023)."""
    ascent, weight, unit = recipe.perturbation
    first = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    here = [p.detach().clone() for p in parameters]
    if unit:
        norm = float(nn.utils.get_total_norm(first))
        ascent = ascent / norm if norm else 0.0
    with torch.no_grad():
        for parameter, gradient in zip(parameters, first, strict=True):
            parameter.add_(gradient, alpha=ascent)
    model.zero_grad()
    with recipe.products(parameters[0].device):
        value = task.losses(model, batch).mean()
    value.backward()
    with torch.no_grad():
        for parameter, back, gradient in zip(parameters, here, first, strict=True):
            parameter.copy_(back)
            second = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
            parameter.grad = gradient.lerp_(second, weight)


def batches(
    sizes: Tensor, recipe: LocalTraining, own: torch.Generator, shared: torch.Generator
) -> Iterator[Tensor]:
    """Yield the example indices of each local step: int64 `[at most batch_size]`.

    `sizes` int64 `[n]` are what the examples cost. Each pass over them is in a fresh random
    order. With `steps`, passes follow one another until that many steps are taken; otherwise
    there are `epochs` passes.

    `own` is the user's random stream. `shared` starts alike for all users of a round: with
    `order: by_length` it says when the shortest examples come and when longer ones do, so that
    users who train together have examples of like length at the same time.
    """
    if recipe.steps is None:
        for _ in range(recipe.epochs):
            yield from _one_pass(sizes, recipe, own, shared)
        return
    taken = 0
    while taken < recipe.steps:
        for batch in _one_pass(sizes, recipe, own, shared)[: recipe.steps - taken]:
            yield batch
            taken += 1


def _one_pass(
    sizes: Tensor, recipe: LocalTraining, own: torch.Generator, shared: torch.Generator
) -> list[Tensor]:
    order = torch.randperm(len(sizes), generator=own)
    if recipe.order == "shuffled":
        return _cut(order, sizes, recipe)
    # Examples of like length share a batch; the batches, not the examples, come in random order.
    sorted_ = _cut(order[sizes[order].argsort(stable=True)], sizes, recipe)
    return [sorted_[i] for i in torch.randperm(len(sorted_), generator=shared).tolist()]


def _cut(order: Tensor, sizes: Tensor, recipe: LocalTraining) -> list[Tensor]:
    """Cut `order` into batches of `batch_size`, or less where they would exceed `batch_sizes`.

    A batch costs its number of examples times the largest of them: the rest is padding.
    """
    if recipe.batch_sizes is None:
        return list(order.split(recipe.batch_size))
    cut: list[Tensor] = []
    batch: list[int] = []
    largest = 0
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        full = len(batch) == recipe.batch_size
        if batch and (full or (len(batch) + 1) * max(largest, size) > recipe.batch_sizes):
            cut.append(torch.tensor(batch))
            batch, largest = [], 0
        batch.append(index)
        largest = max(largest, size)
    return [*cut, torch.tensor(batch)]


def correct(
    parameters: Sequence[nn.Parameter],
    start: Sequence[Tensor],
    recipe: LocalTraining,
    pull: Sequence[Tensor] = (),
) -> None:
    """Make the loss's gradients those that a step follows, in place: see `corrected`."""
    for parameter, origin, more in zip_longest(parameters, start, pull):
        if parameter.grad is None:  # as of a mask that this step has none of
            parameter.grad = torch.zeros_like(parameter)
        corrected(parameter.grad, parameter.detach(), origin, recipe.proximal_mu, more)


def corrected(
    gradient: Tensor, value: Tensor, start: Tensor, mu: float, pull: Tensor | None = None
) -> None:
    """Add μ·(θ - θ_start) (FedProx), and the pull (SCAFFOLD), to a gradient, in place.

    The optimizer is given what comes of it, in every engine.
    """
    if mu:
        gradient.add_(value - start, alpha=mu)
    if pull is not None:
        gradient.add_(pull)
