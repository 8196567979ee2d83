"""Optimizers of local training: how a user moves its parameters in each of its steps.

What an optimizer remembers is one user's, of one round: it begins with nothing for each. Those that
are registered move every number by that number's own history alone, so that their one formula
serves a single user, many users at once (`[U, ...]`), and silos, whose noisy gradients it is given.
One from outside is any class of torch's `Optimizer`; users are then trained one after another,
since nothing says what it makes of several users' numbers in one tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedpriv.components import Component, Kind, Options
from fedpriv.errors import InputError
from fedpriv.failures import told_as
from fedpriv.optimizers.schedules import scale_learning_rates
from fedpriv.sections import Positive


class LocalOptimizerOptions(Options):
    """How users move their parameters; the learning rate is `local.lr`."""

    name: str = Field(
        default="sgd",
        description="name of the optimizer, or package.module:object for your own, a class of "
        "torch's Optimizer, with which users are trained one after another",
    )


class SGDOptions(LocalOptimizerOptions):
    """Plain steps; `local.momentum` is its momentum."""

    @model_validator(mode="before")
    @classmethod
    def _momentum_is_beside_it(cls, document: object) -> object:
        if isinstance(document, dict) and "momentum" in document:
            raise ValueError("sgd takes its momentum from local.momentum: write it there")
        return document


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamOptions(LocalOptimizerOptions):
    """Adam as in torch; its decay is added to the gradient."""

    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="how slowly means of gradients and of squares move"
    )
    eps: Positive = Field(default=1e-8, description="what is added to the root of the squares")
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0, description="λ; λθ is added to each gradient"
    )


class AdamWOptions(AdamOptions):
    """Adam whose parameters shrink by their own share, beside the gradient."""

    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.01, description="λ; θ shrinks by λ times the learning rate in each step"
    )


LOCAL_OPTIMIZERS = Kind(
    key="local.optimizer",
    noun="local optimizer",
    registered={
        "sgd": "fedpriv.optimizers.local:sgd",
        "adam": "fedpriv.optimizers.local:adam",
        "adamw": "fedpriv.optimizers.local:adamw",
    },
    base="fedpriv.optimizers.local:LocalOptimizerOptions",
    facts=("params", "lr"),
    group="fedpriv.local_optimizers",
    default="sgd",
)


#: Takes a step of the parameters that it was made for, whose gradients are set, at a rate.
TakeStep = Callable[[float], None]


class LocalOptimizer(ABC):
    """How the steps of one user's local training are taken."""

    #: Whether many users' steps can be taken at once.
    stackable: ClassVar[bool] = False

    @abstractmethod
    def begin(
        self, parameters: Sequence[nn.Parameter], lr: float, multipliers: Sequence[float] = ()
    ) -> TakeStep:
        """Return what takes the steps of one user, with nothing remembered.

        Args:
            parameters: of one model.
            lr: the learning rate, before a schedule.
            multipliers: what it is multiplied by for each parameter; empty for nothing.
        """


class NumberByNumber(LocalOptimizer):
    """An optimizer that moves each number by its own history alone."""

    stackable = True

    @property
    @abstractmethod
    def kept(self) -> int:
        """How many numbers it remembers for each."""

    @abstractmethod
    def step(
        self,
        start: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],
        lr: float | Tensor,
        number: int,
        out: Tensor,
        factor: Tensor | None = None,
    ) -> None:
        """Write to `out` where `start` moves to.

        Args:
            start: where the parameter is; it may be one for all users, and may be `out` itself.
            gradient: the gradient; it may be overwritten.
            kept: `self.kept` tensors like the gradient; in the first step anything may be in them.
            lr: the learning rate of this step; a tensor where users have different ones.
            number: which step of the user's it is, from 1.
            out: where the parameter is to be, like the gradient.
            factor: what the gradient is multiplied by first, a number for each user.
        """

    def begin(
        self, parameters: Sequence[nn.Parameter], lr: float, multipliers: Sequence[float] = ()
    ) -> TakeStep:
        """Return what takes the steps of one user, with nothing remembered."""
        kept = [[torch.empty_like(p) for _ in range(self.kept)] for p in parameters]
        factors, taken = multipliers or (1.0,) * len(parameters), 0

        @torch.no_grad()
        def take(lr: float) -> None:
            nonlocal taken
            taken += 1
            for p, own, factor in zip(parameters, kept, factors, strict=True):
                assert p.grad is not None
                self.step(p, p.grad, own, lr * factor, taken, p)

        return take


def _moved(start: Tensor, direction: Tensor, by: float | Tensor, out: Tensor) -> None:
    """Write start - by · direction to `out`."""
    if isinstance(by, Tensor):
        torch.addcmul(start, direction, by, value=-1, out=out)
    else:
        torch.sub(start, direction, alpha=by, out=out)


@dataclass(frozen=True)
class SGD(NumberByNumber):
    """θ ← θ - η·v with v ← m·v + ∇, as torch's: v = ∇ where m = 0.

    Attributes:
        momentum: m.
    """

    momentum: float = 0.0

    @property
    def kept(self) -> int:
        """v, where there is momentum."""
        return 1 if self.momentum else 0

    def step(
        self,
        start: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],
        lr: float | Tensor,
        number: int,
        out: Tensor,
        factor: Tensor | None = None,
    ) -> None:
        """Write to `out` where `start` moves to: see `NumberByNumber`."""
        if not self.momentum:
            if factor is None:
                _moved(start, gradient, lr, out)
            elif isinstance(lr, Tensor):
                torch.addcmul(start, gradient, factor * lr, value=-1, out=out)
            else:
                torch.addcmul(start, gradient, factor, value=-lr, out=out)
            return
        (velocity,) = kept
        if number == 1:
            _scaled(gradient, factor, velocity)
        elif factor is None:
            velocity.mul_(self.momentum).add_(gradient)
        else:
            velocity.mul_(self.momentum).addcmul_(gradient, factor)
        _moved(start, velocity, lr, out)


def _scaled(gradient: Tensor, factor: Tensor | None, out: Tensor) -> None:
    """Write a gradient, times its factor, to `out`."""
    if factor is None:
        out.copy_(gradient)
    else:
        torch.mul(gradient, factor, out=out)


@dataclass(frozen=True)
class Adam(NumberByNumber):
    """Adam (Kingma and Ba 2015) as torch's, bias correction included.

    m ← β₁m + (1-β₁)∇,  v ← β₂v + (1-β₂)∇²,  θ ← θ - η · m/(1-β₁ᵏ) / (√v/√(1-β₂ᵏ) + ε)

    Attributes:
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ. λθ is added to the gradient; where `decoupled`, θ shrinks by ηλθ instead
            (AdamW: Loshchilov and Hutter 2019).
        decoupled: whether the decay passes by m and v.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    @property
    def kept(self) -> int:
        """m and v."""
        return 2

    def step(
        self,
        start: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],
        lr: float | Tensor,
        number: int,
        out: Tensor,
        factor: Tensor | None = None,
    ) -> None:
        """Write to `out` where `start` moves to: see `NumberByNumber`."""
        (mean, square), (beta1, beta2) = kept, self.betas
        if factor is not None:
            gradient.mul_(factor)
        if self.weight_decay and not self.decoupled:
            gradient.add_(start, alpha=self.weight_decay)
        if number == 1:
            torch.mul(gradient, 1 - beta1, out=mean)
            torch.mul(gradient, gradient, out=square).mul_(1 - beta2)
        else:
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # Nobody needs the gradient any more: its memory is used.
        spread = torch.sqrt(square, out=gradient).div_((1 - beta2**number) ** 0.5).add_(self.eps)
        direction = torch.div(mean, spread, out=spread)
        if self.weight_decay and self.decoupled:
            if start is not out:  # one for all users, at first
                out.copy_(start)
            start = out.mul_(1 - lr * self.weight_decay)
        _moved(start, direction, lr / (1 - beta1**number), out)


@dataclass(frozen=True)
class Signs(NumberByNumber):
    """s ← s - η·∇ and θ ← |θ|·sign(s), where s begins at θ: magnitudes stay (see `HideNseek`)."""

    @property
    def kept(self) -> int:
        """s."""
        return 1

    def step(
        self,
        start: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],
        lr: float | Tensor,
        number: int,
        out: Tensor,
        factor: Tensor | None = None,
    ) -> None:
        """Write to `out` where `start` moves to: see `NumberByNumber`."""
        (score,) = kept
        if factor is not None:
            gradient.mul_(factor)
        _moved(start if number == 1 else score, gradient, lr, score)
        torch.copysign(start, score, out=out)
        # What is no number has a sign too, and must not pass for an update.
        out.masked_fill_(~score.isfinite(), torch.nan)


@dataclass(frozen=True)
class OfTorch(LocalOptimizer):
    """An optimizer from outside, made anew for each user in each round.

    Attributes:
        component: what makes it.
        options: its options.
    """

    component: Component
    options: LocalOptimizerOptions

    def begin(
        self, parameters: Sequence[nn.Parameter], lr: float, multipliers: Sequence[float] = ()
    ) -> TakeStep:
        """Return what takes the steps of one user, with nothing remembered."""
        params: list[Any] = list(parameters)
        if multipliers:
            rates = zip(parameters, multipliers, strict=True)
            params = [{"params": [p], "lr": lr * factor} for p, factor in rates]
        made = self.component.build(self.options, params=params, lr=lr)
        if not isinstance(made, torch.optim.Optimizer) or not _moves(made, parameters):
            raise InputError(
                f"local.optimizer.name: {self.component.name} makes a {type(made).__name__}; it "
                "must make a torch.optim.Optimizer of the params that it is given"
            )
        for group in made.param_groups:
            group["initial_lr"] = group["lr"]

        def take(now: float) -> None:
            scale_learning_rates(made, now / lr)
            made.step()

        return take


def _moves(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(p) in moved for p in parameters)


def sgd(options: SGDOptions, momentum: float) -> SGD:
    """Return plain steps, with the momentum of `local.momentum`."""
    return SGD(momentum)


def adam(options: AdamOptions) -> Adam:
    """Return Adam."""
    return Adam(options.betas, options.eps, options.weight_decay)


def adamw(options: AdamWOptions) -> Adam:
    """Return AdamW."""
    return Adam(options.betas, options.eps, options.weight_decay, decoupled=True)


def build_local_optimizer(options: LocalOptimizerOptions, momentum: float) -> LocalOptimizer:
    """Return the optimizer of `options`; one from outside is tried on a few numbers.

    Raises:
        InputError: it is no optimizer of torch's kind, or cannot take a step.
    """
    component = LOCAL_OPTIMIZERS.of(options)
    if component.origin is None:
        return cast(LocalOptimizer, component.build(options, momentum=momentum))
    optimizer = OfTorch(component, options)
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    # Such as one that wants the loss taken again.
    with told_as(f"local.optimizer.name: {component.name} cannot take a step of gradients alone"):
        optimizer.begin([parameter], lr=0.1)(0.1)
    return optimizer
