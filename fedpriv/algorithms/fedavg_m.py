"""FedAvg-M (Cheng et al. 2024, "Momentum benefits non-iid federated learning simply and provably").

    user:    y ← x;  K times:  y ← y - η (β∇loss(y) + (1-β)g);  send x - y
    server:  g ← mean of (x - y)/(ηK);  x ← x - γg, here x ← optimizer(x, mean of x - y)

g, the global direction, is a function of what was released, and costs nothing. A step is taken as
y ← y - ηβ (∇loss(y) + (1-β)/β · g), which is the same; γ is the server's learning rate over ηK.
Step and direction are those of FedCM (Xu et al. 2021, "FedCM: federated learning with client-level
momentum") with α = β.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor

from fedpriv.algorithms.base import Algorithm
from fedpriv.algorithms.scaffold import of_plain_steps

if TYPE_CHECKING:
    from fedpriv.training.local import LocalTraining

#: β, the weight of a user's own gradients; 1 is FedAvg.
Beta = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class FedAvgM(Algorithm):
    """Local steps that follow a user's own gradient and the direction of all.

    Attributes:
        beta: β, the weight of a user's own gradients.
    """

    beta: Beta = 0.1
    cite = "FedAvg-M (Cheng et al. 2024)"
    shared = ("direction",)

    def refuses(self, recipe: LocalTraining) -> str | None:
        """Refuse what makes mean (x - y)/(ηK) something else than a mean of what steps followed."""
        return of_plain_steps(recipe, "its direction is") or without_steps(recipe)

    @property
    def gradient_weight(self) -> float:
        """Return β."""
        return self.beta

    def pull(self, shared: Tensor, kept: Tensor | None) -> Tensor:
        """Return (1-β)/β · g."""
        return (1 - self.beta) / self.beta * shared[0]

    def server(self, averages: list[Tensor], shared: Tensor, fraction: float) -> Tensor:
        """Return g: the mean of x - y over ηK; users travel ηβK."""
        return (averages[0] * (self.beta / self.travel)).to(shared)[None]


def without_steps(recipe: LocalTraining) -> str | None:
    """Say that K must be public."""
    if recipe.steps is not None:
        return None
    return (
        "local.steps: null: the server divides by the number of local steps, which must be one for "
        "all: write local.steps"
    )
