"""FedSpeed (Sun et al. 2023, "FedSpeed: larger local interval, less communication round, ...").

    user k:  y ← x;  K times:  g₁ = ∇loss(y);  g₂ = ∇loss(y + ρg₁)
             y ← y - η ((1-α)g₁ + αg₂ - ĝ_k + (y - x)/λ)
             ĝ_k ← ĝ_k - (y - x)/λ;  send x - (y - λĝ_k)
    server:  as FedAvg

`unit_ascent` looks ρ far whatever the length of g₁, ρg₁/‖g₁‖, as the authors' code does, which also
has α = 1. Their server adds the mean of what all users have kept, those of other rounds among them;
here, as above, each user sends its own with its update.

The prox-correction ĝ_k is the user's own and never leaves it; the perturbation, α > 0, needs a
second gradient in each step, so that users are trained one after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedpriv.algorithms.base import Algorithm, Trained


@dataclass(frozen=True)
class FedSpeed(Algorithm):
    """Local steps that are held back to where they started, and corrected for being held back.

    Attributes:
        penalty: λ; 1/λ is the weight of the proximal term.
        ascent: ρ, how far uphill the second gradient is taken.
        unit_ascent: whether that is a distance, and no multiple of the first gradient.
        alpha: α, the weight of the second gradient; 0 for none.
    """

    penalty: Annotated[float, Field(gt=0)] = 10.0
    ascent: Annotated[float, Field(ge=0)] = 0.1
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    unit_ascent: bool = False
    cite = "FedSpeed (Sun et al. 2023)"
    keeps = True
    sends_as_is = False

    @property
    def proximal_mu(self) -> float:
        """Return 1/λ."""
        return 1 / self.penalty

    @property
    def perturbation(self) -> tuple[float, float, bool]:
        """Return ρ and α, and whether ρ is a distance."""
        return self.ascent, self.alpha, self.unit_ascent

    def pull(self, shared: Tensor, kept: Tensor | None) -> Tensor:
        """Return -ĝ_k."""
        assert kept is not None
        return -kept

    def update(self, trained: Trained) -> Tensor:
        """Return x - (y - λĝ_k), with ĝ_k as it is after the steps."""
        return trained.updates + self.penalty * self.kept(trained, [])

    def kept(self, trained: Trained, sent: list[Tensor]) -> Tensor:
        """Return ĝ_k + (x - y)/λ."""
        assert trained.kept is not None
        return trained.kept + trained.updates / self.penalty
