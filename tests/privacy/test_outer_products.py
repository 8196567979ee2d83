"""What is added for an example is bounded in exact terms, also where its tokens cancel."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from privacy.test_clip_and_add import BOUNDS, NUMBERS, square

from fedpriv.privacy import GlobalClipping, PerLayerClipping
from fedpriv.privacy.clipping import clip_and_add
from fedpriv.privacy.outer_products import OuterProducts

FLOAT32_MAX = torch.finfo(torch.float32).max


def numbers(draw, of, *shape):
    size = math.prod(shape)
    return torch.tensor(draw(st.lists(of, min_size=size, max_size=size))).float().reshape(shape)


@st.composite
def anything(draw):
    """Factors of a few examples: tiny, huge, not finite."""
    n, tokens, p, d = (draw(st.integers(1, 3)) for _ in range(4))
    return OuterProducts(numbers(draw, NUMBERS, n, tokens, p), numbers(draw, NUMBERS, n, tokens, d))


def nearly(x, generator):
    """Numbers that differ from `x` in their last digits, or not at all."""
    toward = torch.randn(x.shape, generator=generator) * torch.inf
    return torch.where(torch.rand(x.shape, generator=generator) < 0.5, x, x.nextafter(toward))


@st.composite
def cancelling(draw):
    """Tokens whose outer products cancel but for last digits: l·r - l·r', or l'·r' - l'·r besides.

    What is left is 10^7 or 10^14 times smaller than what it is the sum of, so that in a norm from
    inner products even float64 sees little or nothing of it.
    """
    n, p, d = (draw(st.integers(1, 4)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = 10.0 ** draw(st.integers(-12, 15))
    left = torch.randn(n, p, generator=generator) * size
    right = torch.randn(n, d, generator=generator) * size
    left2, right2 = nearly(left, generator), nearly(right, generator)
    if draw(st.booleans()):
        left2 = torch.zeros_like(left)
    order = torch.randperm(4, generator=generator)
    return OuterProducts(
        torch.stack([left, -left2, -left, left2], dim=1)[:, order],
        torch.stack([right, right, right2, right2], dim=1)[:, order],
    )


def of_examples(products, index):
    return OuterProducts(products.left[index], products.right[index])


def written_out(left, right):
    """The gradient of one example, without any rounding."""
    return [
        sum(Fraction(a[j]) * Fraction(b[k]) for a, b in zip(left, right, strict=True))
        for j in range(len(left[0]))
        for k in range(len(right[0]))
    ]


def clipped(products, rule):
    total = torch.zeros(products.size, dtype=torch.float64)
    return total, clip_and_add([products], rule, total)


def rules(bound):
    return [
        GlobalClipping(bound),
        PerLayerClipping(bound, (bound,)),
        PerLayerClipping(bound, (bound,), normalize=True),
    ]


@settings(max_examples=150, deadline=None)
@given(st.one_of(anything(), cancelling()), BOUNDS)
def test_no_example_ever_adds_more_than_the_bound(products, bound):
    for rule in rules(bound):
        for index in range(len(products.left)):
            total, _ = clipped(of_examples(products, [index]), rule)
            assert torch.isfinite(total).all()
            assert square(total) <= Fraction(bound) ** 2


@settings(max_examples=150, deadline=None)
@given(st.one_of(anything(), cancelling()), BOUNDS)
def test_an_example_moves_the_sum_of_all_by_no_more_than_the_bound(products, bound):
    """Others' rounding, which an example could change, is part of what is bounded."""
    others = list(range(1, len(products.left)))
    for rule in rules(bound):
        whole, _ = clipped(products, rule)
        rest, _ = clipped(of_examples(products, others), rule)
        moved = [
            Fraction(a) - Fraction(b) for a, b in zip(whole.tolist(), rest.tolist(), strict=True)
        ]
        assert sum(x**2 for x in moved) <= Fraction(bound) ** 2


@settings(max_examples=150, deadline=None)
@given(st.one_of(anything(), cancelling()))
def test_no_norm_is_understated(products):
    bounds = products.norm_bounds()
    for left, right, bound in zip(products.left, products.right, bounds.tolist(), strict=True):
        if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            assert not math.isfinite(bound)
            continue
        true = sum(x**2 for x in written_out(left.tolist(), right.tolist()))
        assert true <= Fraction(bound) ** 2 * (1 + Fraction(1, 10**9))


def test_a_gradient_that_inner_products_in_float32_do_not_see_is_clipped():
    """The attack on ghost clipping as it is usual: what its norm does not see is not clipped."""
    shares = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        left, right = 1e4 * torch.randn(2, 64, generator=generator)
        nearly_opposite = torch.randn(64, generator=generator) - right
        products = OuterProducts(
            torch.stack([left, left])[None], torch.stack([right, nearly_opposite])[None]
        )
        grams = [x @ x.mT for x in (products.left, products.right)]
        seen = float((grams[0] * grams[1]).sum().clamp(min=0).sqrt())
        true = float(torch.outer(left.double(), products.right[0].double().sum(0)).norm())
        shares.append(seen / true)
        assert true > 4e5
        assert float(products.norm_bounds()[0]) == pytest.approx(true, rel=1e-3)
        total, _ = clipped(products, GlobalClipping(1.0))
        assert 0.999 < float(total.norm()) <= 1
    assert min(shares) < 0.1


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_sums_and_norms_are_those_of_gradients_that_are_written_out(tokens):
    generator = torch.Generator().manual_seed(tokens)
    products = OuterProducts(
        torch.randn(7, tokens, 6, generator=generator),
        torch.randn(7, tokens, 9, generator=generator),
    )
    rows = torch.einsum("ntp,ntd->npd", products.left.double(), products.right.double()).flatten(1)
    torch.testing.assert_close(products.norm_bounds(), rows.norm(dim=1), rtol=1e-7, atol=0)
    for rule in rules(float(rows.norm(dim=1).median())):
        expected = torch.zeros(rows.shape[1], dtype=torch.float64)
        seen = clip_and_add([rows], rule, expected)
        total, ghost = clipped(products, rule)
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-7 * rule.bound)
        torch.testing.assert_close(ghost.scales, seen.scales)


def test_blocks_of_both_kinds_share_one_bound():
    generator = torch.Generator().manual_seed(2)
    products = OuterProducts(
        torch.randn(5, 3, 4, generator=generator), torch.randn(5, 3, 2, generator=generator)
    )
    weight = torch.einsum("ntp,ntd->npd", products.left, products.right).flatten(1)
    bias = products.left.sum(1)
    products.left[1, 0, 0] = weight[1] = torch.nan  # and its bias is left out as well
    sums = []
    for block in (products, weight):
        total = torch.zeros(12, dtype=torch.float64)
        seen = clip_and_add([block, bias], GlobalClipping(0.5), total)
        assert seen.finite.tolist() == [True, False, True, True, True]
        sums.append(total)
    torch.testing.assert_close(*sums, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_example_that_is_not_finite_adds_nothing_and_spoils_no_other(side, value):
    products = OuterProducts(torch.ones(3, 2, 4), torch.ones(3, 2, 5))
    getattr(products, side)[1, 0, 0] = value
    other = products.right if side == "left" else products.left
    other[1] = 0  # zero times infinity, too
    total, seen = clipped(products, GlobalClipping(0.1))
    expected, _ = clipped(of_examples(products, [0, 2]), GlobalClipping(0.1))
    assert seen.finite.tolist() == [True, False, True]
    torch.testing.assert_close(total, expected)


def test_the_largest_numbers_do_not_overflow():
    products = OuterProducts(torch.full((1, 3, 2), FLOAT32_MAX), torch.full((1, 3, 2), FLOAT32_MAX))
    total, seen = clipped(products, GlobalClipping(1.0))
    assert seen.finite.all()
    assert float(total.norm()) == pytest.approx(1, rel=1e-5)


def test_no_example_adds_nothing():
    total, seen = clipped(
        OuterProducts(torch.zeros(0, 3, 4), torch.zeros(0, 3, 5)), GlobalClipping(1.0)
    )
    assert not total.any()
    assert seen.norms.shape == (0, 1)


def test_float64_is_refused_since_its_products_would_not_be_exact():
    with pytest.raises(TypeError, match="float32"):
        OuterProducts(torch.ones(1, 1, 1).double(), torch.ones(1, 1, 1))
