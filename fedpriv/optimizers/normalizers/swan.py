"""SWAN (Ma et al. 2024, "SGD with normalization and whitening enables stateless LLM training").

    G̃ = (G - mean)/std, row by row (GradNorm);  Δ = (G̃G̃ᵀ)^(-1/2) G̃ (GradWhitening);
    Δ ← Δ·‖G̃‖/‖Δ‖

The inverse root is taken of singular values, of which those that are zero are left out, where the
paper has Newton-Schulz steps. A vector, which the paper leaves to Adam, is set to norm √n.
"""

from __future__ import annotations

import torch
from torch import Tensor


def swan(update: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the blocks normalised and whitened."""
    return {name: _whitened(block) for name, block in update.items()}


def _whitened(block: Tensor) -> Tensor:
    if block.dim() < 2:
        return block * (block.numel() ** 0.5 / _or_one(torch.linalg.vector_norm(block)))
    matrix = block.flatten(1).double()
    centred = matrix - matrix.mean(1, keepdim=True)
    normed = centred / _or_one(centred.square().mean(1, keepdim=True).sqrt())
    left, values, right = torch.linalg.svd(normed, full_matrices=False)
    kept = (values > values.max() * 1e-7).to(normed)
    white = (left * kept) @ right
    size = torch.linalg.vector_norm(normed) / _or_one(torch.linalg.vector_norm(white))
    return (white * size).reshape(block.shape).to(block.dtype)


def _or_one(number: Tensor) -> Tensor:
    return torch.where(number == 0, 1.0, number)
