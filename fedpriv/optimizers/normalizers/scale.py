"""SCALE (Glentis et al. 2025, "A minimalist optimizer design for LLM pretraining", algorithm 1).

    m ← βm + (1-β)g for the last layer, m = g for all others;  each column of m over its L2 norm

A column belongs to one input of the layer. A vector is one column: the paper leaves it to Adam.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor


class Scale:
    """Columns of norm 1, and momentum on the last matrix alone."""

    cite = "SCALE (Glentis et al. 2025)"

    def __init__(self, momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9) -> None:
        """Keep nothing yet; `momentum` is β."""
        self.momentum = momentum
        self.kept: dict[str, Tensor] = {}

    def __call__(self, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the blocks with columns of norm 1; a column of zeros stays as it is."""
        last = next((name for name in reversed(list(update)) if update[name].dim() > 1), None)
        blocks = dict(update)
        if last is not None:
            before = self.kept.get(last, torch.zeros_like(update[last]))
            blocks[last] = self.momentum * before + (1 - self.momentum) * update[last]
            self.kept = {last: blocks[last]}
        return {name: _columns_of_one(block) for name, block in blocks.items()}


def _columns_of_one(block: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(block, dim=0, keepdim=True)
    return block / torch.where(norms == 0, 1.0, norms)
