"""An algorithm of somebody's own: users also send the square of their update, as a second payload.

The server keeps a mean of these squares and sends it with the model, as an adaptive method might.
"""

from dataclasses import dataclass

import torch

from fedpriv.algorithms.base import Algorithm


@dataclass(frozen=True)
class WithSquares(Algorithm):
    """FedAvg, and what its server learns of second moments."""

    decay: float = 0.5
    cite = "squares (somebody, 2026)"
    payloads = ("model", "squares")
    shared = ("moments",)

    def sent(self, trained):
        return [trained.updates.square()]

    def server(self, averages, shared, fraction):
        return torch.stack([self.decay * shared[0] + (1 - self.decay) * averages[1].to(shared)])


@dataclass(frozen=True)
class OverAll(Algorithm):
    """Its author forgot that there is one row a user: norms and means are those of the stack."""

    payloads = ("model", "direction", "drift")
    shared = ("control",)
    keeps = True

    def pull(self, shared, kept):
        return shared[0] - kept.mean(0)

    def sent(self, trained):
        return [trained.updates / trained.updates.norm(), trained.updates - trained.updates.mean(0)]

    def kept(self, trained, sent):
        return trained.kept + sent[0].sum(0)

    def server(self, averages, shared, fraction):
        return shared


@dataclass(frozen=True)
class Unsent(Algorithm):
    """Says that it sends more than it does."""

    payloads = ("model", "more")


@dataclass(frozen=True)
class Short(Algorithm):
    """Sends one number."""

    payloads = ("model", "more")

    def sent(self, trained):
        return [trained.updates.norm(dim=1)]


def no_algorithm():
    return 3
