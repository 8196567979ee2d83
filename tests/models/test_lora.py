"""Adapters begin as the model that they adapt, and are merged into what they have become."""

import copy
import sys
from importlib.util import find_spec

import pytest
import torch
from in_process import SILOS, small_config
from outside.pretrained import gpt2, timm_vit
from tiny_models import bert, hf_vit, our_gpt, ours, wav2vec2
from torch import nn

from fedpriv.data.federated import Examples
from fedpriv.errors import InputError
from fedpriv.models import lora as adapters
from fedpriv.models.lora import merged
from fedpriv.models.options import ModelOptions
from fedpriv.models.trained_part import freeze_the_rest
from fedpriv.privacy.outer_products import OuterProducts
from fedpriv.tasks.classification import Classification
from fedpriv.training.example_gradients import GRADIENTS, example_gradients

IMAGE, TOKENS = torch.randn(2, 1, 8, 8), torch.randint(2, 5, (2, 6))
MODELS = {
    "ours": (ours, IMAGE),
    "our gpt": (our_gpt, TOKENS),
    "timm": (lambda: timm_vit(3), IMAGE),
    "gpt2": (lambda: gpt2((6,), 5), TOKENS),
    "hf vit": (hf_vit, torch.randn(2, 3, 8, 8)),
    "wav2vec2": (wav2vec2, torch.randn(2, 400)),
    "bert": (bert, TOKENS),
}
VARIANTS = ("lora", "rslora", "dora", "pissa", "eva")


def adapted(make, **options) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    freeze_the_rest(model, ModelOptions(name="mine", train="lora", lora={"r": 2, **options}))
    return model


@torch.no_grad()
def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", sorted(MODELS))
def test_adapters_begin_as_nothing_and_merge_into_what_they_have_become(case, variant):
    make, x = MODELS[case]
    torch.manual_seed(0)
    plain = make().eval()
    model = adapted(make, variant=variant)
    torch.testing.assert_close(outputs(model, x), outputs(plain, x), rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    told = outputs(model, x)
    assert float((told - outputs(plain, x)).abs().max()) > 1e-2
    whole = merged(model)
    torch.testing.assert_close(outputs(whole, x), told, rtol=0, atol=1e-5)
    assert [name for name, _ in whole.named_parameters()] == [
        n for n, _ in plain.named_parameters()
    ]
    torch.testing.assert_close(outputs(model, x), told)  # it has stayed as it was


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_all_linear_maps_but_the_head_are_adapted_and_the_head_is_trained_whole():
    names = trained(adapted(lambda: timm_vit(3, depth=1)))
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {
        *(f"blocks.0.{layer}.lora_{one}.default.weight" for layer in layers for one in "AB"),
        "head.weight",
        "head.bias",
    }
    alone = trained(adapted(lambda: timm_vit(3, depth=1), head=False))
    assert alone == names - {"head.weight", "head.bias"}


def test_maps_are_named_by_the_ends_of_their_names():
    names = trained(adapted(lambda: timm_vit(3), target_modules=["qkv", "0.mlp.fc1"], head=False))
    assert {name.partition(".lora_")[0] for name in names} == {
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
        "blocks.0.mlp.fc1",
    }


def test_scales_are_those_of_the_papers():
    def scale(**options):
        return adapted(ours, **options).embed.scaling["default"]

    assert scale() == 2
    assert scale(r=4, alpha=6) == 1.5
    assert scale(r=4, alpha=6, variant="rslora") == 3


class Attention(nn.Module):
    """torch's own attention, which reads the weights of its maps past any adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.MultiheadAttention(8, 2, batch_first=True)
        self.into, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        return self.head(self.mixed(x, x, x)[0].mean(1))


def test_what_reads_weights_past_an_adapter_gets_none():
    assert {name.partition(".")[0] for name in trained(adapted(Attention))} == {"into", "head"}


class Nameless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (
            ours,
            {"target_modules": ["qvk"]},
            r"^model\.lora\.target_modules: mine has no layer",
        ),
        (ours, {"target_modules": ["head"]}, r"head is the head, which is trained whole"),
        (lambda: gpt2((6,), 5), {"target_modules": ["wte"]}, r"wte has its weights together with"),
        (Nameless, {}, r"is known to be its head; .*; or, .* lora\.head: false"),
        (lambda: nn.Sequential(nn.GroupNorm(2, 4)), {"head": False}, r"has no linear map"),
    ],
)
def test_what_cannot_be_adapted_is_told_in_a_line(make, options, told):
    with pytest.raises(InputError, match=told) as caught:
        adapted(make, **options)
    assert "\n" not in str(caught.value)


def test_without_peft_the_command_is_told(monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"lora needs peft: pip install 'fedpriv\[peft\]'"):
        adapted(ours)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"train": "lora", "lora": {"variant": "qlora"}}, "variant"),
        ({"train": "lora", "lora": {"r": 0}}, "r\n"),
        ({"train": "head", "lora": {"r": 2}}, "write that too"),
    ],
)
def test_options_that_are_none_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        ModelOptions(name="mine", **options)


def test_only_who_adapts_waits_for_peft():
    assert find_spec("peft")
    assert "peft" not in vars(adapters)
    assert "peft" not in vars(sys.modules["fedpriv.models.trained_part"])


@pytest.mark.parametrize("variant", ["lora", "pissa"])
@pytest.mark.parametrize("kind", ["instantiated", "ghost"])
def test_gradients_of_single_examples_are_those_of_autograd(variant, kind):
    model = adapted(ours, variant=variant).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    batch = Examples(IMAGE, torch.tensor([0, 2]))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    expected = [
        torch.autograd.grad(Classification().losses(model, batch)[row], [p for _, p in named])
        for row in range(2)
    ]
    hooked = GRADIENTS[kind](copy.deepcopy(model), loss_reduction="sum")
    example_gradients(hooked, Classification(), batch)
    found = {name.removeprefix("_module."): p for name, p in hooked.named_parameters()}
    for place, (name, _) in enumerate(named):
        gradients = found[name].grad_sample
        if isinstance(gradients, OuterProducts):
            gradients = gradients.left.mT @ gradients.right
        for row in range(2):
            torch.testing.assert_close(gradients[row], expected[row][place], rtol=1e-4, atol=1e-6)


def test_what_opacus_cannot_take_example_by_example_is_refused():
    silos = {**SILOS, "model__train": "lora"}
    small_config(**silos, model__lora={"variant": "pissa"})
    with pytest.raises(InputError, match=r"model\.lora\.variant: dora does not go with privacy"):
        small_config(**silos, model__lora={"variant": "dora"})
