"""Norms and weighted sums of many users' rows, in float64.

Rows are worked on in pieces, so that neither their float64 copy nor the difference from where all
users started is ever written out whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers that are worked on at once: on a CPU those whose float64 copy a core's cache holds, on a
# GPU as many as hide that each operation has to be asked for.
_CACHED_NUMBERS, _NUMBERS_ON_A_GPU = 2**16, 2**25


def row_norms(rows: Tensor, start: Tensor | None = None) -> Tensor:
    """Return the L2 norm of each row of `[U, d]`, or of `start` `[d]` minus the row: `[U]`.

    Differences are rounded once, to the dtype of both; norms are float64.
    """
    norms = [
        torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64)
        for _, piece in _pieces(rows, start)
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def add_rows(
    rows: Tensor, weights: Tensor, finite: Tensor, total: Tensor, start: Tensor | None = None
) -> None:
    """Add each row of `[U, d]`, or `start` minus the row, times its weight, to `total` `[d]`.

    `weights` `[U]` and `total` are float64; what rows hold that are not `finite` (boolean `[U]`) is
    not looked at: zero times NaN would be NaN.
    """
    all_finite = finite.is_cpu and bool(finite.all())  # a GPU's answer would be waited for
    for columns, piece in _pieces(rows, start):
        whole = piece if all_finite else piece.masked_fill(~finite[:, None], 0.0)
        total[columns].addmv_(whole.double().T, weights)


def _pieces(rows: Tensor, start: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield some columns at a time, of the rows or of `start` minus the rows."""
    numbers = _CACHED_NUMBERS if rows.is_cpu else _NUMBERS_ON_A_GPU
    width = max(1, numbers // max(1, len(rows)))
    for low in range(0, max(1, rows.shape[1]), width):
        columns = slice(low, low + width)
        piece = rows if width >= rows.shape[1] else rows[:, columns]
        yield columns, piece if start is None else start[columns] - piece
