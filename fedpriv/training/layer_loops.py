"""Layers of float32 numbers on a CPU, forward and backward, each in one pass over memory.

Libraries take several passes for a norm with its scale, and for GELU and its derivative; and they
are slow at products of many tiny matrices, as in attention over few tokens: for each they set up
what pays for large ones only, and want every head's numbers moved together first. Here heads are
read where they lie.

Arrays of attention are `[n, T, heads, d]` of n sequences, T being a multiple of `TILE`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedpriv.compilation import compiled

Array = NDArray[np.float32]

#: Rows and columns of attention that are worked on at once, so that each number read is used as
#: often.
TILE = 4

# Numbers that temporaries are kept of: they stay in the fastest cache.
_AT_ONCE = 2**11

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_SMALLEST = np.float32(-87)
_PER_LN2 = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(355 / 512)  # few enough digits that its multiples are exact
_LN2_LOW = np.float32(math.log(2) - 355 / 512)
_A = np.float32(0.3275911 / math.sqrt(2))
_A1, _A2, _A3 = np.float32(0.254829592), np.float32(-0.284496736), np.float32(1.421413741)
_A4, _A5 = np.float32(-1.453152027), np.float32(1.061405429)
_DENSITY = np.float32(1 / math.sqrt(2 * math.pi))


@compiled
def normalize(
    x: Array, weight: Array, bias: Array, eps: float, out: Array, normed: Array, inverse: Array
) -> None:
    """Write LayerNorm of many users to `out`: `[U, n, d]`, with weight and bias `[U, d]`.

    For the backward pass, `normed` gets the rows before weight and bias, and `inverse` `[U, n]`
    what they were multiplied by.
    """
    users, rows, size = x.shape
    for user in range(users):
        scale, shift = weight[user], bias[user]
        for row in range(rows):
            numbers, unit, result = x[user, row], normed[user, row], out[user, row]
            total = _ZERO
            for i in range(size):
                total += numbers[i]
            mean = total / np.float32(size)
            squares = _ZERO
            for i in range(size):
                squares += (numbers[i] - mean) * (numbers[i] - mean)
            factor = _ONE / np.sqrt(squares / np.float32(size) + np.float32(eps))
            inverse[user, row] = factor
            for i in range(size):
                unit[i] = (numbers[i] - mean) * factor
                result[i] = unit[i] * scale[i] + shift[i]


@compiled
def normalize_back(
    gradient: Array,
    normed: Array,
    inverse: Array,
    weight: Array,
    of_x: Array,
    of_weight: Array,
    of_bias: Array,
) -> None:
    """Write the gradients of `normalize` from that of its output `[U, n, d]`."""
    users, rows, size = normed.shape
    for user in range(users):
        scale, of_scale, of_shift = weight[user], of_weight[user], of_bias[user]
        of_scale[:] = _ZERO
        of_shift[:] = _ZERO
        for row in range(rows):
            outer, unit, result = gradient[user, row], normed[user, row], of_x[user, row]
            total = along = _ZERO
            for i in range(size):
                of_shift[i] += outer[i]
                of_scale[i] += outer[i] * unit[i]
                inner = outer[i] * scale[i]
                total += inner
                along += inner * unit[i]
            total /= np.float32(size)
            along /= np.float32(size)
            factor = inverse[user, row]
            for i in range(size):
                result[i] = (outer[i] * scale[i] - total - unit[i] * along) * factor


@compiled
def _exponentials(numbers: Array, exponents: NDArray[np.int32]) -> None:
    """Replace each y <= 0 by e^y; `exponents` is room for as many numbers.

    e^y = 2^k·e^r with |r| <= ln(2)/2, where a Taylor polynomial is within 5e-9 of it. What float32
    has no normal number for becomes 0, NaN stays NaN.
    """
    powers = exponents.view(np.float32)
    for i in range(len(numbers)):
        vanishes = numbers[i] < _SMALLEST
        y = numbers[i] if numbers[i] >= _SMALLEST else _SMALLEST  # a number also for NaN
        k = np.floor(y * _PER_LN2 + _HALF)
        r = (y - k * _LN2_HIGH) - k * _LN2_LOW
        series = _ONE / np.float32(5040)
        series = series * r + _ONE / np.float32(720)
        series = series * r + _ONE / np.float32(120)
        series = series * r + _ONE / np.float32(24)
        series = series * r + _ONE / np.float32(6)
        series = series * r + _HALF
        series = series * r + _ONE
        power = series * r + _ONE
        numbers[i] = _ZERO if vanishes else power + (numbers[i] - y)  # 0, or NaN
        exponents[i] = (np.int32(k) + np.int32(127)) << np.int32(23)
    for i in range(len(numbers)):
        numbers[i] *= powers[i]


@compiled
def gelu(x: Array, out: Array, slope: Array) -> None:
    """Write GELU(x) = x·Φ(x) to `out` and its derivative Φ(x) + x·φ(x) to `slope`, all `[n]`.

    One e^(-x²/2) serves both. Φ by formula 7.1.26 of Abramowitz and Stegun (1964), whose error of
    1.5e-7 is of the size of float32's own near one.
    """
    exponents = np.empty(_AT_ONCE, np.int32)
    bells = np.empty(_AT_ONCE, np.float32)
    for low in range(0, len(x), _AT_ONCE):
        high = min(low + _AT_ONCE, len(x))
        numbers, result, derivative = x[low:high], out[low:high], slope[low:high]
        for i in range(len(numbers)):
            bells[i] = -_HALF * numbers[i] * numbers[i]
        _exponentials(bells[: high - low], exponents[: high - low])
        for i in range(len(numbers)):
            number = numbers[i]
            t = _ONE / (_ONE + _A * abs(number))
            tail = _HALF * bells[i] * t * (_A1 + t * (_A2 + t * (_A3 + t * (_A4 + t * _A5))))
            below = tail if number < _ZERO else _ONE - tail
            result[i] = number * below
            derivative[i] = below + number * bells[i] * _DENSITY


@compiled
def attend(q: Array, k: Array, v: Array, out: Array, shares: Array) -> None:
    """Write shares = softmax(q·kᵀ/√d) of each head, and out = shares·v."""
    scale = np.float32(1 / math.sqrt(q.shape[3]))
    exponents = np.empty(q.shape[1] ** 2, np.int32)
    for number in range(q.shape[0]):
        for head in range(q.shape[2]):
            share = shares[number, head]
            _dots(q, k, number, head, scale, share)
            _softmax(share, exponents)
            _mix(share, v, number, head, out)


@compiled
def attend_back(
    gradient: Array,
    q: Array,
    k: Array,
    v: Array,
    shares: Array,
    of_q: Array,
    of_k: Array,
    of_v: Array,
) -> None:
    """Write the gradients of `attend` from that of its output."""
    scale = np.float32(1 / math.sqrt(q.shape[3]))
    of_scores, turned = (
        np.empty(shares.shape[2:], np.float32),
        np.empty(shares.shape[2:], np.float32),
    )
    for number in range(q.shape[0]):
        for head in range(q.shape[2]):
            share = shares[number, head]
            _turn(share, turned)
            _mix(turned, gradient, number, head, of_v)
            _dots(gradient, v, number, head, scale, of_scores)
            _softmax_back(share, of_scores)
            _mix(of_scores, k, number, head, of_q)
            _turn(of_scores, turned)
            _mix(turned, q, number, head, of_k)


@compiled
def _dots(left: Array, right: Array, number: int, head: int, scale: float, out: Array) -> None:
    """Write scale·left·rightᵀ of one head to `out` `[T, T]`.

    Of a tile, a to d are the rows of `left`, e to h those of `right`, and ae to dh their products.
    """
    tokens, size = left.shape[1], left.shape[3]
    for tile in range(tokens // TILE):
        i = TILE * tile
        a, b = left[number, i, head], left[number, i + 1, head]
        c, d = left[number, i + 2, head], left[number, i + 3, head]
        for other in range(tokens // TILE):
            j = TILE * other
            e, f = right[number, j, head], right[number, j + 1, head]
            g, h = right[number, j + 2, head], right[number, j + 3, head]
            ae = af = ag = ah = be = bf = bg = bh = _ZERO
            ce = cf = cg = ch = de = df = dg = dh = _ZERO
            for n in range(size):
                ae, af, ag, ah = (
                    ae + a[n] * e[n],
                    af + a[n] * f[n],
                    ag + a[n] * g[n],
                    ah + a[n] * h[n],
                )
                be, bf, bg, bh = (
                    be + b[n] * e[n],
                    bf + b[n] * f[n],
                    bg + b[n] * g[n],
                    bh + b[n] * h[n],
                )
                ce, cf, cg, ch = (
                    ce + c[n] * e[n],
                    cf + c[n] * f[n],
                    cg + c[n] * g[n],
                    ch + c[n] * h[n],
                )
                de, df, dg, dh = (
                    de + d[n] * e[n],
                    df + d[n] * f[n],
                    dg + d[n] * g[n],
                    dh + d[n] * h[n],
                )
            out[i, j], out[i, j + 1], out[i, j + 2], out[i, j + 3] = ae, af, ag, ah
            out[i + 1, j], out[i + 1, j + 1], out[i + 1, j + 2], out[i + 1, j + 3] = be, bf, bg, bh
            out[i + 2, j], out[i + 2, j + 1], out[i + 2, j + 2], out[i + 2, j + 3] = ce, cf, cg, ch
            out[i + 3, j], out[i + 3, j + 1], out[i + 3, j + 2], out[i + 3, j + 3] = de, df, dg, dh
    for i in range(tokens):
        row = out[i]
        for j in range(tokens):
            row[j] *= scale


@compiled
def _mix(weights: Array, rows: Array, number: int, head: int, out: Array) -> None:
    """Write weights·rows of one head, `weights` being `[T, T]`, to that head of `out`.

    Of a tile, a to d are the rows of `out`, e to h those of `rows`, and ae to dh the weights.
    """
    tokens, size = rows.shape[1], rows.shape[3]
    for tile in range(tokens // TILE):
        i = TILE * tile
        a, b = out[number, i, head], out[number, i + 1, head]
        c, d = out[number, i + 2, head], out[number, i + 3, head]
        for n in range(size):
            a[n] = b[n] = c[n] = d[n] = _ZERO
        for other in range(tokens // TILE):
            j = TILE * other
            e, f = rows[number, j, head], rows[number, j + 1, head]
            g, h = rows[number, j + 2, head], rows[number, j + 3, head]
            ae, af, ag, ah = weights[i, j], weights[i, j + 1], weights[i, j + 2], weights[i, j + 3]
            i1, i2, i3 = weights[i + 1], weights[i + 2], weights[i + 3]
            be, bf, bg, bh = i1[j], i1[j + 1], i1[j + 2], i1[j + 3]
            ce, cf, cg, ch = i2[j], i2[j + 1], i2[j + 2], i2[j + 3]
            de, df, dg, dh = i3[j], i3[j + 1], i3[j + 2], i3[j + 3]
            for n in range(size):
                a[n] += (ae * e[n] + af * f[n]) + (ag * g[n] + ah * h[n])
                b[n] += (be * e[n] + bf * f[n]) + (bg * g[n] + bh * h[n])
                c[n] += (ce * e[n] + cf * f[n]) + (cg * g[n] + ch * h[n])
                d[n] += (de * e[n] + df * f[n]) + (dg * g[n] + dh * h[n])


@compiled
def _softmax(scores: Array, exponents: NDArray[np.int32]) -> None:
    """Replace the rows of `[T, T]` by their softmax; `exponents` is room for `[T·T]`."""
    for i in range(len(scores)):
        row = scores[i]
        largest = row[0]
        for j in range(len(row)):
            largest = max(largest, row[j])
        for j in range(len(row)):
            row[j] -= largest
    _exponentials(scores.reshape(scores.size), exponents)
    for i in range(len(scores)):
        row = scores[i]
        total = _ZERO
        for j in range(len(row)):
            total += row[j]
        for j in range(len(row)):
            row[j] /= total


@compiled
def _softmax_back(shares: Array, gradient: Array) -> None:
    """Replace the gradient at softmax's output, `[T, T]`, by that at its input."""
    for i in range(len(shares)):
        share, row = shares[i], gradient[i]
        along = _ZERO
        for j in range(len(row)):
            along += row[j] * share[j]
        for j in range(len(row)):
            row[j] = (row[j] - along) * share[j]


@compiled
def _turn(matrix: Array, out: Array) -> None:
    """Write the transpose of `[T, T]` to `out`."""
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            out[j, i] = matrix[i, j]
