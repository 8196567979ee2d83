"""Per-example gradients under Opacus against a plain loop over examples."""

import math

import pytest
import torch
from opacus import GradSampleModule

from fedpriv.data.federated import Examples
from fedpriv.data.text import Alphabet
from fedpriv.data.utterances import Utterances
from fedpriv.models.speech import SpeechTransformer
from fedpriv.models.vit import ViT
from fedpriv.privacy import SPLITS, GlobalClipping, PerLayerClipping, Unclipped, clip
from fedpriv.privacy.clipping import clip_and_sum
from fedpriv.tasks.classification import Classification
from fedpriv.tasks.decoding import greedy
from fedpriv.tasks.recognition import Recognition
from fedpriv.training.example_gradients import example_gradients

# Opacus' own: the first layer's input, the data, needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

CLASSES = 5


def images():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(6, 1, 8, 8, generator=generator)
    return Examples(inputs, torch.arange(6) % CLASSES)


def vit(**options):
    return ViT((1, 8, 8), CLASSES, dim=12, depth=2, heads=3, **options), Classification(), images()


def speech(width=12, **options):
    """Four utterances of different lengths, so that three of them are padded."""
    generator = torch.Generator().manual_seed(4)
    model = SpeechTransformer(8000, CLASSES, dim=width, depth=2, heads=3, mels=8, **options)
    lengths = torch.tensor([40, 23, 31, 12])
    features = torch.randn(4, 40, 8, generator=generator)
    batch = Utterances(
        inputs=features * (torch.arange(40) < lengths[:, None])[..., None],  # as the front end pads
        lengths=lengths,
        targets=torch.tensor([[1, 2, 2, 3], [4, 1, 0, 0], [1, 0, 0, 0], [2, 3, 0, 0]]),
        target_lengths=torch.tensor([4, 2, 1, 2]),
    )
    return model, Recognition(Alphabet("abcd"), greedy), batch


CASES = {
    "vit, layernorm": lambda: vit(),
    "vit, class token, rmsnorm, peri": lambda: vit(
        pooling="class", norm="rmsnorm", norm_placement="peri"
    ),
    "speech, layernorm": lambda: speech(),
    "speech, rmsnorm, mix, cape": lambda: speech(
        norm="rmsnorm", norm_placement="mix", positions="cape"
    ),
}


def loop(model, task, batch, rule):
    """The sum of clipped gradients by autograd, one example and one clip at a time."""
    parameters = dict(model.named_parameters())
    total = None
    for index in range(len(batch)):
        losses = task.losses(model, batch.take(torch.tensor([index])))
        gradients = torch.autograd.grad(losses.sum(), list(parameters.values()))
        clipped = clip(dict(zip(parameters, gradients, strict=True)), rule).blocks
        flat = torch.cat([block.flatten().double() for block in clipped.values()])
        total = flat if total is None else total + flat
    return total


def hooked(model, task, batch, rule, mode):
    wrapped = GradSampleModule(model, loss_reduction="sum", force_functorch=mode == "functorch")
    example_gradients(wrapped, task, batch)
    samples = [p.grad_sample for p in wrapped.parameters()]
    rows = torch.cat([sample.flatten(1) for sample in samples], dim=1)
    return clip_and_sum(rows, [p.numel() for p in wrapped.parameters()], rule).total


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("clipping", ["none", "flat", "per layer"])
@pytest.mark.parametrize("case", CASES)
def test_clipped_sums_are_those_of_a_loop_over_examples(case, clipping, mode):
    torch.manual_seed(0)
    model, task, batch = CASES[case]()
    if isinstance(model, SpeechTransformer):
        model.positions.eval()  # CAPE then moves nothing: both ways see the same positions
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    sizes = [p.numel() for p in model.parameters()]
    bound = 0.3
    rule = {
        "none": Unclipped(),
        "flat": GlobalClipping(bound),
        "per layer": PerLayerClipping(bound, SPLITS["dim"](bound, sizes)),
    }[clipping]
    expected = loop(model, task, batch, rule)
    found = hooked(model, task, batch, rule, mode)
    scale = float(expected.norm()) if math.isinf(rule.bound) else len(batch) * rule.bound
    assert float((found - expected).norm()) < 1e-6 * scale


@pytest.mark.parametrize("case", CASES)
def test_an_empty_batch_has_gradients_of_no_example(case):
    model, task, batch = CASES[case]()
    nobody = batch.take(torch.tensor([], dtype=torch.int64))
    wrapped = GradSampleModule(model, loss_reduction="sum")
    example_gradients(wrapped, task, nobody)
    assert all(p.grad_sample.shape == (0, *p.shape) for p in wrapped.parameters())


def test_losses_that_opacus_would_rescale_are_refused():
    model, task, batch = vit()
    with pytest.raises(ValueError, match="loss_reduction"):
        example_gradients(GradSampleModule(model), task, batch)
