import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from fedpriv.errors import InputError
from fedpriv.models import MODELS, ViTOptions, build_model, initialise
from fedpriv.models.vit import ViT, patches


def closed_form_size(c: ViTOptions, shape: tuple[int, int, int], classes: int) -> int:
    """The number of parameters, written out from the architecture."""
    channels, height, width = shape
    norm = c.dim * (2 if c.norm == "layernorm" else 1)
    hidden = round(c.dim * c.mlp_ratio)
    attention = 4 * (c.dim * c.dim + c.dim)
    mlp = (c.dim * hidden + hidden) + (hidden * c.dim + c.dim)
    block = attention + mlp + norm * (4 if c.norm_placement == "peri" else 2)
    tokens = height // c.patch * (width // c.patch) + (c.pooling == "class")
    embedding = channels * c.patch**2 * c.dim + c.dim + tokens * c.dim
    final_norm = 0 if c.norm_placement == "post" else norm
    return embedding + c.depth * block + final_norm + c.dim * classes + classes


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("pooling", ["mean", "class"])
@pytest.mark.parametrize("placement", ["pre", "post", "peri", "mix"])
def test_number_of_parameters(placement, pooling, norm):
    config = ViTOptions(
        dim=12,
        depth=5,
        heads=3,
        patch=2,
        mlp_ratio=1.5,
        norm=norm,
        pooling=pooling,
        norm_placement=placement,
    )
    model = build_model(config, (3, 6, 8), 7, seed=0)
    assert sum(p.numel() for p in model.parameters()) == closed_form_size(config, (3, 6, 8), 7)
    assert model(torch.randn(2, 3, 6, 8)).shape == (2, 7)


def test_patches_are_a_strided_convolution():
    convolution = nn.Conv2d(3, 5, kernel_size=2, stride=2).double()
    images = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    linear = F.linear(patches(images, 2), convolution.weight.flatten(1), convolution.bias)
    assert torch.allclose(linear, convolution(images).flatten(2).mT, atol=1e-12)


def test_mean_pooling_without_positions_ignores_the_order_of_patches():
    model = ViT((1, 4, 4), 3, dim=8, depth=2, heads=2)
    images = torch.randn(2, 1, 4, 4)
    turned = torch.cat([images[:, :, 2:], images[:, :, :2]], dim=2)
    assert torch.allclose(model(images), model(turned), atol=1e-5)
    nn.init.normal_(model.positions.weight)
    assert not torch.allclose(model(images), model(turned), atol=1e-5)


def test_class_pooling_reads_the_front_token():
    model = ViT((1, 4, 4), 3, dim=8, depth=1, heads=2, pooling="class").double()
    nn.init.normal_(model.positions.weight)
    images = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    token = torch.zeros(2, 1, 8, dtype=torch.float64)
    tokens = torch.cat([token, model.embed(patches(images, 2))], 1) + model.positions.weight
    assert torch.allclose(model(images), model.head(model.transformer(tokens)[:, 0]), atol=1e-12)


def test_a_seed_fixes_the_parameters_and_leaves_the_global_state():
    config = ViTOptions(dim=16, depth=2)
    before = torch.get_rng_state()
    first = build_model(config, (1, 8, 8), 10, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = build_model(config, (1, 8, 8), 10, seed=5).state_dict()
    other = build_model(config, (1, 8, 8), 10, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in first:
        assert torch.equal(first[name], other[name]) == (first[name].unique().numel() == 1)


def test_initial_scale():
    model = build_model(ViTOptions(dim=256, depth=1), (1, 8, 8), 10, seed=0)
    up = model.transformer.blocks[0].mlp.up.requires_grad_(False)
    # A normal cut at two deviations keeps 0.880 of its standard deviation.
    assert up.weight.std().item() == pytest.approx(0.880 / 16, rel=0.02)
    assert up.weight.abs().max() <= 2 / 16
    assert not up.bias.any()


def test_unknown_layers_keep_the_numbers_of_their_builder():
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1))
    before = [p.detach().clone() for p in model.parameters()]
    initialise(model, seed=0)
    same = [torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)]
    assert same == [False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"dim": 10, "heads": 4}, (1, 8, 8), "model.heads must divide model.dim, got 4"),
        ({"patch": 3}, (1, 8, 9), "model.patch must divide the image's sides, got 3 for 8x9"),
        ({"patch": 3}, (1, 9, 8), "model.patch must divide"),
        ({}, (80, 200), "model.name: vit reads images"),
    ],
)
def test_errors_name_the_key(changes, shape, message):
    with pytest.raises(InputError, match=message) as error:
        build_model(ViTOptions(**changes), shape, 10, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"width": 3}, {"dim": 0}, {"dropout": 1.0}, {"pooling": "max"}, {"norm": "batch"}]
)
def test_the_config_is_strict(changes):
    with pytest.raises(ValidationError):
        ViTOptions(**changes)


def test_every_field_is_described():
    for name in MODELS.registered:
        fields = MODELS.find(name).options.model_fields.values()
        assert all(field.description for field in fields), name
