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
        return torch.stack([self.decay * shared[0] + (1 - self.decay) * averages[0].to(shared)])
