"""What cannot be trained here is refused at once, with the layer that is the cause."""

import pytest
import timm
import torch
from in_process import small_config
from torch import nn

from fedpriv.errors import InputError
from fedpriv.federation.builders import build_trainer
from fedpriv.models import MODELS, build_model, fitness
from fedpriv.models.convert import batch_to_group_norms
from fedpriv.models.fitness import require_memory, require_separate_users


class Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first = layers[0]
        self.block = nn.Sequential(*layers[1:])


@pytest.mark.parametrize(
    ("norm", "kind"),
    [(nn.BatchNorm1d(4), "BatchNorm1d"), (nn.SyncBatchNorm(4), "SyncBatchNorm")],
)
def test_batch_norm_is_named_with_what_to_write_instead(norm, kind):
    with pytest.raises(InputError, match=rf"layer block\.1 \({kind}\).*write GroupNorm") as caught:
        require_separate_users(Net(nn.Linear(4, 4), nn.ReLU(), norm), "mine")
    assert "buffer" not in str(caught.value)


def built(make, **options) -> nn.Module:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MODELS.registered, "convolutions", make)
        wanted = MODELS.parse({"name": "convolutions", **options})
        return build_model(wanted, (3, 32, 32), 4, seed=3)


def test_batch_norms_become_group_norms_that_begin_with_their_weights():
    def convolutions(classes: int) -> nn.Module:
        return Net(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.BatchNorm2d(48))

    with pytest.raises(InputError, match=r"layer block\.0 \(BatchNorm2d\).*model\.convert: group"):
        built(convolutions)
    model = built(convolutions, convert="groupnorm")
    assert [type(layer).__name__ for layer in model.block] == ["GroupNorm", "ReLU", "GroupNorm"]
    assert model.block[0].num_groups == 16
    weight = torch.arange(6.0)
    norm = nn.BatchNorm2d(6)
    norm.weight.data, norm.bias.data = weight.clone(), weight + 1
    converted = batch_to_group_norms(norm)
    assert converted.weight.equal(weight)
    assert converted.bias.equal(weight + 1)
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(converted(x)[:1], converted(x[:1]))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_timms_batch_norms_take_their_activations_along(name):
    def convolutions(classes: int) -> nn.Module:
        return timm.create_model(name, num_classes=classes)

    model = built(convolutions, convert="groupnorm").eval()
    kinds = [type(layer).__name__ for layer in model.modules()]
    assert "GroupNorm" in kinds
    assert not [kind for kind in kinds if "BatchNorm" in kind]
    activations = (nn.ReLU, nn.Hardswish)
    with torch.device("meta"):
        plain = convolutions(4)
    assert sum(isinstance(m, activations) for m in model.modules()) == sum(
        isinstance(m, activations) for m in plain.modules()
    )
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)


def test_a_model_of_which_nothing_is_trained_is_named():
    with pytest.raises(InputError, match=r"mine has no parameter that is trained"):
        require_separate_users(nn.Linear(4, 4).requires_grad_(False), "mine")


def test_constants_and_norms_without_statistics_pass():
    module = nn.Linear(4, 4)
    module.register_buffer("window", torch.ones(3), persistent=False)
    module.register_buffer("positions", torch.arange(3))
    norms = (nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm1d(4))
    require_separate_users(Net(module, *norms), "mine")


def test_a_model_that_cannot_fit_is_refused_before_it_is_built():
    with pytest.raises(InputError, match=r"^model: its [\d,]+ parameters take at least .* GiB"):
        build_trainer(small_config(model__dim=65536, model__depth=64, model__mlp_ratio=4.0))


def test_what_is_counted_is_never_more_than_a_process_takes(monkeypatch):
    monkeypatch.setattr(fitness, "_memory", lambda device: ("this machine", 12 * 100 * 3))
    require_memory(100, 3, torch.device("cpu"))
    with pytest.raises(InputError, match=r"in 4 processes, .*or fewer runtime\.workers"):
        require_memory(100, 4, torch.device("cpu"))
    monkeypatch.setattr(fitness, "_memory", lambda device: ("this machine", None))
    require_memory(10**15, 4, torch.device("cpu"))


def test_the_memory_of_this_machine_is_known():
    _, there = fitness._memory(torch.device("cpu"))
    assert there is None or 2**28 < there < 2**50


def test_a_layer_that_waits_for_its_size_is_named_with_what_to_write():
    with pytest.raises(InputError, match=r"leaves the size of block\.0\.weight to .*as in Linear"):
        require_separate_users(Net(nn.Linear(4, 4), nn.LazyLinear(2)), "mine")


def test_the_head_of_a_single_layer_is_asked_for_by_a_pattern_that_matches():
    with pytest.raises(InputError, match=r"patterns .* such as \['bias'\]"):
        built(lambda classes: nn.Linear(4, classes), train="head")
    assert (
        built(lambda classes: nn.Linear(4, classes), train=["bias"]).weight.requires_grad is False
    )
