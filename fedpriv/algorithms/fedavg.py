"""FedAvg (McMahan et al. 2017), with a server optimizer (Reddi et al. 2021): FedOpt.

user:    y ← x;  K times:  y ← y - η ∇loss(y);  send Δ = x - y
server:  x ← optimizer(x, mean of Δ)
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpriv.algorithms.base import Algorithm


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Local SGD, and the average of the updates."""

    cite = "FedAvg (McMahan et al. 2017)"
