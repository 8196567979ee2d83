"""A stack's linear layers give each user the gradients that autograd gives the plain layer."""

import pytest
import torch
from torch import nn

from fedpriv.training.stacked_layers import StackedLinear

USERS, INPUTS, OUTPUTS = 4, 6, 5


def stacked(layers: list[nn.Linear], shared: bool) -> StackedLinear:
    layer = StackedLinear(layers[0])
    layer.users = len(layers)
    for name, value in layers[0].named_parameters():
        every = torch.stack([getattr(one, name).detach() for one in layers])
        setattr(layer, name, value.detach() if shared else every)
    return layer


# 2 rows have fewer numbers than the gradient that they make, 60 have more.
@pytest.mark.parametrize("rows", [2, 60])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_those_of_each_users_own_layer(rows, bias, shared):
    torch.manual_seed(rows)
    plain = [nn.Linear(INPUTS, OUTPUTS, bias) for _ in range(1 if shared else USERS)]
    plain *= USERS // len(plain)
    layer = stacked(plain, shared)
    x = torch.randn(USERS * rows, INPUTS, requires_grad=True)
    weights = torch.randn(USERS * rows, OUTPUTS)
    out = layer(x)
    (out * weights).sum().backward()
    for user, own in enumerate(plain):
        mine = slice(user * rows, (user + 1) * rows)
        inputs = x.detach()[mine].requires_grad_()
        expected = own(inputs)
        names, parameters = zip(*own.named_parameters(), strict=True)
        gradients = torch.autograd.grad((expected * weights[mine]).sum(), [inputs, *parameters])
        torch.testing.assert_close(out[mine], expected)
        torch.testing.assert_close(x.grad[mine], gradients[0])
        for name, gradient in zip(names, gradients[1:], strict=True):
            found = layer.gradient(name, user, user + 1)
            torch.testing.assert_close(found[0], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 60])
def test_a_pass_forgets_the_one_before(rows):
    layer = stacked([nn.Linear(INPUTS, OUTPUTS) for _ in range(USERS)], shared=False)
    for n in (62 - rows, rows):
        layer.begin_pass(None)
        x = torch.randn(USERS * n, INPUTS)
        layer(x).sum().backward()
    expected = x.view(USERS, rows, INPUTS).sum(1, keepdim=True).expand(-1, OUTPUTS, -1)
    torch.testing.assert_close(layer.gradient("weight", 0, USERS), expected, rtol=1e-5, atol=1e-5)
