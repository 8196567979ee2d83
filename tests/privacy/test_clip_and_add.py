import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.privacy import SPLITS, ClippingRule, GlobalClipping, PerLayerClipping, Unclipped, clip
from fedpriv.privacy.clipping import clip_and_add, clip_and_sum

NUMBERS = st.one_of(
    st.floats(width=32),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, 1e-45, 1e-38, 3e38, -3e38, math.inf, -math.inf, math.nan]),
)
# What float64 holds beyond float32: norms that overflow and squares that vanish.
WIDE = st.one_of(NUMBERS, st.floats(), st.sampled_from([1e150, 1e160, 1.7e308, 1e-160, 5e-324]))
BOUNDS = st.floats(1e-6, 1e6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@st.composite
def stacks(draw, finite: bool = False) -> tuple[torch.Tensor, list[int]]:
    """Updates `[users, numbers]` and the sizes of their blocks."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    dtype, users = draw(DTYPES), draw(st.integers(1, 5))
    numbers = WIDE if dtype == torch.float64 else NUMBERS
    if finite:
        numbers = st.floats(-(2.0**99), 2.0**99, width=32)
    row = st.lists(numbers, min_size=sum(sizes), max_size=sum(sizes))
    rows = draw(st.lists(row, min_size=users, max_size=users))
    return torch.tensor(rows, dtype=torch.float64).to(dtype), sizes


def rules(bound: float, sizes: list[int]) -> list[ClippingRule]:
    per_layer = [
        PerLayerClipping(bound, split(bound, sizes), normalize)
        for split in SPLITS.values()
        for normalize in (False, True)
    ]
    return [GlobalClipping(bound), *per_layer]


def square(numbers: torch.Tensor) -> Fraction:
    """The squared norm, without any rounding."""
    return sum((Fraction(x) ** 2 for x in numbers.tolist()), Fraction(0))


def alone(update: torch.Tensor, sizes: list[int], rule: ClippingRule) -> torch.Tensor:
    """What `clip` makes of one row: float32, as one vector."""
    blocks = {str(i): block for i, block in enumerate(update.split(sizes))}
    return torch.cat(list(clip(blocks, rule).blocks.values()))


@settings(max_examples=300, deadline=None)
@given(stacks(), BOUNDS)
def test_no_rule_ever_lets_a_row_exceed_the_bound(stack, bound):
    updates, sizes = stack
    for rule in rules(bound, sizes):
        for row in updates:
            contribution = clip_and_sum(row[None], sizes, rule).total
            assert contribution.dtype == torch.float64
            assert torch.isfinite(contribution).all()
            assert square(contribution) <= Fraction(bound) ** 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(1e-3, 1e3), st.integers(0, 2**31), DTYPES)
def test_large_random_rows_stay_below_the_bound(blocks, bound, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    sizes = [1 + 37 * i for i in range(blocks)]
    scale = torch.cat([torch.full((n,), 10.0 ** (i % 7)) for i, n in enumerate(sizes)])
    update = (torch.randn(1, sum(sizes), generator=generator) * scale).to(dtype)
    for rule in rules(bound, sizes):
        found = clip_and_sum(update, sizes, rule)
        squares = (x**2 for x in found.total.tolist())
        assert math.sqrt(math.fsum(squares)) <= bound * (1 - 1e-8)


@settings(max_examples=200, deadline=None)
@given(stacks(), BOUNDS)
def test_the_sum_is_that_of_the_rows_alone(stack, bound):
    updates, sizes = stack
    for rule in [*rules(bound, sizes), Unclipped()]:
        together = clip_and_sum(updates, sizes, rule)
        rows = [clip_and_sum(row[None], sizes, rule) for row in updates]
        size = sum(row.total.abs() for row in rows)
        error = (together.total - sum(row.total for row in rows)).abs()
        assert (error <= 1e-12 * size).all() or not torch.isfinite(size).all()
        assert torch.equal(together.finite, torch.cat([row.finite for row in rows]))
        torch.testing.assert_close(together.scales, torch.cat([row.scales for row in rows]))


@settings(max_examples=200, deadline=None)
@given(stacks(), BOUNDS)
def test_a_row_is_bounded_as_clip_bounds_it(stack, bound):
    updates, sizes = stack
    for rule in rules(bound, sizes):
        expected = torch.stack([alone(row, sizes, rule) for row in updates]).double()
        found = clip_and_sum(updates, sizes, rule)
        # clip answers in float32, which has nothing below 1e-45 and few digits below 1e-38.
        error = (found.total - expected.sum(0)).abs()
        assert (error <= 1e-6 * expected.abs().sum(0) + 1e-44 * len(updates)).all()
        for row, finite, norms, scales in zip(
            updates, found.finite, found.norms, found.scales, strict=True
        ):
            blocks = {str(i): block for i, block in enumerate(row.split(sizes))}
            one = clip(blocks, rule)
            assert bool(finite) == one.finite
            torch.testing.assert_close(norms, one.norms, rtol=1e-12, atol=0, equal_nan=True)
            torch.testing.assert_close(scales, one.scales, rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(stacks(finite=True))
def test_unclipped_rows_are_added_as_they_are(stack):
    updates, sizes = stack
    found = clip_and_sum(updates, sizes, Unclipped())
    assert found.finite.all()
    assert (found.scales == 1).all()
    expected = [math.fsum(column) for column in updates.double().T.tolist()]
    error = (found.total - torch.tensor(expected, dtype=torch.float64)).abs()
    assert (error <= 1e-14 * updates.double().abs().sum(0)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_that_are_not_finite_contribute_zero_and_are_told_apart(bad, dtype):
    torch.manual_seed(0)
    updates, sizes = torch.randn(5, 7).to(dtype), [3, 4]
    updates[1, 0] = updates[3, 6] = bad
    others = updates[[0, 2, 4]]
    norms = [block.double().norm(dim=1) for block in others.split(sizes, dim=1)]
    for rule in [*rules(0.5, sizes), Unclipped()]:
        found = clip_and_sum(updates, sizes, rule)
        assert found.finite.tolist() == [True, False, True, False, True]
        torch.testing.assert_close(found.total, clip_and_sum(others, sizes, rule).total)
        assert not found.scales[~found.finite].any()
        assert found.norms.shape == found.scales.shape == (5, 2)
        torch.testing.assert_close(found.norms[found.finite], torch.stack(norms, 1))


def test_a_norm_beyond_float64_contributes_zero():
    updates = torch.tensor([[1e200, 1e200], [3.0, 4.0]], dtype=torch.float64)
    for rule in rules(1.0, [1, 1]):
        found = clip_and_sum(updates, [1, 1], rule)
        assert found.finite.tolist() == [False, True]
        assert float(found.total.norm()) == pytest.approx(1.0, rel=1e-5)


def test_numbers_are_scaled_by_hand():
    updates = torch.tensor([[3.0, 0.0, 4.0], [0.3, 0.0, 0.4], [0.0, 0.0, 0.0]])
    found = clip_and_sum(updates, [2, 1], GlobalClipping(1.0))
    assert found.total.tolist() == pytest.approx([0.9, 0.0, 1.2], rel=2e-6)
    assert (found.scales < 1).any(dim=1).tolist() == [True, False, False]
    rule = PerLayerClipping(math.sqrt(2), (1.0, 1.0))
    found = clip_and_sum(updates, [2, 1], rule)
    assert found.total.tolist() == pytest.approx([1.3, 0.0, 1.4], rel=2e-6)
    assert (found.scales < 1).sum(0).tolist() == [1, 1]
    exactly = PerLayerClipping(math.sqrt(2), (1.0, 1.0), normalize=True)
    assert clip_and_sum(updates, [2, 1], exactly).total.tolist() == found.total.tolist()
    lopsided = clip_and_sum(torch.tensor([[30.0, 40.0, 0.01]]), [2, 1], exactly)
    assert lopsided.total.tolist() == pytest.approx([0.6, 0.8, 1.0], rel=2e-6)


def test_no_rows_add_up_to_zero():
    found = clip_and_sum(torch.empty(0, 5), [2, 3], GlobalClipping(1.0))
    assert found.total.tolist() == [0.0] * 5
    assert found.finite.shape == (0,)
    assert found.norms.shape == (0, 2)


def test_the_updates_are_left_as_they_are():
    updates = torch.tensor([[3.0, math.nan], [3.0, 4.0]])
    before = updates.clone()
    clip_and_sum(updates, [1, 1], GlobalClipping(1.0))
    torch.testing.assert_close(updates, before, rtol=0, atol=0, equal_nan=True)


def test_blocks_wider_than_what_is_worked_on_at_once_are_summed_whole():
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn(3, 100_003, generator=generator)
    found = clip_and_sum(updates, [100_000, 3], Unclipped())
    torch.testing.assert_close(found.total, updates.double().sum(0), rtol=1e-14, atol=1e-14)
    norms = [block.double().norm(dim=1) for block in updates.split([100_000, 3], dim=1)]
    torch.testing.assert_close(found.norms, torch.stack(norms, 1), rtol=1e-13, atol=0)


def test_sums_are_added_to_what_is_there():
    total = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    clip_and_add([torch.ones(2, 2), torch.ones(2, 1)], Unclipped(), total)
    assert total.tolist() == [12.0, 22.0, 32.0]


@settings(max_examples=200, deadline=None)
@given(stacks(), BOUNDS)
def test_counts_say_who_was_within_and_one_row_moves_each_by_a_half(stack, bound):
    updates, sizes = stack
    for rule in rules(bound, sizes):
        seen = clip_and_sum(updates, sizes, rule)
        whole, blocks = seen.within(1), seen.within(len(sizes))
        for counts, number in ((whole, 1), (blocks, len(sizes))):
            without = clip_and_sum(updates[1:], sizes, rule).within(number)
            moved = (counts - without).abs()
            assert moved.tolist() == [0.5 if bool(seen.finite[0]) else 0.0] * number


def test_counts_are_those_of_norms_within_their_bounds():
    updates = torch.tensor([[3.0, 4.0, 0.0], [0.0, 6.0, 1.0], [0.0, 0.0, 9.0], [math.nan, 0, 0]])
    whole = clip_and_sum(updates, [2, 1], GlobalClipping(5.5))
    assert whole.within(1).tolist() == [1 / 2 - 2 / 2]
    blocks = clip_and_sum(updates, [2, 1], PerLayerClipping(math.hypot(5.5, 8.0), (5.5, 8.0)))
    assert blocks.within(2).tolist() == [2 / 2 - 1 / 2, 2 / 2 - 1 / 2]
