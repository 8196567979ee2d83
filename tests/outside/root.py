"""A normaliser from outside: each number becomes a root of its size, and each block of norm 1."""

import torch


def root(update: dict[str, torch.Tensor], power: float = 0.5) -> dict[str, torch.Tensor]:
    """Return sign(g)·|g|^power of each block, divided by its norm."""
    rooted = {name: block.sign() * block.abs() ** power for name, block in update.items()}
    return {name: block / torch.linalg.vector_norm(block) for name, block in rooted.items()}
