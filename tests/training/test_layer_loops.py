"""Compiled layers against PyTorch's own in float64, and where they take its place."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedpriv.models import ViTOptions, build_model
from fedpriv.models.transformer import DotProductAttention
from fedpriv.training.stacked import StackedModel
from fedpriv.training.stacked_layers import CompiledAttention, CompiledGELU, StackedNorm

BAD = [math.nan, math.inf, -math.inf]


def norm_of(users: int, size: int, dtype: torch.dtype = torch.float32) -> StackedNorm:
    layer = StackedNorm(nn.LayerNorm(size))
    layer.users = users
    layer.weight, layer.bias = torch.randn(2, users, size, dtype=dtype).requires_grad_().unbind()
    return layer


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def library_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    mixed = F.scaled_dot_product_attention(*(heads_of(one, heads) for one in (q, k, v)))
    return mixed.transpose(1, 2).flatten(2)


def names_of(output: Tensor) -> set[str]:
    """The kinds of operations that an output was made by."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


def test_gelu_and_its_derivative_are_exact_to_float32():
    ends = torch.tensor([0.0, -0.0, 1e-40, 1e-30, -1e-30, 13.1, -13.2, 14.0, -14.0, 1e30, -1e30])
    x = torch.cat([torch.linspace(-20, 20, 40_001), ends])
    single, double = x.clone().requires_grad_(), x.double().requires_grad_()
    found, expected = CompiledGELU(nn.GELU())(single), F.gelu(double)
    assert names_of(found) == {"_GeluBackward", "AccumulateGrad"}
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=3e-7)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=3e-7, atol=3e-7)


@settings(max_examples=40, deadline=None)
@given(
    users=st.integers(1, 4),
    rows=st.integers(1, 9),
    size=st.integers(8, 70),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_a_norm_is_layer_norm_with_each_users_own_numbers(users, rows, size, scale, seed):
    torch.manual_seed(seed)
    layer = norm_of(users, size)
    x = (torch.randn(users * rows, size) * scale + scale).requires_grad_()
    outer = torch.randn(users * rows, size)
    found = layer(x)
    assert "_NormalizedBackward" in names_of(found)
    mine = torch.autograd.grad((found * outer).sum(), [x, layer.weight, layer.bias])
    for user in range(users):
        part = slice(user * rows, (user + 1) * rows)
        inputs = [x[part], layer.weight[user], layer.bias[user]]
        inputs = [one.detach().double().requires_grad_() for one in inputs]
        expected = F.layer_norm(inputs[0], (size,), *inputs[1:])
        torch.testing.assert_close(found[part].double(), expected, rtol=1e-4, atol=2e-5)
        theirs = torch.autograd.grad((expected * outer[part]).sum(), inputs)
        for ours, gradient in zip(
            (mine[0][part], mine[1][user], mine[2][user]), theirs, strict=True
        ):
            error = (ours.double() - gradient).abs().max()
            assert error <= 1e-4 * gradient.abs().max() + 1e-5


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.sampled_from([4, 8, 12, 16, 32]),
    heads=st.integers(1, 3),
    size=st.integers(1, 35),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_attention_is_the_librarys(batch, tokens, heads, size, scale, seed):
    torch.manual_seed(seed)
    single = [torch.randn(batch, tokens, heads * size) * s for s in (scale, scale, 1)]
    single = [one.requires_grad_() for one in single]
    double = [one.detach().double().requires_grad_() for one in single]
    found = CompiledAttention(DotProductAttention(heads))(*single)
    assert names_of(found) == {"_AttendedBackward", "AccumulateGrad"}
    expected = library_attention(*double, heads)
    # scores of this size are rounded by this much
    close = {"rtol": 1e-5, "atol": 1e-5 * (1 + scale**2 * math.sqrt(size))}
    torch.testing.assert_close(found.double(), expected, **close)
    outer = torch.randn(batch, tokens, heads * size)
    mine = torch.autograd.grad((found * outer).sum(), single)
    theirs = torch.autograd.grad((expected * outer).sum(), double)
    for ours, gradient in zip(mine, theirs, strict=True):
        torch.testing.assert_close(
            ours.double(), gradient, rtol=1e-4, atol=close["atol"] * (1 + scale) * tokens
        )


def test_gradients_that_are_spread_out_come_through():
    torch.manual_seed(0)
    x, norm = torch.randn(6, 4, 8), norm_of(2, 8)
    for layer in (CompiledGELU(nn.GELU()), norm):
        expanded, written = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer(expanded).sum().backward()  # autograd's gradient is one number, seen from everywhere
        (layer(written) * torch.ones(6, 4, 8)).sum().backward()
        assert torch.equal(expanded.grad, written.grad)
    attention = CompiledAttention(DotProductAttention(2))
    gradients = []
    for weights in (1.0, torch.ones(6, 4, 8)):
        q = x.clone().requires_grad_()
        (attention(q, x, x) * weights).sum().backward()
        gradients.append(q.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_is_not_lost(bad):
    """Clipping leaves out a user whose update is not finite, so no layer may hide that."""
    x = torch.randn(2, 8, 6)
    x[1, 3, 2] = bad
    found, expected = CompiledGELU(nn.GELU())(x), F.gelu(x.double())
    assert torch.equal(found.isfinite(), expected.isfinite())
    normed = norm_of(2, 6)(x)
    assert not normed[1, 3].isfinite().any()
    assert normed[0].isfinite().all()
    fine = torch.randn(2, 8, 6)
    attention = CompiledAttention(DotProductAttention(2))
    for place in range(3):
        inputs = [fine, fine, fine]
        inputs[place] = x
        expected = library_attention(*(one.double() for one in inputs), 2)
        found = attention(*inputs)
        assert found[0].isfinite().all()
        # infinite scores against all others may leave the library one share of one
        assert (found.isnan() | ~expected.isnan()).all()
        assert not found[1].isfinite().all()


def test_many_users_of_a_vision_transformer_pass_through_compiled_layers():
    plain = build_model(ViTOptions(dim=8, depth=1, heads=2, patch=2), (1, 8, 8), classes=3, seed=1)
    stacked = StackedModel(plain)
    parameters = torch.cat([p.detach().reshape(-1) for p in plain.parameters()])
    stacked.start(parameters, users=2)
    stacked.set_users(2, first=True)
    made = names_of(stacked.module(torch.rand(4, 1, 8, 8)))
    assert {"_AttendedBackward", "_GeluBackward", "_NormalizedBackward"} <= made
    assert not any("Softmax" in name or "NativeLayerNorm" in name for name in made)


@pytest.mark.parametrize("tokens", [7, 36])
def test_many_or_odd_tokens_are_left_to_the_library(tokens):
    x = torch.randn(2, tokens, 6, requires_grad=True)
    attention = CompiledAttention(DotProductAttention(2))
    assert "_AttendedBackward" not in names_of(attention(x, x, x))


def test_hidden_tokens_dropout_and_other_numbers_are_left_to_the_library():
    x, valid = torch.randn(2, 8, 6, requires_grad=True), torch.ones(2, 8, dtype=torch.bool)
    valid[0, 5:] = False
    attention = CompiledAttention(DotProductAttention(2, dropout=0.5)).eval()
    torch.testing.assert_close(
        attention(x, x, x, valid)[:1, :5], attention(x[:1, :5], x[:1, :5], x[:1, :5])
    )
    assert "_AttendedBackward" in names_of(attention(x, x, x))
    assert "_AttendedBackward" not in names_of(attention.train()(x, x, x))
    double = x.double()
    for made in (attention.eval()(double, double, double), CompiledGELU(nn.GELU())(double)):
        assert made.dtype == torch.float64
    tanh = CompiledGELU(nn.GELU(approximate="tanh"))
    assert torch.equal(tanh(x), F.gelu(x, approximate="tanh"))
    assert norm_of(2, 6, torch.float64)(double).dtype == torch.float64


def test_other_shapes_are_left_to_the_library():
    attention, plain = CompiledAttention(DotProductAttention(2)), DotProductAttention(2)
    q, kv = torch.randn(1, 8, 8), torch.randn(1, 4, 8)
    made = attention(q.requires_grad_(), kv, kv)
    assert "_AttendedBackward" not in names_of(made)
    assert torch.equal(made, plain(q, kv, kv))


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 4, 8, requires_grad=True)
    attention = CompiledAttention(DotProductAttention(2))
    for made in (CompiledGELU(nn.GELU())(x), norm_of(2, 8)(x), attention(x, x, x)):
        (gradient,) = torch.autograd.grad(made.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
