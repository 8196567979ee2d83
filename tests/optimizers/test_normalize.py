import pytest
import torch

from fedpriv.errors import InputError
from fedpriv.optimizers.normalize import NORMALIZERS, layer_norm_l2, normalizer


def test_each_block_is_divided_by_its_norm():
    update = {"a": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.tensor([-2.0])}
    before = {name: block.clone() for name, block in update.items()}
    result = layer_norm_l2(update)
    assert torch.allclose(result["a"], torch.tensor([[0.6, 0.0], [0.0, 0.8]]))
    assert torch.equal(result["b"], torch.tensor([-1.0]))
    assert all(torch.equal(update[name], before[name]) for name in update)


def test_blocks_of_zeros_stay():
    result = layer_norm_l2({"a": torch.zeros(3), "b": torch.ones(4)})
    assert torch.equal(result["a"], torch.zeros(3))
    assert torch.equal(result["b"], torch.full((4,), 0.5))


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_one_at_any_scale(scale, dtype):
    block = (scale * torch.randn(500)).to(dtype)
    result = layer_norm_l2({"a": block})["a"]
    assert result.dtype == dtype
    assert result.double().norm() == pytest.approx(1, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_registry():
    update = {"a": torch.ones(3)}
    assert torch.equal(normalizer(None)(update)["a"], update["a"])
    assert all(normalizer(name) is rule for name, rule in NORMALIZERS.items())
    with pytest.raises(InputError, match=r"server\.normalize: unknown.*did you mean layer_norm_l2"):
        normalizer("layernorm_l2")
