import pytest
import torch
from in_process import small_config

from fedpriv.components import outside
from fedpriv.errors import InputError
from fedpriv.optimizers.normalize import NORMALIZERS, Normalization, layer_norm_l2
from fedpriv.optimizers.registry import server_optimizer


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
    assert torch.equal(Normalization(None)(update)["a"], update["a"])
    named = Normalization(NORMALIZERS.parse("layer_norm_l2"))
    assert torch.equal(named(update)["a"], layer_norm_l2(update)["a"])
    with pytest.raises(InputError, match=r"server\.normalize\.name: unknown.*mean layer_norm_l2"):
        small_config(server__normalize="layernorm_l2")


CODE = """
import torch
def powered(update, power: float = 0.5):
    return {name: block.sign() * block.abs() ** power for name, block in update.items()}
class Scaled:
    def __init__(self, by: float):
        self.by = by
    def __call__(self, update):
        return {name: self.by * block for name, block in update.items()}
def fewer(update):
    return {}
class Halving(torch.optim.SGD):
    def __init__(self, params, lr, slow: float = 1.0):
        super().__init__(params, lr=lr * slow)
"""


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"name": "theirs:powered"}, [2.0, -3.0]),
        ({"name": "theirs:powered", "power": 2}, [16.0, -81.0]),
        ({"name": "theirs:Scaled", "by": 3}, [12.0, -27.0]),
        ("theirs:powered", [2.0, -3.0]),
    ],
)
def test_a_normalizer_from_outside_is_a_function_or_a_class_with_options(
    tmp_path, wanted, expected
):
    (tmp_path / "theirs.py").write_text(CODE)
    config = small_config(code=str(tmp_path), server__normalize=wanted)
    update = {"a": torch.tensor([4.0, -9.0])}
    assert Normalization(config.server.normalize)(update)["a"].tolist() == expected
    assert update["a"].tolist() == [4.0, -9.0]


def test_what_a_normalizer_may_not_do_is_told(tmp_path):
    (tmp_path / "theirs.py").write_text(CODE)
    config = small_config(code=str(tmp_path), server__normalize="theirs:fewer")
    with pytest.raises(InputError, match=r"server\.normalize: theirs:fewer must return a dict"):
        Normalization(config.server.normalize)({"a": torch.ones(2)})
    with pytest.raises(InputError, match=r"^server\.normalize\.by: this key is needed"):
        small_config(code=str(tmp_path), server__normalize="theirs:Scaled")


def test_an_optimizer_from_outside_takes_its_options(tmp_path):
    (tmp_path / "theirs.py").write_text(CODE)
    given = {"optimizer": "theirs:Halving", "lr": 0.5, "options": {"slow": 0.5}}
    config = small_config(code=str(tmp_path), server=given)
    weights = [torch.nn.Parameter(torch.ones(2))]
    optimizer = server_optimizer(
        config.server.optimizer, weights, config.server.lr, config.server.options
    )
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert list(outside(config)) == ["server.optimizer"]
    with pytest.raises(InputError, match=r"server\.options\.slwo: .* has no such option"):
        server_optimizer("theirs:Halving", weights, 0.1, {"slwo": 1})
    with pytest.raises(InputError, match=r"^server\.optimizer: .* has no none"):
        small_config(code=str(tmp_path), server={"optimizer": "theirs:none"})
    named = small_config(code=str(tmp_path), server={"optimizer": "theirs:powered"})
    with pytest.raises(InputError, match=r"server\.optimizer: theirs:powered is not a subclass of"):
        server_optimizer(named.server.optimizer, weights, 0.1, {})


KEEPING = """
import numpy as np
class Counting:
    def __init__(self):
        self.calls = 0
    def __call__(self, update):
        self.calls += 1
        return update
class Hiding(Counting):
    def __init__(self):
        self.of = lambda x: x
class Slotted:
    __slots__ = ("calls",)
    def __call__(self, update):
        return update
class Arrays(Counting):
    def __init__(self):
        self.seen = np.zeros(3)
class Later(Counting):
    def __call__(self, update):
        self.calls = {1, 2}
        self.of = np.sum
        return update
"""


@pytest.fixture
def keeping(tmp_path):
    (tmp_path / "keeping_normalizers.py").write_text(KEEPING)
    return lambda name: (
        small_config(
            code=str(tmp_path), server__normalize=f"keeping_normalizers:{name}"
        ).server.normalize
    )


def test_what_one_keeps_comes_back(keeping):
    update = {"a": torch.ones(2)}
    first, second = Normalization(keeping("Counting")), Normalization(keeping("Counting"))
    for _ in range(3):
        first(update)
    second.load_state(first.state())
    second(update)
    assert (first._made.calls, second._made.calls) == (3, 4)
    with pytest.raises(InputError, match="has none of its state"):
        second.load_state(None)


@pytest.mark.parametrize("name", ["Hiding", "Slotted", "Arrays"])
def test_what_no_checkpoint_can_hold_is_told_at_the_start(keeping, name):
    with pytest.raises(InputError, match=rf"^server\.normalize: keeping_normalizers:{name} keeps"):
        Normalization(keeping(name))


def test_or_in_the_round_that_it_appears_in(keeping):
    made = Normalization(keeping("Later"))
    made({"a": torch.ones(2)})
    with pytest.raises(InputError, match="write state_dict and load"):
        made.state()
