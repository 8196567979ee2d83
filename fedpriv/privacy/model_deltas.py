"""How far users moved from where all of them started, without their updates being written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpriv.privacy.row_sums import add_rows, row_norms


@dataclass(frozen=True)
class ModelDeltas:
    """The updates start minus end of U users, each number rounded once to the dtype of both.

    Attributes:
        start: `[P]`, where all of them started, block after block.
        ends: `[U·P]`, where they end: for each block its U rows, end to end.
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

    def norms(self) -> Tensor:
        """Return the L2 norm of each user's blocks, taken in float64: `[U, H]`."""
        return torch.stack([row_norms(rows, start) for start, rows in self._blocks()], dim=1)

    def add_weighted(self, weights: Tensor, finite: Tensor, total: Tensor) -> None:
        """Add each block of the `finite` users (boolean `[U]`), times its weight, to `total`.

        `weights` `[U, H]` and `total` `[P]` are float64.
        """
        sums = total.split(list(self.sizes))
        for (start, rows), weight, sum_ in zip(
            self._blocks(), weights.unbind(dim=1), sums, strict=True
        ):
            add_rows(rows, weight, finite, sum_, start)

    def written_out(self) -> Tensor:
        """Return the updates: `[U, P]`."""
        whole = self.ends.new_empty(self.users, len(self.start))
        parts = whole.split(list(self.sizes), dim=1)
        for part, (start, rows) in zip(parts, self._blocks(), strict=True):
            torch.sub(start, rows, out=part)
        return whole

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each block where users start, `[d_h]`, and where they end, `[U, d_h]`."""
        ends = self.ends.split([self.users * size for size in self.sizes])
        for start, end in zip(self.start.split(list(self.sizes)), ends, strict=True):
            yield start, end.view(self.users, -1)
