"""Sums over the updates of many users, in float64, in one pass each and without a copy.

An update is start minus end, rounded once to float32. Arrays are as in `Moves`: `start` `[P]`, and
`ends` `[U·P]` with, for each block of `sizes`, its U rows end to end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpriv.compilation import compiled

# Numbers of a sum that are worked on at once, for all rows: they stay in the fastest cache.
_CACHED_NUMBERS = 2**12


@compiled
def square_sums(
    start: NDArray[np.float32],
    ends: NDArray[np.float32],
    sizes: NDArray[np.int64],
    sums: NDArray[np.float64],
    block: int,
    low: int,
    high: int,
) -> None:
    """Write the sums of squares of a block of users `low` to `high` to `sums` `[U, H]`."""
    first, size = np.sum(sizes[:block]), sizes[block]
    origin = start[first : first + size]
    for user in range(low, high):
        begin = len(sums) * first + user * size
        row = ends[begin : begin + size]
        total = 0.0
        for i in range(len(origin)):
            move = np.float64(origin[i] - row[i])
            total += move * move
        sums[user, block] = total


@compiled
def add_weighted(
    start: NDArray[np.float32],
    ends: NDArray[np.float32],
    sizes: NDArray[np.int64],
    weights: NDArray[np.float64],
    chosen: NDArray[np.int64],
    total: NDArray[np.float64],
    squares: NDArray[np.float64],
) -> None:
    """Add the updates of the `chosen` users, each block times its weight `[U, H]`, to `total`.

    What other users hold is not looked at: zero times NaN would be NaN. The sum of squares of each
    chosen user's blocks is added to `squares` `[U, H]` on the way, which memory leaves time for.
    """
    users, first = len(weights), 0
    fours = len(chosen) - len(chosen) % 4  # at once: a sum is read and written once for four
    for block in range(len(sizes)):
        size = sizes[block]
        rows = ends[users * first : users * (first + size)].reshape(users, size)
        for low in range(0, size, _CACHED_NUMBERS):
            high = min(low + _CACHED_NUMBERS, size)
            origin, part = start[first + low : first + high], total[first + low : first + high]
            for four in range(0, fours, 4):
                p, q, r, s = chosen[four], chosen[four + 1], chosen[four + 2], chosen[four + 3]
                a, b, c, d = (
                    weights[p, block],
                    weights[q, block],
                    weights[r, block],
                    weights[s, block],
                )
                row_a, row_b = rows[p, low:high], rows[q, low:high]
                row_c, row_d = rows[r, low:high], rows[s, low:high]
                of_a = of_b = of_c = of_d = 0.0
                for i in range(len(part)):
                    o = origin[i]
                    x, y = np.float64(o - row_a[i]), np.float64(o - row_b[i])
                    z, w = np.float64(o - row_c[i]), np.float64(o - row_d[i])
                    part[i] += (a * x + b * y) + (c * z + d * w)
                    of_a += x * x
                    of_b += y * y
                    of_c += z * z
                    of_d += w * w
                squares[p, block] += of_a
                squares[q, block] += of_b
                squares[r, block] += of_c
                squares[s, block] += of_d
            for one in range(fours, len(chosen)):
                weight, row = weights[chosen[one], block], rows[chosen[one], low:high]
                square = 0.0
                for i in range(len(part)):
                    move = np.float64(origin[i] - row[i])
                    part[i] += weight * move
                    square += move * move
                squares[chosen[one], block] += square
        first += size
