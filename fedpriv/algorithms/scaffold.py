"""SCAFFOLD (Karimireddy et al. 2020): control variates take the users' drift out of their steps.

    user k:  y ← x;  K times:  y ← y - η (∇loss(y) - c_k + c)                        (eq. 3)
             c_k⁺ = c_k - c + (x - y)/(Kη);  send x - y and c_k⁺ - c_k               (eq. 4, II)
    server:  x ← optimizer(x, mean of x - y);  c ← c + |S|/N · mean of c_k⁺ - c_k    (eq. 5)

c_k is the user's own and never leaves it; c follows from releases. |S| is the expected cohort, and
N the population. Where a user's change of control is clipped, c_k moves by what was sent, so that
c stays the mean of all c_k, but for noise, and the rest is sent later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedpriv.algorithms.base import Algorithm, Trained

if TYPE_CHECKING:
    from fedpriv.training.local import LocalTraining


@dataclass(frozen=True)
class Scaffold(Algorithm):
    """Two payloads, the update and the change of a user's control."""

    cite = "SCAFFOLD (Karimireddy et al. 2020)"
    payloads = ("model", "control")
    shared = ("control",)
    keeps = True

    def refuses(self, recipe: LocalTraining) -> str | None:
        """Refuse what makes (x - y)/(Kη) something else than the mean of corrected gradients."""
        return of_plain_steps(recipe, "its control variates are")

    def pull(self, shared: Tensor, kept: Tensor | None) -> Tensor:
        """Return c - c_k."""
        assert kept is not None
        return shared[0] - kept

    def sent(self, trained: Trained) -> list[Tensor]:
        """Return c_k⁺ - c_k = (x - y)/(Kη) - c."""
        taken = trained.steps.to(trained.updates)[:, None] * trained.lr
        return [trained.updates / taken - trained.shared[0]]

    def kept(self, trained: Trained, sent: list[Tensor]) -> Tensor:
        """Return c_k⁺, or as much of it as was sent."""
        assert trained.kept is not None
        return trained.kept + sent[0]

    def server(self, averages: list[Tensor], shared: Tensor, fraction: float) -> Tensor:
        """Return c + |S|/N · mean of c_k⁺ - c_k."""
        return torch.stack([shared[0] + fraction * averages[1].to(shared)])


def of_plain_steps(recipe: LocalTraining, what: str, layers: bool = False) -> str | None:
    """Refuse what makes an update something else than η times the sum of what its steps followed.

    `layers` may have learning rates of their own where the algorithm divides by no rate.
    """
    refused = {
        "momentum": recipe.momentum,
        "max_grad_norm": recipe.max_grad_norm,
        "proximal_mu": recipe.proximal_mu,
        "schedule": recipe.schedule.kind != "constant",
        "multipliers": recipe.multipliers and not layers,
        "optimizer": not recipe.plain,
    }
    for key, found in refused.items():
        if found:
            return f"local.{key}: {what} those of plain SGD steps of one rate"
    return None
