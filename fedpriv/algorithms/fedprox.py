"""FedProx (Li et al. 2020, "Federated Optimization in Heterogeneous Networks").

user:    y ← x;  K times:  y ← y - η (∇loss(y) + μ(y - x));  send Δ = x - y
server:  as FedAvg
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpriv.algorithms.base import Algorithm


@dataclass(frozen=True)
class FedProx(Algorithm):
    """Local SGD that is held back to where it started, and the average of the updates.

    Attributes:
        mu: μ, the weight of μ/2·‖y - x‖² in the local loss.
    """

    mu: float
    cite = "FedProx (Li et al. 2020)"

    @property
    def proximal_mu(self) -> float:
        """Return μ."""
        return self.mu
