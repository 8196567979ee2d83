"""How far users moved from where all of them started, without their updates being written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpriv.compilation import is_compiled_for
from fedpriv.privacy.row_sums import add_weighted, square_sums


@dataclass(frozen=True)
class Moves:
    """The updates start minus end of U users, each number rounded once to the dtype of both.

    Attributes:
        start: `[P]`, where all of them started, block after block.
        ends: `[U·P]`, where they ended: for each block its U rows, end to end.
        sizes: numbers of each block, H of them.
        users: U.

    Raises:
        ValueError: the lengths of `start` and `ends` are not those.
    """

    start: Tensor
    ends: Tensor
    sizes: Sequence[int]
    users: int

    def __post_init__(self) -> None:
        numbers = sum(self.sizes)
        if self.start.shape != (numbers,) or self.ends.shape != (self.users * numbers,):
            raise ValueError(
                f"{self.users} users of {numbers} numbers have neither a start of shape "
                f"{tuple(self.start.shape)} nor ends of shape {tuple(self.ends.shape)}"
            )

    @property
    def compiled(self) -> bool:
        """Whether `norms` and `add_weighted` may be asked for."""
        return is_compiled_for(self.start, self.ends)

    def blocks(self) -> Iterator[Tensor]:
        """Write out the updates of one block after another: `[U, d_h]`."""
        ends = self.ends.split([self.users * size for size in self.sizes])
        for start, end in zip(self.start.split(list(self.sizes)), ends, strict=True):
            yield start - end.view(self.users, -1)

    def written_out(self) -> Tensor:
        """Return the updates: `[U, P]`."""
        whole = self.ends.new_empty(self.users, len(self.start))
        for part, block in zip(whole.split(list(self.sizes), dim=1), self.blocks(), strict=True):
            part.copy_(block)
        return whole

    def norms(self) -> Tensor:
        """Return the L2 norm of each user's blocks, taken in float64: `[U, H]`."""
        shape = self.users, len(self.sizes)
        squares = torch.empty(shape, dtype=torch.float64, device="cpu")
        square_sums(*self._arrays(), squares.numpy())
        return squares.sqrt_()

    def add_weighted(self, weights: Tensor, chosen: Tensor, total: Tensor) -> None:
        """Add each block of the `chosen` users (boolean `[U]`), times its weight, to `total`.

        `weights` `[U, H]` and `total` `[P]` are float64.
        """
        users = chosen.nonzero().flatten()
        arrays = (one.contiguous().numpy() for one in (weights, users))
        add_weighted(*self._arrays(), *arrays, total.numpy())

    def _arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        sizes = np.array(self.sizes, dtype=np.int64)
        return self.start.detach().numpy(), self.ends.detach().numpy(), sizes
