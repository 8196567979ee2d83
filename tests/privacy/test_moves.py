"""Updates that are never written out are bounded and added up as if they were."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.privacy import SPLITS, GlobalClipping, PerLayerClipping, Unclipped
from fedpriv.privacy.clipping import clip_and_add
from fedpriv.privacy.model_deltas import ModelDeltas

NUMBERS = st.one_of(
    st.floats(width=32),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, 1e-45, 1e-38, 3e38, -3e38, math.inf, math.nan]),
)


@st.composite
def moves(draw, numbers=NUMBERS) -> ModelDeltas:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    total, users = sum(sizes), draw(st.integers(1, 9))
    drawn = draw(st.lists(numbers, min_size=total * (users + 1), max_size=total * (users + 1)))
    start, ends = torch.tensor(drawn, dtype=torch.float64).float().split([total, total * users])
    return ModelDeltas(start, ends, sizes, users)


def rules(bound: float, sizes: list[int]):
    yield GlobalClipping(bound)
    for split in SPLITS.values():
        for normalize in (False, True):
            yield PerLayerClipping(bound, split(bound, sizes), normalize)


def rows_of(many: ModelDeltas) -> list[list[torch.Tensor]]:
    """Each user's blocks, taken apart and subtracted plainly."""
    rows, first = [[] for _ in range(many.users)], 0
    for size in many.sizes:
        block = many.ends[first * many.users : (first + size) * many.users]
        for user in range(many.users):
            end = block[user * size : (user + 1) * size]
            rows[user].append(many.start[first : first + size] - end)
        first += size
    return rows


@settings(max_examples=200, deadline=None)
@given(moves(), st.floats(1e-6, 1e6))
def test_they_are_bounded_and_added_up_as_if_they_were_written_out(many, bound):
    plain = [torch.stack(blocks) for blocks in zip(*rows_of(many), strict=True)]
    together = torch.cat(plain, dim=1)
    torch.testing.assert_close(many.written_out(), together, rtol=0, atol=0, equal_nan=True)
    # Of several users the rows of a part of a matrix do not lie end to end.
    strided = together.split(many.sizes, dim=1)
    for rule in rules(bound, many.sizes):
        found, *expected = torch.ones(3, len(many.start), dtype=torch.float64)
        seen = clip_and_add(many, rule, found)
        for blocks, total in zip((plain, strided), expected, strict=True):
            as_before = clip_and_add(blocks, rule, total)
            assert torch.equal(seen.finite, as_before.finite)
            torch.testing.assert_close(seen.scales, as_before.scales, rtol=1e-13, atol=0)
            torch.testing.assert_close(found, total, rtol=1e-12, atol=1e-12 * bound)
        assert torch.isfinite(found).all()


@settings(max_examples=200, deadline=None)
@given(moves(), st.floats(1e-6, 1e6))
def test_no_rule_ever_lets_a_user_exceed_the_bound(many, bound):
    for user, blocks in enumerate(rows_of(many)):
        ends = torch.cat([(many.start.split(many.sizes)[h] - b) for h, b in enumerate(blocks)])
        alone = ModelDeltas(many.start, ends, many.sizes, 1)
        for rule in rules(bound, many.sizes):
            total = torch.zeros(len(many.start), dtype=torch.float64)
            seen = clip_and_add(alone, rule, total)
            squares = sum((Fraction(x) ** 2 for x in total.tolist()), Fraction(0))
            assert squares <= Fraction(bound) ** 2, user
            assert seen.finite.all() or squares == 0


@pytest.mark.parametrize("users", [1, 4, 7])
def test_long_blocks_are_added_up_whole(users):
    sizes = [70_000, 1, 2**16, 2**16 + 1]
    start = torch.arange(float(sum(sizes)))
    ends = [(u + 2) * part for part in start.split(sizes) for u in range(users)]
    many = ModelDeltas(start, torch.cat(ends), sizes, users)
    total = torch.zeros(len(start), dtype=torch.float64)
    seen = clip_and_add(many, Unclipped(), total)
    factors = torch.arange(1.0, users + 1, dtype=torch.float64)
    assert torch.equal(total, -factors.sum() * start.double())
    norms = torch.stack([part.double().norm() for part in start.split(sizes)])
    torch.testing.assert_close(seen.norms, factors[:, None] * norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_numbers_may_be_of_other_types(dtype):
    many = ModelDeltas(torch.ones(3, dtype=dtype), torch.zeros(6, dtype=dtype), [1, 2], 2)
    total = torch.zeros(3, dtype=torch.float64)
    clip_and_add(many, GlobalClipping(math.sqrt(0.75)), total)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)


@settings(max_examples=100, deadline=None)
@given(moves(st.floats(-(2.0**100), 2.0**100, width=32)))
def test_norms_and_sums_are_those_without_rounding(many):
    total, rows = torch.ones(len(many.start), dtype=torch.float64), rows_of(many)
    seen = clip_and_add(many, Unclipped(), total)
    for norms, blocks in zip(seen.norms.tolist(), rows, strict=True):
        for norm, block in zip(norms, blocks, strict=True):
            exact = sum((Fraction(x) ** 2 for x in block.tolist()), Fraction(0))
            assert abs(Fraction(norm) ** 2 - exact) <= exact * Fraction(2.0**-45)
    for i, found in enumerate(total.tolist()):
        terms = [Fraction(1), *(Fraction(torch.cat(blocks)[i].item()) for blocks in rows)]
        rounding = sum(map(abs, terms), Fraction(0)) * Fraction(2.0**-45)
        assert abs(Fraction(found) - sum(terms, Fraction(0))) <= rounding


def test_lengths_that_do_not_fit_are_refused():
    for numbers, sizes, users in ((11, [4], 3), (12, [4], 2), (12, [2, 4], 2), (12, [1, 2], 4)):
        with pytest.raises(ValueError, match="numbers have neither"):
            ModelDeltas(torch.zeros(4), torch.zeros(numbers), sizes, users)
    many = ModelDeltas(torch.ones(4), torch.zeros(12), [4], 3)
    blocks = many.written_out().split([4], dim=1)
    for total in (torch.zeros(2).double(), torch.zeros(5).double(), torch.zeros(4)):
        for updates in (many, blocks):
            with pytest.raises(ValueError, match="users of 4 numbers"):
                clip_and_add(updates, GlobalClipping(1.0), total)
        assert not total.any()
