"""Local training of one user: from start parameters and examples to an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpriv.data.federated import Examples
from fedpriv.training.parameters import load_parameters, parameters_of

#: A loss: the model's outputs and the targets of a batch to a scalar mean over the batch.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LocalTraining:
    """The public recipe that every user follows; the fields are those of the config's `local`."""

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 10
    lr: float = 0.1
    momentum: float = 0.0
    max_grad_norm: float | None = None
    proximal_mu: float = 0.0


@dataclass(frozen=True)
class LocalResult:
    """What local training gives.

    Attributes:
        update: start parameters minus parameters after training, by name: the direction that a
            server *subtracts*.
        loss: mean loss over the local steps, before each step. Private.
        examples: number of the user's examples. Private.
    """

    update: dict[str, Tensor]
    loss: float
    examples: int


def train_user(
    model: nn.Module,
    start: Mapping[str, Tensor],
    examples: Examples,
    recipe: LocalTraining,
    loss: Loss,
    generator: torch.Generator,
) -> LocalResult:
    """Train `model` from `start` on one user's examples by SGD and return the update.

    Args:
        model: a module to work in; its parameters are overwritten.
        start: the parameters that every user of the round starts from.
        examples: the user's examples, on the model's device.
        recipe: epochs or steps, batch size, learning rate, gradient clipping, FedProx.
        loss: mean loss of a batch.
        generator: decides the order of the examples.

    Each step follows the gradient of loss + μ/2·‖θ − θ_start‖² (FedProx, Li et al. 2020, eq. 2;
    μ = 0 is FedAvg), clipped to `max_grad_norm`.
    """
    load_parameters(model, start)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, foreach=True)
    losses = []
    for index in batches(len(examples), recipe, generator):
        optimizer.zero_grad()
        value = loss(model(examples.inputs[index]), examples.targets[index])
        value.backward()
        if recipe.proximal_mu:
            _add_proximal(parameters, list(start.values()), recipe.proximal_mu)
        if recipe.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        losses.append(value.detach())
    end = parameters_of(model)
    update = {name: start[name] - end[name] for name in end}
    return LocalResult(update, float(torch.stack(losses).mean()), len(examples))


def batches(count: int, recipe: LocalTraining, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the example indices of each local step: int64 `[at most batch_size]`.

    Each pass over the examples is in a fresh random order. With `steps`, passes follow one
    another until that many steps are taken; otherwise there are `epochs` passes.
    """
    passes = -(-count // recipe.batch_size)
    steps = recipe.steps if recipe.steps is not None else recipe.epochs * passes
    for step in range(steps):
        if step % passes == 0:
            order = torch.randperm(count, generator=generator)
        first = (step % passes) * recipe.batch_size
        yield order[first : first + recipe.batch_size]


def _add_proximal(parameters: list[nn.Parameter], start: list[Tensor], mu: float) -> None:
    for parameter, origin in zip(parameters, start, strict=True):
        assert parameter.grad is not None
        parameter.grad.add_(parameter.detach() - origin, alpha=mu)
