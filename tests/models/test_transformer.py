import math
import warnings

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from fedpriv.models import Attention, Block, Transformer, ViTOptions, build_model
from fedpriv.models.transformer import block_placements

PLACEMENTS = ["pre", "post", "peri", "mix"]
NORMS = ["layernorm", "rmsnorm"]


def perturbed(module: nn.Module, seed: int = 3) -> nn.Module:
    """Make biases and norms non-trivial, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def config(**changes) -> ViTOptions:
    return ViTOptions(**({"dim": 8, "depth": 4, "heads": 2, "patch": 2, "mlp_ratio": 2} | changes))


def test_attention_equals_torch_multihead_attention():
    ours = perturbed(Attention(12, 3)).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.weight.copy_(ours.o.weight)
        theirs.out_proj.bias.copy_(ours.o.bias)
    x = torch.randn(4, 7, 12, dtype=torch.float64)
    valid = torch.rand(4, 7) < 0.6
    valid[:, 0] = True
    expected, _ = theirs(x, x, x, key_padding_mask=~valid)
    assert torch.allclose(ours(x, valid), expected, atol=1e-12)
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-12)


def test_attention_equals_a_written_out_loop():
    attention = perturbed(Attention(6, 2)).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    q, k, v = attention.q(x)[0], attention.k(x)[0], attention.v(x)[0]
    rows = []
    for t in range(5):
        heads = []
        for h in (slice(0, 3), slice(3, 6)):
            weights = torch.stack([q[t, h] @ k[s, h] / math.sqrt(3) for s in range(5)]).softmax(0)
            heads.append(sum(weights[s] * v[s, h] for s in range(5)))
        rows.append(attention.o(torch.cat(heads)))
    assert torch.allclose(attention(x)[0], torch.stack(rows), atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", ["pre", "post", "peri"])
def test_block_follows_the_formula_of_its_placement(placement, norm):
    block = perturbed(Block(8, 2, 2.0, placement, norm)).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)

    def mlp(y):
        return block.mlp.down(F.gelu(block.mlp.up(y)))

    expected = x
    for f, residual in (
        (block.attention, block.attention_residual),
        (mlp, block.mlp_residual),
    ):
        if placement == "pre":
            expected = expected + f(residual.norm(expected))
        elif placement == "post":
            expected = residual.norm(expected + f(expected))
        else:
            expected = expected + residual.norm_out(f(residual.norm(expected)))
    assert torch.allclose(block(x), expected, atol=1e-12)
    kind = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[norm]
    assert sum(isinstance(m, kind) for m in block.modules()) == (4 if placement == "peri" else 2)


@pytest.mark.parametrize(("depth", "post"), [(1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (36, 9)])
def test_mix_makes_the_first_quarter_post(depth, post):
    assert block_placements("mix", depth) == ["post"] * post + ["pre"] * (depth - post)
    stack = Transformer(8, depth, 2, norm_placement="mix")
    assert [b.mlp_residual.placement for b in stack.blocks] == block_placements("mix", depth)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_stack_leaves_normalised_tokens(placement):
    tokens = Transformer(16, 4, 2, norm_placement=placement)(torch.randn(2, 3, 16))
    assert torch.allclose(tokens.mean(-1), torch.zeros(2, 3), atol=1e-5)
    assert torch.allclose(tokens.var(-1, unbiased=False), torch.ones(2, 3), atol=1e-2)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_padding_is_neutral(placement):
    stack = perturbed(Transformer(8, 4, 2, norm_placement=placement)).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    valid = torch.arange(6) < torch.tensor([[4], [6]])
    garbage = torch.where(valid[..., None], x, 1e3 * torch.randn_like(x))
    assert torch.allclose(stack(x, valid)[valid], stack(garbage, valid)[valid], atol=1e-12)
    alone = stack(x[:1, :4])
    assert torch.allclose(stack(x, valid)[0, :4], alone[0], atol=1e-12)


def test_dropout_acts_in_training_only():
    block = Block(8, 2, dropout=0.5)
    x = torch.randn(2, 3, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("pooling", ["mean", "class"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_vmap_over_parameters_equals_a_loop(placement, norm, pooling):
    settings = config(norm_placement=placement, norm=norm, pooling=pooling)
    users = [perturbed(build_model(settings, (1, 4, 4), 3, seed)).double() for seed in range(3)]
    parameters, _ = stack_module_state(users)
    images = torch.randn(3, 5, 1, 4, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        stacked = vmap(lambda p, x: functional_call(users[0], p, (x,)))(parameters, images)
    for user, model in enumerate(users):
        assert torch.allclose(stacked[user], model(images[user]), atol=1e-12)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("pooling", ["mean", "class"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_opacus_example_gradients_equal_a_loop(placement, norm, pooling):
    settings = config(norm_placement=placement, norm=norm, pooling=pooling)
    model = perturbed(build_model(settings, (1, 4, 4), 3, seed=1)).double()
    images, labels = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    expected = [
        grad(loss)(start, image, label) for image, label in zip(images, labels, strict=True)
    ]
    hooked = GradSampleModule(model, loss_reduction="sum")
    F.cross_entropy(hooked(images), labels, reduction="sum").backward()
    for name, p in hooked._module.named_parameters():
        assert torch.allclose(p.grad_sample, torch.stack([e[name] for e in expected]), atol=1e-10)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bfloat16_and_meta(placement):
    model = build_model(config(norm_placement=placement), (1, 4, 4), 3, seed=1)
    images = torch.randn(2, 1, 4, 4)
    half = model.bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.isfinite(half).all()
    with torch.device("meta"):
        large = build_model(config(dim=1024, depth=24, heads=16, patch=16), (3, 224, 224), 1000, 1)
        assert large(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert all(p.is_meta for p in large.parameters())
