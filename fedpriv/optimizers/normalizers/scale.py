"""SCALE (Glentis et al. 2025, "A minimalist optimizer design for LLM pretraining").

    m ← βm + (1-β)g for the last layer, m = g for all others;  each column of m over its L2 norm

The paper's matrices are [inputs, outputs], so that a column is what leads to one output: a row of a
layer's weight here, as in the authors' code, and a column of an embedding's table, whose rows are
its inputs. The code divides by root mean squares, which are √inputs times less. A vector is one
column: the code leaves it to Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor


class Scale:
    """What leads to one output has norm 1, and the last matrix alone has momentum."""

    cite = "SCALE (Glentis et al. 2025)"

    def __init__(
        self,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        tables: Sequence[str] = ("positions.*",),
    ) -> None:
        """Keep nothing yet.

        `momentum` is β; `tables` are patterns of the names of embeddings, `embed.*` of `gpt`.
        """
        self.momentum = momentum
        self.tables = list(tables)
        self.kept: dict[str, Tensor] = {}

    def __call__(self, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the blocks with columns of norm 1; a column of zeros stays as it is."""
        last = next((name for name in reversed(list(update)) if update[name].dim() > 1), None)
        blocks = dict(update)
        if last is not None:
            before = self.kept.get(last, torch.zeros_like(update[last]))
            blocks[last] = self.momentum * before + (1 - self.momentum) * update[last]
            self.kept = {last: blocks[last]}
        return {name: self._columns_of_one(name, block) for name, block in blocks.items()}

    def _columns_of_one(self, name: str, block: Tensor) -> Tensor:
        table = block.dim() == 2 and any(fnmatchcase(name, each) for each in self.tables)
        summed = [0] if table or block.dim() < 2 else list(range(1, block.dim()))
        norms = torch.linalg.vector_norm(block, dim=summed, keepdim=True)
        return block / torch.where(norms == 0, 1.0, norms)
