"""Sums over the float32 rows of many users, in float64, in one pass each and without a copy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpriv.compilation import compiled

# Numbers of a sum that are worked on at once, for all rows: they stay in the fastest cache.
_CACHED_NUMBERS = 2**12


@compiled
def square_sums(rows: NDArray[np.float32], sums: NDArray[np.float64]) -> None:
    """Write Σ_i rows[u, i]² to `sums`: `[U]` from `[U, d]`."""
    for user in range(rows.shape[0]):
        row = rows[user]
        total = 0.0
        for i in range(len(row)):
            number = np.float64(row[i])
            total += number * number
        sums[user] = total


@compiled
def add_weighted_rows(
    rows: NDArray[np.float32], weights: NDArray[np.float64], total: NDArray[np.float64]
) -> None:
    """Add Σ_u weights[u]·rows[u] to `total`: `[d]`, from `[U, d]` and `[U]`."""
    users, numbers = rows.shape
    for low in range(0, numbers, _CACHED_NUMBERS):
        high = min(low + _CACHED_NUMBERS, numbers)
        part = total[low:high]
        fours = users - users % 4  # at once, so that a sum is read and written once for four
        for user in range(0, fours, 4):
            a, b, c, d = weights[user], weights[user + 1], weights[user + 2], weights[user + 3]
            row_a, row_b = rows[user, low:high], rows[user + 1, low:high]
            row_c, row_d = rows[user + 2, low:high], rows[user + 3, low:high]
            for i in range(len(part)):
                part[i] += (a * np.float64(row_a[i]) + b * np.float64(row_b[i])) + (
                    c * np.float64(row_c[i]) + d * np.float64(row_d[i])
                )
        for user in range(fours, users):
            weight, row = weights[user], rows[user, low:high]
            for i in range(len(part)):
                part[i] += weight * np.float64(row[i])


@compiled
def move_squares(
    start: NDArray[np.float32],
    ends: NDArray[np.float32],
    sizes: NDArray[np.int64],
    sums: NDArray[np.float64],
) -> None:
    """Write the sum of squares of start minus end to `sums` `[U, H]`: see `Moves`."""
    users, first = len(sums), 0
    for block in range(len(sizes)):
        size = sizes[block]
        origin = start[first : first + size]
        for user in range(users):
            low = users * first + user * size
            row = ends[low : low + size]
            total = 0.0
            for i in range(len(origin)):
                move = np.float64(origin[i] - row[i])
                total += move * move
            sums[user, block] = total
        first += size


@compiled
def add_weighted_moves(
    start: NDArray[np.float32],
    ends: NDArray[np.float32],
    sizes: NDArray[np.int64],
    weights: NDArray[np.float64],
    total: NDArray[np.float64],
) -> None:
    """Add Σ_u weights[u, h]·(start minus end) to each block h of `total`: see `Moves`."""
    users, first = len(weights), 0
    fours = users - users % 4
    for block in range(len(sizes)):
        size = sizes[block]
        rows = ends[users * first : users * (first + size)].reshape(users, size)
        for low in range(0, size, _CACHED_NUMBERS):
            high = min(low + _CACHED_NUMBERS, size)
            origin, part = start[first + low : first + high], total[first + low : first + high]
            for user in range(0, fours, 4):
                a, b = weights[user, block], weights[user + 1, block]
                c, d = weights[user + 2, block], weights[user + 3, block]
                row_a, row_b = rows[user, low:high], rows[user + 1, low:high]
                row_c, row_d = rows[user + 2, low:high], rows[user + 3, low:high]
                for i in range(len(part)):
                    o = origin[i]
                    part[i] += (a * np.float64(o - row_a[i]) + b * np.float64(o - row_b[i])) + (
                        c * np.float64(o - row_c[i]) + d * np.float64(o - row_d[i])
                    )
            for user in range(fours, users):
                weight, row = weights[user, block], rows[user, low:high]
                for i in range(len(part)):
                    part[i] += weight * np.float64(origin[i] - row[i])
        first += size
