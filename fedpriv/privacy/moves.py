"""How far users moved from where all of them started, without their updates being written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpriv.compilation import is_compiled_for

_NOT_TAKEN = -1.0
# By how much sums of squares may differ that were taken in different orders: those of 2^31 numbers
# by 2^-21 at most, in float64. It is well within the margin that clipping leaves.
_ROUNDING = 2.0**-21


@dataclass(frozen=True)
class Moves:
    """The updates start minus end of U users, each number rounded once to the dtype of both.

    Attributes:
        start: `[P]`, where all of them started, block after block.
        ends: `[U·P]`, where they end: for each block its U rows, end to end. Rows may still be
            written until their norms are taken, and not after that.
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

    @cached_property  # it is asked for with every piece of a step
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

    def take_norms(self, block: int, low: int, high: int) -> None:
        """Take the norms of a block of users `low` to `high`, who have ended, where that pays.

        It does as long as the block is in the processor's caches. `norms` takes the others.
        """
        if self.compiled and low < high:
            # Imported here: the accountants' commands, which train nobody, need no compiler.
            from fedpriv.privacy.row_sums import square_sums

            square_sums(*self._arrays, self._squares, block, low, high)

    def norms(self) -> Tensor:
        """Return the L2 norm of each user's blocks, taken in float64: `[U, H]`."""
        for block in np.flatnonzero((self._squares == _NOT_TAKEN).any(axis=0)).tolist():
            self.take_norms(block, 0, self.users)
        return torch.from_numpy(np.sqrt(self._squares))

    def add_weighted(self, weights: Tensor, chosen: Tensor, total: Tensor) -> None:
        """Add each block of the `chosen` users (boolean `[U]`), times its weight, to `total`.

        `weights` `[U, H]` and `total` `[P]` are float64.

        Raises:
            RuntimeError: a block's norm is not the one that was taken: it was written to since.
                `total` then holds what no weight was meant for, and must not be used.
        """
        users = chosen.nonzero().flatten().numpy()
        from fedpriv.privacy.row_sums import add_weighted

        squares = np.zeros_like(self._squares)
        weights_ = weights.contiguous().numpy()
        add_weighted(*self._arrays, weights_, users, total.numpy(), squares)
        taken, added = self._squares[users], squares[users]
        if not np.all((taken == _NOT_TAKEN) | (np.abs(added - taken) <= _ROUNDING * taken)):
            raise RuntimeError("users' parameters have changed after their norms were taken")

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        sizes = np.array(self.sizes, dtype=np.int64)
        return self.start.detach().numpy(), self.ends.detach().numpy(), sizes

    @cached_property
    def _squares(self) -> NDArray[np.float64]:
        """The squared norms `[U, H]` that have been taken."""
        return np.full((self.users, len(self.sizes)), _NOT_TAKEN)
