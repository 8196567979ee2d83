import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.privacy import (
    SPLITS,
    GlobalClipping,
    PerLayerClipping,
    Unclipped,
    clip,
    clip_and_sum,
)
from fedpriv.privacy.clipping import PayloadClipping, UndoneClipping

NUMBERS = st.one_of(
    st.floats(width=32),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, 1e-45, 3e38, -3e38, math.inf, -math.inf, math.nan]),
)
BLOCKS = st.lists(st.lists(NUMBERS, min_size=1, max_size=9), min_size=1, max_size=5)
BOUNDS = st.floats(1e-6, 1e6)
MULTIPLIERS = st.one_of(
    st.floats(0, 1e6), st.sampled_from([0.0, 5e-324, 1e-200, 1e200, math.inf, math.nan])
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def rules(bound: float, sizes: list[int]) -> list:
    per_layer = [
        PerLayerClipping(bound, split(bound, sizes), normalize)
        for split in SPLITS.values()
        for normalize in (False, True)
    ]
    return [GlobalClipping(bound), *per_layer]


def exact_norm(blocks: dict[str, torch.Tensor]) -> float:
    """The norm of float32 numbers: their squares are exact in float64, and fsum rounds once."""
    squares = [float(x) ** 2 for block in blocks.values() for x in block.flatten().tolist()]
    return math.sqrt(math.fsum(squares))


def update_of(blocks: list[list[float]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {str(i): torch.tensor(block).to(dtype) for i, block in enumerate(blocks)}


@settings(max_examples=400, deadline=None)
@given(BLOCKS, BOUNDS, DTYPES)
def test_no_rule_ever_lets_a_contribution_exceed_the_bound(blocks, bound, dtype):
    update = update_of(blocks, dtype)
    for rule in rules(bound, [len(block) for block in blocks]):
        contribution = clip(update, rule)
        assert all(b.dtype == torch.float32 for b in contribution.blocks.values())
        assert exact_norm(contribution.blocks) <= rule.bound


@settings(max_examples=400, deadline=None)
@given(BLOCKS, BOUNDS, DTYPES, st.data())
def test_nor_does_one_that_divides_by_multipliers_of_any_size(blocks, bound, dtype, data):
    """What is divided by 0, or by what is nearly 0, is no number or infinite."""
    update = update_of(blocks, dtype)
    several = st.lists(MULTIPLIERS, min_size=len(blocks), max_size=len(blocks))
    multipliers = tuple(data.draw(several))
    for rule in rules(bound, [len(block) for block in blocks]):
        undone = UndoneClipping(rule, multipliers)
        assert exact_norm(clip(update, undone).blocks) <= bound
        payloads = PayloadClipping(("model", "control"), (undone, undone))
        sent = clip(update | {f"control {name}": b for name, b in update.items()}, payloads)
        model = {name: b for name, b in sent.blocks.items() if name in update}
        assert exact_norm(model) <= bound


@pytest.mark.parametrize("scale", [2.0, -2.0, math.nan, math.inf])
def test_a_rule_that_does_not_keep_its_bound_contributes_nothing(scale):
    class Careless(GlobalClipping):
        def scales(self, norms):
            return torch.full_like(norms, scale)

    update = update_of([[3.0, 4.0], [1.0]], torch.float32)
    assert exact_norm(clip(update, Careless(1.0)).blocks) == 0
    summed = clip_and_sum(torch.tensor([[3.0, 4.0, 1.0]]), [2, 1], Careless(1.0))
    assert not summed.total.any()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_large_random_updates_stay_below_the_bound(blocks, bound, seed):
    generator = torch.Generator().manual_seed(seed)
    update = {
        str(i): torch.randn(1 + 37 * i, generator=generator) * 10.0 ** (i % 7)
        for i in range(blocks)
    }
    for rule in rules(bound, [b.numel() for b in update.values()]):
        assert exact_norm(clip(update, rule).blocks) <= bound


@given(BLOCKS, st.sampled_from([math.nan, math.inf, -math.inf]))
@settings(deadline=None)
def test_a_non_finite_update_contributes_zero_and_says_so(blocks, bad):
    blocks[0][0] = bad
    for rule in rules(1.0, [len(block) for block in blocks]):
        contribution = clip(update_of(blocks, torch.float32), rule)
        assert not contribution.finite
        assert exact_norm(contribution.blocks) == 0


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=300), BOUNDS)
def test_the_blocks_share_the_bound(sizes, bound):
    for split in SPLITS.values():
        shares = split(bound, sizes)
        assert math.sqrt(math.fsum(c**2 for c in shares)) == pytest.approx(bound, rel=1e-9)


def test_splits_against_their_formulas():
    assert SPLITS["uniform"](6.0, [1, 2, 3, 4]) == pytest.approx((3.0, 3.0, 3.0, 3.0))
    assert SPLITS["dim"](10.0, [9, 16, 75]) == pytest.approx((3.0, 4.0, 10 * math.sqrt(0.75)))


def test_global_clipping_scales_all_blocks_alike():
    update = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    clipped = clip(update, GlobalClipping(1.0)).blocks
    torch.testing.assert_close(clipped["a"], torch.tensor([0.6, 0.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(clipped["b"], torch.tensor([0.8]), rtol=1e-5, atol=0)
    assert clip(update, GlobalClipping(6.0)).blocks["b"].equal(update["b"])


def test_per_layer_clipping_leaves_small_blocks_alone():
    update = {"small": torch.tensor([0.1]), "large": torch.tensor([30.0, 40.0])}
    clipped = clip(update, PerLayerClipping(math.sqrt(2), (1.0, 1.0))).blocks
    assert clipped["small"].equal(update["small"])
    torch.testing.assert_close(clipped["large"], torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


def test_normalized_clipping_scales_small_blocks_up_only_when_the_whole_is_too_large():
    rule = PerLayerClipping(math.sqrt(2), (1.0, 1.0), normalize=True)
    within = {"small": torch.tensor([0.1]), "large": torch.tensor([1.2])}
    assert clip(within, rule).blocks["large"].equal(within["large"])
    above = clip({"small": torch.tensor([0.1]), "large": torch.tensor([50.0])}, rule).blocks
    torch.testing.assert_close(above["small"], torch.tensor([1.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(above["large"], torch.tensor([1.0]), rtol=1e-5, atol=0)
    silent = clip({"small": torch.zeros(1), "large": torch.tensor([50.0])}, rule).blocks
    assert silent["small"].item() == 0


def test_unclipped_changes_nothing_but_drops_non_finite_updates():
    update = {"a": torch.tensor([1e30, -2.0])}
    assert clip(update, Unclipped()).blocks["a"].equal(update["a"])
    assert not clip({"a": torch.tensor([math.nan])}, Unclipped()).finite


def test_rules_answer_for_a_stack_of_users_as_for_each_alone():
    norms = torch.tensor([[3.0, 4.0], [0.1, 0.2], [0.0, 50.0]], dtype=torch.float64)
    for rule in rules(1.0, [1, 3]):
        together = rule.scales(norms)
        alone = torch.stack([rule.scales(user) for user in norms])
        torch.testing.assert_close(together, alone, rtol=0, atol=0)
