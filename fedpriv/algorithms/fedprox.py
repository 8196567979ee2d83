"""FedProx (Li et al. 2020, "Federated Optimization in Heterogeneous Networks").

    user:    y ← x;  K times:  y ← y - η (∇loss(y) + μ(y - x));  send Δ = x - y
    server:  as FedAvg

μ is `proximal_mu` of the local recipe, which every engine's step follows; with μ = 0 it is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpriv.algorithms.base import Algorithm


@dataclass(frozen=True)
class FedProx(Algorithm):
    """Local SGD that is held back to where it started, and the average of the updates."""
