"""Compiled sums against sums without any rounding."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedpriv.compilation import is_compiled_for
from fedpriv.privacy import GlobalClipping
from fedpriv.privacy.clipping import clip_and_add
from fedpriv.privacy.row_sums import add_weighted_rows, square_sums

SHAPES = st.tuples(st.integers(0, 9), st.integers(0, 70))
# In units of the last place, for sums of up to a hundred numbers in any order.
ROUNDING = 100 * 2.0**-53


def drawn(users: int, numbers: int, seed: int) -> np.ndarray:
    """Float32 rows whose numbers are of very different sizes, some of them not normal."""
    generator = np.random.default_rng(seed)
    sizes = 10.0 ** generator.integers(-45, 38, (users, numbers))
    return (generator.standard_normal((users, numbers)) * sizes).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(0, 2**31))
def test_squares_are_added_up_in_float64(shape, seed):
    rows, found = drawn(*shape, seed), np.full(shape[0], math.nan)
    square_sums(rows, found)
    for row, squares in zip(rows.tolist(), found.tolist(), strict=True):
        expected = sum((Fraction(x) ** 2 for x in row), Fraction(0))
        assert abs(Fraction(squares) - expected) <= expected * Fraction(ROUNDING)


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(0, 2**31))
def test_weighted_rows_are_added_to_what_is_there(shape, seed):
    rows, generator = drawn(*shape, seed), np.random.default_rng(seed + 1)
    weights, before = generator.uniform(0, 2, shape[0]), generator.standard_normal(shape[1])
    found = before.copy()
    add_weighted_rows(rows, weights, found)
    for start, column, total in zip(before, rows.T, found, strict=True):
        terms = [Fraction(start)]
        terms += [Fraction(w) * Fraction(float(x)) for w, x in zip(weights, column, strict=True)]
        sizes = sum(map(abs, terms), Fraction(0))
        assert abs(Fraction(total) - sum(terms, Fraction(0))) <= sizes * Fraction(ROUNDING)


@pytest.mark.parametrize("numbers", [4_095, 4_096, 4_097, 9_000])
@pytest.mark.parametrize("users", [1, 4, 7])
def test_long_rows_are_added_up_whole(users, numbers):
    rows = np.arange(users * numbers, dtype=np.float32).reshape(users, numbers)
    weights, total, squares = np.arange(1.0, users + 1), np.ones(numbers), np.empty(users)
    add_weighted_rows(rows, weights, total)
    np.testing.assert_array_equal(total, 1 + weights @ rows.astype(np.float64))
    square_sums(rows, squares)
    np.testing.assert_allclose(squares, (rows.astype(np.float64) ** 2).sum(1), rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 16, 36])
def test_what_is_not_finite_shows_in_its_own_row_alone(bad, place):
    rows, squares = np.ones((3, 37), np.float32), np.empty(3)
    rows[1, place] = bad
    square_sums(rows, squares)
    assert np.isfinite(squares).tolist() == [True, False, True]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 99))
@example(users=2, sizes=[5], seed=0)
def test_a_contribution_is_the_same_wherever_its_numbers_lie(users, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    together = torch.randn(users, 1 + sum(sizes), generator=generator)
    strided = together.split([1, *sizes], dim=1)[1:]
    contiguous = [block.clone(memory_format=torch.contiguous_format) for block in strided]
    assert is_compiled_for(*contiguous)
    assert users == 1 or not is_compiled_for(*strided)
    totals = [torch.zeros(sum(sizes), dtype=torch.float64) for _ in range(2)]
    first, second = (
        clip_and_add(blocks, GlobalClipping(1.0), total)
        for blocks, total in zip((strided, contiguous), totals, strict=True)
    )
    torch.testing.assert_close(first.norms, second.norms, rtol=1e-13, atol=0)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=1e-13)
