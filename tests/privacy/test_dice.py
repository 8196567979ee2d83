"""DiceSGD's step: what one example can move, and the update in plain arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.privacy import (
    SPLITS,
    FixedSizeSampling,
    GlobalClipping,
    PerLayerClipping,
    PoissonSampling,
    Unclipped,
)
from fedpriv.privacy.dice import DiceMechanism, dice_step, sum_batch
from fedpriv.privacy.dice_accounting import memory_sensitivity

SIZES = [2, 1, 3]
BAD = st.sampled_from([0.0, 1e30, -1e30, math.nan, math.inf])
NUMBERS = st.one_of(st.floats(-100, 100, width=32), st.floats(width=32), BAD)
ROWS = st.lists(st.lists(NUMBERS, min_size=6, max_size=6), max_size=5)
ROW = st.lists(NUMBERS, min_size=6, max_size=6)
MEMORIES = st.lists(st.floats(-1e30, 1e30) | st.floats(-2, 2), min_size=6, max_size=6)
BOUNDS = st.floats(1e-3, 1e3)


def mechanism(c1, c2, split=None, gradient=math.inf, batch=3.5):
    def rule(bound):
        if math.isinf(bound):
            return Unclipped()
        if split is None:
            return GlobalClipping(bound)
        return PerLayerClipping(bound, SPLITS[split](bound, SIZES))

    sampling = PoissonSampling(100, batch)
    return DiceMechanism(sampling, 1.0, rule(c1), rule(c2), rule(gradient))


def released(rows, memory, dice):
    gradients = torch.tensor(rows, dtype=torch.float32).reshape(-1, sum(SIZES))
    e = torch.tensor(memory, dtype=torch.float64)
    return dice_step(e, sum_batch(gradients, SIZES, dice), SIZES, dice)


SPLIT = st.sampled_from([None, "uniform", "dim"])


@settings(max_examples=300, deadline=None)
@given(ROWS, ROW, MEMORIES, BOUNDS, BOUNDS, SPLIT)
def test_an_example_moves_the_release_by_at_most_its_bound(rows, row, memory, c1, c2, split):
    dice = mechanism(c1, c2, split)
    without, _ = released(rows, memory, dice)
    with_, _ = released([*rows, row], memory, dice)
    # Adding up 6 float64 numbers below 5·C1 + C2 rounds by far less than 1e-13 of them.
    rounding = 1e-13 * (5 * c1 + c2)
    assert float((with_ - without).norm()) <= c1 / dice.batch + rounding


@settings(max_examples=300, deadline=None)
@given(ROWS, MEMORIES, MEMORIES, BOUNDS, BOUNDS, SPLIT)
def test_the_memory_moves_the_release_by_at_most_twice_its_bound(rows, one, other, c1, c2, split):
    dice = mechanism(c1, c2, split)
    found = released(rows, one, dice)[0] - released(rows, other, dice)[0]
    assert float(found.norm()) <= 2 * c2 + 1e-13 * (5 * c1 + c2)
    alone = released(rows, one, dice)[0] - released(rows, [0.0] * 6, dice)[0]
    assert float(alone.norm()) <= c2 + 1e-13 * (5 * c1 + c2)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(ROWS, min_size=1, max_size=6),
    st.lists(st.one_of(st.none(), ROW), min_size=6, max_size=6),
    st.floats(0.01, 10),
    st.floats(1, 20),
    SPLIT,
)
def test_bounded_gradients_bound_what_all_memories_together_release(batches, own, c2, ratio, split):
    """Σ‖clip(e'_t) - clip(e_t)‖² ≤ (m·ρ)² for an example in m batches, and ≤ T(2·C2)²."""
    dice = mechanism(1.0, c2, split, gradient=ratio)
    without = with_ = torch.zeros(6, dtype=torch.float64)
    nobody = sum_batch(torch.zeros(0, 6), SIZES, dice)
    moved = 0.0
    for rows, row in zip(batches, own, strict=False):
        recalled = [dice_step(e, nobody, SIZES, dice)[0] for e in (with_, without)]
        moved += float((recalled[0] - recalled[1]).norm()) ** 2
        _, without = released(rows, without.tolist(), dice)
        _, with_ = released(rows if row is None else [*rows, row], with_.tolist(), dice)
    took_part = sum(row is not None for row in own[: len(batches)])
    assert math.sqrt(moved) <= memory_sensitivity(dice, len(batches), took_part) + 1e-12


def test_the_step_is_the_papers():
    """By hand: C1 = 1, C2 = 2, B = 2; gradients (3, 4), (0.3, 0.4); memory (0, 10)."""
    sampling = PoissonSampling(100, 2.0)
    dice = DiceMechanism(sampling, 1.0, GlobalClipping(1.0), GlobalClipping(2.0))
    sums = sum_batch(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), [1, 1], dice)
    memory = torch.tensor([0.0, 10.0], dtype=torch.float64)
    v, e = dice_step(memory, sums, [1, 1], dice)
    expected_v = torch.tensor([(0.6 + 0.3) / 2, (0.8 + 0.4) / 2 + 2.0], dtype=torch.float64)
    expected_e = torch.tensor([3.3 / 2 - 0.45, 10 + 4.4 / 2 - 2.6], dtype=torch.float64)
    torch.testing.assert_close(v, expected_v, rtol=1e-5, atol=0)
    torch.testing.assert_close(e, expected_e, rtol=1e-5, atol=0)
    assert dice.stddev == 0.5


def test_what_is_released_and_what_is_remembered_make_up_all_gradients():
    """Σ_t v_t + e_T = Σ_t (1/B)Σ g_i: nothing that was clipped off is lost."""
    generator = torch.Generator().manual_seed(1)
    dice = mechanism(0.5, 0.2)
    e, total, given_ = torch.zeros(6, dtype=torch.float64), 0.0, 0.0
    for n in (3, 0, 5, 1, 0, 2):
        gradients = torch.randn(n, 6, generator=generator) * 3
        v, e = dice_step(e, sum_batch(gradients, SIZES, dice), SIZES, dice)
        total, given_ = total + v, given_ + gradients.double().sum(0) / dice.batch
    torch.testing.assert_close(total + e, given_, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_adds_nothing_to_sum_and_memory_and_is_counted(bad):
    dice = mechanism(1.0, 1.0)
    good = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    broken = torch.tensor([[1.0, bad, 3.0, 4.0, 5.0, 6.0]])
    alone = sum_batch(good, SIZES, dice)
    both = sum_batch(torch.cat([broken, good, broken]), SIZES, dice)
    assert both.clipped.equal(alone.clipped)
    assert both.gradients.equal(alone.gradients)
    assert (alone.non_finite, both.non_finite) == (0, 2)


def test_an_empty_batch_releases_the_memory_alone():
    dice = mechanism(1.0, 5.0)
    e = torch.tensor([1.0, 0, 0, 0, 0, 2.0], dtype=torch.float64)
    v, following = dice_step(e, sum_batch(torch.zeros(0, 6), SIZES, dice), SIZES, dice)
    assert v.equal(e)
    assert following.abs().max() == 0


def test_a_memory_that_overflows_starts_again():
    dice = mechanism(1.0, 1.0)
    huge = torch.full((6,), 1e308, dtype=torch.float64)
    v, following = dice_step(huge, sum_batch(torch.zeros(0, 6), SIZES, dice), SIZES, dice)
    assert v.abs().max() == 0
    assert following.abs().max() == 0


def test_what_has_no_proof_is_refused():
    one, two = GlobalClipping(1.0), GlobalClipping(2.0)
    poisson = PoissonSampling(100, 10.0)
    with pytest.raises(ValueError, match="Poisson"):
        DiceMechanism(FixedSizeSampling(100, 10), 1.0, one, one)
    with pytest.raises(ValueError, match="noise_multiplier"):
        DiceMechanism(poisson, math.inf, one, one)
    with pytest.raises(ValueError, match="C1"):
        DiceMechanism(poisson, 1.0, Unclipped(), one)
    with pytest.raises(ValueError, match="C2"):
        DiceMechanism(poisson, 1.0, one, Unclipped())
    layers = PerLayerClipping(1.0, (0.6, 0.8))
    stretched = PerLayerClipping(1.0, (0.6, 0.8), normalize=True)
    unalike = PerLayerClipping(2.0, (1.6, 1.2))
    for examples, memory, gradients in (
        (two, one, one),
        (layers, layers, two),
        (layers, layers, unalike),
        (one, stretched, two),
        (stretched, one, PerLayerClipping(2.0, (1.2, 1.6))),
        (one, one, GlobalClipping(1e200)),
    ):
        with pytest.raises(ValueError, match="bound G"):
            DiceMechanism(poisson, 1.0, examples, memory, gradients)
