"""Local differential privacy: every user adds noise of full strength before anything leaves it.

Nobody is trusted (Kasiviswanathan et al. 2011). What is accounted is a user's message alone, so
neither the other users' noise nor the sampling of users makes it cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fedpriv.privacy.mechanisms import GaussianMechanism
from fedpriv.privacy.sampling import Adjacency, FullParticipation

if TYPE_CHECKING:
    import dp_accounting


@dataclass(frozen=True)
class UserNoise:
    """A user's message: its contribution of norm at most C, plus N(0, (zC)² I).

    Two users are to be told apart by their data alone: any data exchanged for any other move the
    message by up to 2C. That a user takes part is public.

    Attributes:
        mechanism: the clip bound C, and the noise on one user's contribution.
    """

    mechanism: GaussianMechanism
    adjacency = Adjacency.REPLACE_ONE

    def draw(self, sizes: Sequence[int], generator: np.random.Generator) -> Tensor:
        """Return one user's noise: float64 `[Σ sizes]`."""
        return self.mechanism.noise(sizes, generator)

    def event(self) -> dp_accounting.DpEvent:
        """Return the event of one round for a user that takes part: a Gaussian of multiplier z/2.

        It is not sampled: whoever receives the message knows that it was sent.
        """
        return message_event(self.mechanism)


def message_event(mechanism: GaussianMechanism) -> dp_accounting.DpEvent:
    """Return the event of one message of `mechanism`, for the one user who sends it."""
    return FullParticipation(1, UserNoise.adjacency).event(mechanism)
