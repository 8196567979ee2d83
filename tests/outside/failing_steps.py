"""Normalisers and an optimizer that are wrong, each in a way that its author did not mean."""

from dataclasses import dataclass

import torch

from fedpriv.algorithms.base import Algorithm


def flat(update):
    """Of another shape."""
    return {name: block.flatten() for name, block in update.items()}


def listed(update):
    """Without names."""
    return list(update.values())


def undefined(update):
    """As 0/0 is."""
    return {name: block * float("nan") for name, block in update.items()}


class Second:
    """Fails when it is called again."""

    def __init__(self):
        self.calls = 0

    def __call__(self, update):
        self.calls += 1
        if self.calls == 2:
            raise ValueError("again")
        return update


class Grows:
    """Keeps, from its first call on, what no checkpoint can hold."""

    def __call__(self, update):
        self.seen = iter(update)
        return update


class Halting(torch.optim.SGD):
    """Cannot step."""

    def step(self, closure=None):
        raise RuntimeError("no step")


@dataclass(frozen=True)
class Large(Algorithm):
    """Needs more memory than there is."""

    cite = "nobody"

    def server(self, averages, shared, fraction):
        raise MemoryError("no room for the average")


@dataclass(frozen=True)
class Forgetful(Algorithm):
    """Keeps a vector on the server, and forgets to return it."""

    cite = "nobody"
    shared = ("direction",)

    def server(self, averages, shared, fraction):
        shared[0] = averages[0]


class Differentiating(torch.optim.Optimizer):
    """Nothing is wrong with it: its step differentiates something of its own."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                point = parameter.grad.detach().clone().requires_grad_()
                (point.tanh() * point).sum().backward()
                with torch.no_grad():
                    parameter.sub_(point.grad, alpha=group["lr"])


class Undefined(torch.optim.SGD):
    """Leaves what is no number."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.fill_(float("nan"))


@dataclass(frozen=True)
class Begins(Algorithm):
    """Begins with something else than a block of finite numbers; see `how`."""

    how: str = ""
    cite = "nobody"

    def begun(self, block):
        return {
            "none": lambda: None,
            "fails": lambda: {}["boom"],
            "array": lambda: block.numpy(),
            "undefined": lambda: block / 0,
            "flat": lambda: block.flatten()[:1],
            "shifted": lambda: block + 0.01,
        }[self.how]()


@dataclass(frozen=True)
class OnlySigns(Algorithm):
    """Trains signs, without what HideNseek prunes."""

    cite = "nobody"
    signs = True
