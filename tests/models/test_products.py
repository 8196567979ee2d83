import pytest
import torch
import torch.nn.functional as F
from in_process import train_small
from torch import Tensor, nn
from torch.func import grad, vmap

from fedpriv.models import products
from fedpriv.models.products import products_are_routed, route_products
from fedpriv.models.transformer import DotProductAttention


@pytest.fixture
def undecided():
    """Give the test a process that has not chosen yet, and put the choice back after it."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "none"
    yield
    settings.fp32_precision = before


@pytest.mark.usefixtures("undecided")
def test_products_are_routed_only_where_they_are_exact():
    granted = route_products(nn.Linear(70, 30))
    assert products_are_routed() == granted
    left, right = torch.randn(3, 50, 70), torch.randn(3, 70, 30)
    bound = 70 * 2.0**-24 * (left.double().abs() @ right.double().abs())
    assert bool(((left @ right - left.double() @ right.double()).abs() <= bound).all())


@pytest.mark.usefixtures("undecided")
def test_a_library_that_rounds_to_bfloat16_is_refused(monkeypatch):
    class Rounding(torch.Tensor):
        def __matmul__(self, other):
            a, b = self.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor)
            if a.dtype == torch.float32:
                a, b = a.bfloat16().float(), b.bfloat16().float()
            return a @ b

    drawn = torch.randn
    monkeypatch.setattr(
        products.torch, "randn", lambda *s, **k: drawn(*s, **k).as_subclass(Rounding)
    )
    assert not route_products(nn.Linear(70, 30))
    assert not products_are_routed()


@pytest.mark.usefixtures("undecided")
def test_the_models_own_shapes_are_tried(monkeypatch):
    """A library may be exact on all shapes but one that a model has."""
    exact = products._is_exact

    def inexact_for_70_columns(left, right):
        return exact(left.double(), right.double()) and right.shape[-1] != 70

    monkeypatch.setattr(products, "_is_exact", inexact_for_70_columns)
    assert route_products(nn.Linear(30, 60))
    assert not route_products(nn.Sequential(nn.Linear(30, 60), nn.Linear(60, 70)))
    assert not products_are_routed()
    assert not route_products(nn.Linear(70, 60))  # the gradient of its inputs


@pytest.mark.usefixtures("undecided")
def test_a_run_ends_alike_with_the_switch_on_and_off(tmp_path):
    ends = []
    # Adam would divide last bits by themselves, where a gradient is nearly zero.
    plain = {"optimizer": "sgd", "lr": 1.0}
    for wanted in (False, True):
        changes = {"rounds": 2, "privacy": None, "runtime__fast_products": wanted, "server": plain}
        _, prepared = train_small(tmp_path / str(wanted), **changes)
        ends.append(prepared.server.parameters())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def attended(projected: Tensor, valid: Tensor) -> Tensor:
    """Attention of 3 heads as the library has it, of queries, keys and values `[3, B, T, 12]`."""
    heads = [one.unflatten(-1, (3, 4)).transpose(1, 2) for one in projected]
    mixed = F.scaled_dot_product_attention(*heads, attn_mask=valid[:, None, None])
    return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("padded", [True, False])
def test_attention_written_out_equals_the_librarys(padded):
    torch.manual_seed(0)
    attention = DotProductAttention(3)
    projected = torch.randn(3, 4, 9, 12, requires_grad=True)
    lengths = torch.tensor([9, 1, 4, 7]) if padded else torch.full((4,), 9)
    valid = torch.arange(9) < lengths[:, None]
    outputs = [
        attended(projected, valid),
        attention._attend(*projected, valid if padded else None),
    ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)
    weights = torch.randn(4, 9, 12)
    expected, found = (torch.autograd.grad((o * weights).sum(), projected)[0] for o in outputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_attention_written_out_has_gradients_for_each_example_at_once():
    torch.manual_seed(0)
    attention, valid = DotProductAttention(3), torch.ones(2, 9, dtype=torch.bool)
    projected = torch.randn(5, 3, 2, 9, 12)
    found = vmap(grad(lambda one: attention._attend(*one, None).square().sum()))(projected)
    for one, gradient in zip(projected, found, strict=True):
        expected = grad(lambda alone: attended(alone, valid).square().sum())(one)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5)
