"""A clipping rule from outside: g · C/(‖g‖ + γ), smooth where the usual rule has a corner."""

import torch


class SoftClipping:
    """After automatic clipping (Bu et al. 2023); γ is a share of the bound."""

    def __init__(self, bound: float, softness: float = 0.5) -> None:
        self.bound, self.gamma = bound, softness * bound

    def scales(self, norms: torch.Tensor) -> torch.Tensor:
        """Return one factor for all blocks."""
        return (self.bound / (torch.linalg.vector_norm(norms) + self.gamma)).expand_as(norms)
