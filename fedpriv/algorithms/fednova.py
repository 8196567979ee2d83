"""FedNova (Wang et al. 2020, "Tackling the objective inconsistency problem ...").

    user k:  y ← x;  τ_k times:  y ← y - η∇loss(y);  send τ_eff · (x - y)/τ_k
    server:  as FedAvg

With plain steps the paper's ‖a_k‖₁ is τ_k. Users have one weight each, as privacy has it, and
τ_eff is a number in the config, for the mean of τ_k would follow from users' data. Each user
divides by its own count before its update is bounded, so that the count never leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor

from fedpriv.algorithms.base import Algorithm, Trained
from fedpriv.algorithms.scaffold import of_plain_steps

if TYPE_CHECKING:
    from fedpriv.training.local import LocalTraining


@dataclass(frozen=True)
class FedNova(Algorithm):
    """Updates over the number of steps that they took, so that nobody counts for taking more.

    Attributes:
        effective_steps: τ_eff, of how many steps an update is to be: public.
    """

    effective_steps: Annotated[float, Field(gt=0)]
    cite = "FedNova (Wang et al. 2020)"
    sends_as_is = False

    def refuses(self, recipe: LocalTraining) -> str | None:
        """Refuse what makes ‖a_k‖₁ something else than the number of steps."""
        return of_plain_steps(recipe, "its normalisation is", layers=True)

    def update(self, trained: Trained) -> Tensor:
        """Return τ_eff · (x - y)/τ_k."""
        factors = self.effective_steps / trained.steps.to(trained.updates)
        return trained.updates * factors[:, None]
