"""How far users moved from where all of them started, without their updates being written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpriv.compilation import is_compiled_for
from fedpriv.privacy.row_sums import add_weighted_moves, move_squares


@dataclass(frozen=True)
class Moves:
    """The updates start minus end of U users, each number rounded once to the dtype of both.

    Attributes:
        start: `[P]`, where all of them started, block after block.
        ends: `[U·P]`, where they ended: for each block its U rows, end to end.
        sizes: numbers of each block, H of them.
    """

    start: Tensor
    ends: Tensor
    sizes: Sequence[int]

    @property
    def users(self) -> int:
        """U."""
        return self.ends.numel() // self.start.numel()

    @property
    def compiled(self) -> bool:
        """Whether `norms` and `add_weighted` may be asked for."""
        return is_compiled_for(self.start, self.ends)

    def written_out(self) -> list[Tensor]:
        """Return the updates of each block: `[U, d_h]`."""
        ends = self.ends.split([self.users * size for size in self.sizes])
        pairs = zip(self.start.split(list(self.sizes)), ends, strict=True)
        return [start - end.view(self.users, -1) for start, end in pairs]

    def norms(self) -> Tensor:
        """Return the L2 norm of each user's blocks, taken in float64: `[U, H]`."""
        squares = torch.empty(self.users, len(self.sizes), dtype=torch.float64)
        move_squares(
            self.start.detach().numpy(),
            self.ends.detach().numpy(),
            np.array(self.sizes),
            squares.numpy(),
        )
        return squares.sqrt_()

    def add_weighted(self, weights: Tensor, total: Tensor) -> None:
        """Add Σ_u w_uh·update_uh to each block h of `total` `[P]`; both are float64."""
        arrays = self.start.detach().numpy(), self.ends.detach().numpy(), np.array(self.sizes)
        add_weighted_moves(*arrays, weights.contiguous().numpy(), total.numpy())
