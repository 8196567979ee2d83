"""SCAFFOLD-M (Cheng et al. 2024, "Momentum benefits non-iid federated learning ...").

    user k:  y ← x;  K times:  y ← y - η (β(∇loss(y) - c_k + c) + (1-β)g)
             c_k⁺ = mean of the K gradients ∇loss(y);  send x - y and c_k⁺ - c_k
    server:  g ← mean of (x - y)/(ηK);  x ← x - γg;  c ← c + |S|/N · mean of c_k⁺ - c_k

Of the steps y ← y - ηβ (∇loss(y) - c_k + c + r·g), r = (1-β)/β, the mean of gradients is known:
c_k⁺ = (x - y)/(ηβK) + c_k - c - r·g. All else is as in SCAFFOLD and FedAvg-M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedpriv.algorithms.base import Algorithm, Trained
from fedpriv.algorithms.fedavg_m import Beta, without_steps
from fedpriv.algorithms.scaffold import of_plain_steps

if TYPE_CHECKING:
    from fedpriv.training.local import LocalTraining


@dataclass(frozen=True)
class ScaffoldM(Algorithm):
    """Two payloads, the update and the change of a user's control, and the direction of all.

    Attributes:
        beta: β, the weight of a user's corrected gradients; 1 is SCAFFOLD.
    """

    beta: Beta = 0.1
    cite = "SCAFFOLD-M (Cheng et al. 2024)"
    payloads = ("model", "control")
    shared = ("control", "direction")
    keeps = True

    def refuses(self, recipe: LocalTraining) -> str | None:
        """Refuse what makes (x - y)/(ηβK) something else than the mean of what steps followed."""
        return of_plain_steps(recipe, "its control variates are") or without_steps(recipe)

    @property
    def gradient_weight(self) -> float:
        """Return β."""
        return self.beta

    def _pull(self, shared: Tensor) -> Tensor:
        return shared[0] + (1 - self.beta) / self.beta * shared[1]

    def pull(self, shared: Tensor, kept: Tensor | None) -> Tensor:
        """Return c - c_k + r·g."""
        assert kept is not None
        return self._pull(shared) - kept

    def sent(self, trained: Trained) -> list[Tensor]:
        """Return c_k⁺ - c_k = (x - y)/(ηβK) - c - r·g."""
        taken = trained.steps.to(trained.updates)[:, None] * trained.lr
        return [trained.updates / taken - self._pull(trained.shared)]

    def kept(self, trained: Trained, sent: list[Tensor]) -> Tensor:
        """Return c_k⁺, or as much of it as was sent."""
        assert trained.kept is not None
        return trained.kept + sent[0]

    def server(self, averages: list[Tensor], shared: Tensor, fraction: float) -> Tensor:
        """Return c + |S|/N · mean of c_k⁺ - c_k, and g."""
        direction = averages[0] * (self.beta / self.travel)
        return torch.stack([shared[0] + fraction * averages[1].to(shared), direction.to(shared)])
