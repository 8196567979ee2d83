"""ROOT (He et al. 2025, "ROOT: robust orthogonalized optimizer for neural network training").

    m ← μm + g;  g ← g + μm;  outliers: what is beyond the 0.9 quantile of |g| is cut off
    X ← g/‖g‖;  K times:  X ← aX + b(XXᵀ)X + c(XXᵀ)²X;  Δ = 0.2 √max(rows, columns) · X

As in the authors' code: Nesterov's momentum, a threshold by quantile, K = 5, and a, b, c by the
matrix's shape, of which they have published four; other shapes have those of Muon, or your own
`coefficients`. A vector, which the code leaves to AdamW, is set to norm √n.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

Coefficients = tuple[float, float, float]

_MUON: Coefficients = (3.4445, -4.7750, 2.0315)
#: By the smaller and the larger side.
_PUBLISHED: dict[tuple[int, int], Coefficients] = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}


class Root:
    """Matrices nearly orthogonal, from momentum without its outliers."""

    cite = "ROOT (He et al. 2025)"

    def __init__(
        self,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95,
        quantile: Annotated[float, Field(gt=0, le=1)] = 0.9,
        iterations: Annotated[int, Field(ge=1, le=100)] = 5,
        coefficients: Coefficients | None = None,
    ) -> None:
        """Keep nothing yet; `coefficients` are a, b and c for every shape."""
        self.momentum, self.quantile, self.iterations = momentum, quantile, iterations
        self.coefficients = coefficients
        self.kept: dict[str, Tensor] = {}

    def __call__(self, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the blocks orthogonalised."""
        return {name: self._block(name, block) for name, block in update.items()}

    def _block(self, name: str, block: Tensor) -> Tensor:
        if block.dim() < 2:
            norm = torch.linalg.vector_norm(block)
            return block * (block.numel() ** 0.5 / torch.where(norm == 0, 1.0, norm))
        gradient = block.flatten(1).double()
        kept = self.momentum * self.kept.get(name, torch.zeros_like(gradient)) + gradient
        self.kept[name] = kept
        ahead = gradient + self.momentum * kept
        # torch.quantile takes 16 million numbers at most.
        place = max(1, round(self.quantile * ahead.numel()))
        most = ahead.abs().flatten().kthvalue(place).values
        return self._orthogonal(ahead.clamp(-most, most)).reshape(block.shape).to(block.dtype)

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        sides = (min(matrix.shape), max(matrix.shape))
        a, b, c = self.coefficients or _PUBLISHED.get(sides, _MUON)
        turned = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if turned else matrix
        norm = torch.linalg.matrix_norm(x)
        x = x / torch.where(norm == 0, 1.0, norm)
        for _ in range(self.iterations):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return (x.T if turned else x) * (0.2 * sides[1] ** 0.5)
