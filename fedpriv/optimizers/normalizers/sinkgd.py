"""SinkGD (Scetbon et al. 2025, "Gradient multi-normalization for ... LLM training").

    L times:  each row of X [m, n] to norm √n;  each column of X to norm √m

A vector is a matrix of one row; more than two dimensions are flattened behind the first.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor


def sinkgd(
    update: dict[str, Tensor], iterations: Annotated[int, Field(ge=1, le=1000)] = 5
) -> dict[str, Tensor]:
    """Return the blocks with rows and columns of one size each; `iterations` is L."""
    return {name: _balanced(block, iterations) for name, block in update.items()}


def _balanced(block: Tensor, iterations: int) -> Tensor:
    matrix = block.reshape(1, -1) if block.dim() < 2 else block.flatten(1)
    for _ in range(iterations):
        for dim in (1, 0):
            norms = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)
            matrix = matrix * (matrix.shape[dim] ** 0.5 / torch.where(norms == 0, 1.0, norms))
    return matrix.reshape(block.shape)
