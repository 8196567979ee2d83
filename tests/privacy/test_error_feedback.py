import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.privacy import (
    SPLITS,
    Dice,
    ErrorFeedback,
    GlobalClipping,
    PerLayerClipping,
    Remainder,
    feed_back,
)
from fedpriv.privacy.clipping import bounds_of, clip_and_sum

NUMBERS = st.one_of(
    st.floats(width=32),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, 1e-45, 1e-38, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan]),
)
MODERATE = st.floats(-100, 100, width=32)
BOUNDS = st.floats(1e-6, 1e6)
DECAYS = st.sampled_from([1.0, 0.7, 0.0])
CAPS = st.sampled_from([None, 1e-3, 10.0])


@st.composite
def stacks(draw, numbers=NUMBERS) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Updates and memories `[users, numbers]`, and the sizes of their blocks."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    row = st.lists(numbers, min_size=sum(sizes), max_size=sum(sizes))
    users = draw(st.integers(1, 4))
    updates, memories = (
        torch.tensor(draw(st.lists(row, min_size=users, max_size=users)), dtype=dtype)
        for _ in range(2)
    )
    return updates, memories, sizes


def rules(bound: float, sizes: list[int]) -> list:
    per_layer = [
        PerLayerClipping(bound, split(bound, sizes), normalize)
        for split in SPLITS.values()
        for normalize in (False, True)
    ]
    return [GlobalClipping(bound), *per_layer]


def settings_of(bound: float, second: float, sizes: list[int], decay: float, cap: float | None):
    """Every clipping rule with every variant."""
    for rule, other in zip(rules(bound, sizes), rules(second, sizes), strict=True):
        yield rule, Remainder(decay, cap)
        yield rule, Dice(other, decay, cap)


def square(numbers: torch.Tensor) -> Fraction:
    return sum((Fraction(x) ** 2 for x in numbers.tolist()), Fraction(0))


@settings(max_examples=200, deadline=None)
@given(stacks(), BOUNDS, BOUNDS, DECAYS, CAPS)
def test_no_contribution_ever_exceeds_its_bound(stack, bound, second, decay, cap):
    updates, memories, sizes = stack
    for rule, feedback in settings_of(bound, second, sizes, decay, cap):
        most = feedback.contribution(rule)
        exact = Fraction(bound) + (Fraction(second) if isinstance(feedback, Dice) else 0)
        # Clipping is 2^-20 below its bound, and the sum of two bounds rounds by 2^-52.
        assert Fraction(most.bound) >= exact * (1 - Fraction(1, 2**50))
        for update, memory in zip(updates, memories, strict=True):
            sent = feed_back(update[None], memory[None], sizes, rule, feedback).sent.total
            assert torch.isfinite(sent).all()
            assert square(sent) <= min(exact, Fraction(most.bound)) ** 2


@settings(max_examples=100, deadline=None)
@given(stacks(), BOUNDS, BOUNDS)
def test_every_block_keeps_its_own_bound(stack, bound, second):
    """Per-block noise rests on it."""
    updates, memories, sizes = stack
    for rule, feedback in settings_of(bound, second, sizes, 1.0, None):
        if not isinstance(rule, PerLayerClipping) or rule.normalize:
            continue
        most = bounds_of(feedback.contribution(rule))
        for update, memory in zip(updates, memories, strict=True):
            sent = feed_back(update[None], memory[None], sizes, rule, feedback).sent.total
            for block, limit in zip(sent.split(sizes), most, strict=True):
                assert square(block) <= Fraction(limit) ** 2


@settings(max_examples=100, deadline=None)
@given(stacks(MODERATE), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), DECAYS)
def test_what_is_not_sent_is_kept(stack, bound, second, decay):
    updates, memories, sizes = stack
    for rule, feedback in settings_of(bound, second, sizes, decay, None):
        for update, memory in zip(updates, memories, strict=True):
            fed = feed_back(update[None], memory[None], sizes, rule, feedback)
            wanted = update.double() + decay * memory.double()
            given_ = fed.sent.total + fed.memories[0].double()
            # A float32 sum rounds relative to its terms, and what is scaled up to the result.
            terms = float(update.abs().max() + memory.abs().max() + fed.memories.abs().max())
            torch.testing.assert_close(given_, wanted, rtol=0, atol=1e-6 * terms + 1e-37)


@settings(max_examples=100, deadline=None)
@given(stacks(), BOUNDS, BOUNDS, DECAYS, CAPS)
def test_users_in_a_stack_do_not_meet(stack, bound, second, decay, cap):
    updates, memories, sizes = stack
    for rule, feedback in settings_of(bound, second, sizes, decay, cap):
        together = feed_back(updates, memories, sizes, rule, feedback)
        for row in range(len(updates)):
            one = slice(row, row + 1)
            alone = feed_back(updates[one], memories[one], sizes, rule, feedback)
            same = {"rtol": 1e-6, "atol": 0, "equal_nan": True}
            torch.testing.assert_close(together.memories[one], alone.memories, **same)
            assert together.reset[row] == alone.reset[0]
            assert together.sent.finite[row] == alone.sent.finite[0]


@settings(max_examples=60, deadline=None)
@given(stacks(), BOUNDS)
def test_a_memory_that_decays_to_nothing_is_plain_clipping(stack, bound):
    updates, memories, sizes = stack
    for rule in rules(bound, sizes):
        fed = feed_back(updates, memories, sizes, rule, Remainder(decay=0.0))
        plain = clip_and_sum(updates, sizes, rule)
        assert fed.sent.total.equal(plain.total)
        assert fed.sent.scales.equal(plain.scales)


@settings(max_examples=100, deadline=None)
@given(stacks(MODERATE), BOUNDS, st.floats(1e-3, 1e3))
def test_a_memory_stays_within_its_cap(stack, bound, cap):
    updates, memories, sizes = stack
    for rule, feedback in settings_of(bound, bound, sizes, 1.0, cap):
        fed = feed_back(updates, memories, sizes, rule, feedback)
        assert (fed.memories.double().norm(dim=1) <= cap * (1 + 1e-5)).all()


VARIANTS = [Remainder(decay=0.5), Dice(GlobalClipping(2.0), decay=0.5)]


@pytest.mark.parametrize("feedback", VARIANTS, ids=["remainder", "dice"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_contributes_zero_and_changes_no_memory(
    bad: float, feedback: ErrorFeedback
):
    updates = torch.tensor([[bad, 1.0], [3.0, 4.0]])
    memories = torch.tensor([[5.0, 6.0], [0.0, 0.0]])
    fed = feed_back(updates, memories, [2], GlobalClipping(1.0), feedback)
    assert fed.memories[0].tolist() == [5.0, 6.0]
    assert fed.sent.finite.tolist() == [False, True]
    alone = feed_back(updates[1:], memories[1:], [2], GlobalClipping(1.0), feedback)
    assert fed.sent.total.equal(alone.sent.total)
    assert not fed.reset.any()


@pytest.mark.parametrize("feedback", VARIANTS, ids=["remainder", "dice"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_memory_that_is_not_finite_is_taken_to_be_zero_and_counted(
    bad: float, feedback: ErrorFeedback
):
    update = torch.tensor([[3.0, 4.0]])
    broken = feed_back(update, torch.tensor([[bad, 1.0]]), [2], GlobalClipping(1.0), feedback)
    empty = feed_back(update, torch.zeros(1, 2), [2], GlobalClipping(1.0), feedback)
    assert broken.reset.tolist() == [True]
    assert empty.reset.tolist() == [False]
    assert broken.sent.total.equal(empty.sent.total)
    assert broken.memories.equal(empty.memories)


def test_two_steps_by_hand():
    rule = GlobalClipping(1.0)
    first = feed_back(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), [2], rule, Remainder())
    assert first.sent.total.tolist() == pytest.approx([1.0, 0.0], abs=2e-6)
    assert first.memories.tolist()[0] == pytest.approx([2.0, 0.0], abs=2e-6)
    second = feed_back(torch.tensor([[0.0, 0.0]]), first.memories, [2], rule, Remainder(0.25))
    assert second.sent.total.tolist() == pytest.approx([0.5, 0.0], abs=2e-6)
    assert second.memories.tolist()[0] == pytest.approx([0.0, 0.0], abs=2e-6)
    dice = feed_back(
        torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]]), [2], rule, Dice(GlobalClipping(2.0))
    )
    assert dice.sent.total.tolist() == pytest.approx([1.0, 2.0], abs=1e-5)
    assert dice.memories.tolist()[0] == pytest.approx([2.0, 3.0], abs=1e-5)
    assert Dice(GlobalClipping(2.0)).contribution(rule).bound == 3.0
