"""What of a model is trained, found by each library's own convention or by names."""

import pytest
import timm
import torch
from tiny_models import bert, hf_vit, our_gpt, ours, wav2vec2
from torch import nn
from torchvision.models import convnext_tiny, resnet18, vgg11, vit_b_16

from fedpriv.errors import InputError
from fedpriv.models.options import ModelOptions
from fedpriv.models.trained_part import freeze_the_rest, frozen_of, head_of

HEADS = {
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), ["head"]),
    "timm two": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1),
        ["head", "head_dist"],
    ),
    "torchvision resnet": (resnet18, ["fc"]),
    "torchvision vgg": (vgg11, ["classifier.6"]),
    "torchvision convnext": (convnext_tiny, ["classifier.2"]),
    "torchvision vit": (vit_b_16, ["heads.head"]),
    "transformers vit": (hf_vit, ["classifier"]),
    "transformers bert": (bert, ["classifier.dense", "classifier.out_proj"]),
    "transformers ctc": (wav2vec2, ["lm_head"]),
    "ours": (ours, ["head"]),
    "our gpt": (our_gpt, ["head"]),
}


@pytest.mark.parametrize("case", sorted(HEADS))
def test_the_head_is_the_last_layer_by_the_librarys_own_convention(case):
    make, layers = HEADS[case]
    with torch.device("meta"):
        model = make()
    assert head_of(model, case) == [f"{each}.{n}" for each in layers for n in ("weight", "bias")]


def test_a_head_that_is_not_known_is_asked_for_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(InputError, match=r"^model\.train: mine has no layer .* \['2\.\*'\]"):
        head_of(model, "mine")
    without = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, img_size=16)
    with pytest.raises(InputError, match=r"^model\.train: timm has no layer .* \['norm\.\*'\]"):
        head_of(without, "timm")


def test_patterns_choose_parameters_and_one_that_matches_nothing_is_told():
    model = ours()
    freeze_the_rest(model, ModelOptions(name="vit", train=["head.*", "*.bias"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in model.named_parameters() if name.endswith("bias") or "head." in name
    }
    assert frozen_of(model).keys() == {name for name, _ in model.named_parameters()} - trained
    with pytest.raises(InputError, match=r"no parameter matches 'haed\.\*'; .* head\.") as refused:
        freeze_the_rest(ours(), ModelOptions(name="vit", train=["head.*", "haed.*"]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wanted", ["haed", [], [1], 3, {"head": 1}])
def test_what_is_neither_a_word_nor_patterns_is_told(wanted):
    with pytest.raises(ValueError, match="write all, head, lora, or patterns"):
        ModelOptions(name="vit", train=wanted)


def test_constants_belong_to_what_is_not_trained():
    model = ours()
    assert frozen_of(model) == {}
    model.register_buffer("window", torch.ones(3))
    freeze_the_rest(model, ModelOptions(name="vit", train="head"))
    assert "window" in frozen_of(model)
    assert not {"head.weight", "head.bias"} & frozen_of(model).keys()
