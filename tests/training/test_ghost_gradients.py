"""Ghost clipping against gradients that are written out, in models and in silos' training."""

import math

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from training.test_example_gradients import CLASSES, images, speech
from training.test_example_level import RATE, RECIPE, SIZE, STEPS, level_of, silo

from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.vit import ViT
from fedpriv.privacy import SPLITS, ExampleLevel, GaussianMechanism, GlobalClipping
from fedpriv.privacy.clipping import PerLayerClipping, clip_and_add
from fedpriv.privacy.outer_products import OuterProducts
from fedpriv.tasks.classification import Classification
from fedpriv.training.example_gradients import GhostGradients, example_gradients
from fedpriv.training.example_level import train_silo
from fedpriv.training.local import LocalTraining

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def small_vit(**options):
    """Wide enough, with 4 tokens, for factors to be fewer than gradients."""
    model = ViT((1, 8, 8), CLASSES, dim=24, depth=2, heads=3, patch=4, **options)
    return model, Classification(), images()


CASES = {
    "vit": small_vit,
    "vit, class token, rmsnorm, peri": lambda: small_vit(
        pooling="class", norm="rmsnorm", norm_placement="peri"
    ),
    "speech": lambda: speech(width=48),
    "speech, rmsnorm, mix": lambda: speech(width=48, norm="rmsnorm", norm_placement="mix"),
}


def taken(hooks, case):
    """Return the gradients of a case's parameters, those written out as `[n, d]`."""
    torch.manual_seed(0)
    model, task, batch = CASES[case]()
    example_gradients(hooks(model, loss_reduction="sum"), task, batch)
    gradients = [p.grad_sample for p in model.parameters()]
    return [g if isinstance(g, OuterProducts) else g.flatten(1) for g in gradients]


def summed(blocks, sizes, rule):
    total = torch.zeros(sum(sizes), dtype=torch.float64)
    return total, clip_and_add(blocks, rule, total)


@pytest.mark.parametrize("case", CASES)
def test_clipped_sums_are_those_of_gradients_that_are_written_out(case):
    expected, found = taken(GradSampleModule, case), taken(GhostGradients, case)
    ghosts = [isinstance(block, OuterProducts) for block in found]
    assert sum(ghosts) > len(ghosts) / 3
    assert not all(ghosts)
    sizes = [block.shape[1] for block in expected]
    norms = torch.stack([block.double().norm(dim=1) for block in expected], dim=1).norm(dim=1)
    for bound, share in (
        (norms.min() / 2, 1),
        (norms.median() * 1.0001, 0.5),
        (norms.max() * 2, 0),
    ):
        flat = GlobalClipping(float(bound))
        per_layer = PerLayerClipping(flat.bound, SPLITS["dim"](flat.bound, sizes))
        for rule in (flat, per_layer):
            total, _ = summed(expected, sizes, rule)
            again, seen = summed(found, sizes, rule)
            assert float((again - total).norm()) < 1e-6 * len(norms) * flat.bound
            if rule is flat:
                shrunk = float((seen.scales[:, 0] < 1).double().mean())
                assert shrunk == pytest.approx(share, abs=0.3)


@pytest.mark.parametrize("case", ["vit", "speech"])
def test_a_silo_trains_as_with_gradients_that_are_written_out(case):
    changes = []
    for hooks in (GradSampleModule, GhostGradients):
        torch.manual_seed(0)
        model, task, examples = CASES[case]()
        start = Layout.of(model).join(parameters_of(model))
        wrapped = hooks(model, loss_reduction="sum")
        level = level_of(GlobalClipping(0.3))
        changes.append(train_silo(wrapped, start, silo(examples), level, RECIPE, task))
    (expected, _, seen), (found, _, ghost) = changes
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert float(found.abs().max()) > 1e-2
    assert ghost.gradients == seen.gradients > 0
    assert ghost.norm == pytest.approx(seen.norm, rel=1e-4)


def test_an_example_that_is_not_finite_adds_nothing_and_spoils_no_other():
    torch.manual_seed(0)
    model, task, good = small_vit()
    spoilt = images()
    spoilt.inputs[2] = torch.nan
    others = good.take(torch.tensor([0, 1, 3, 4, 5]))
    start = Layout.of(model).join(parameters_of(model))
    wrapped = GhostGradients(model, loss_reduction="sum")
    level = ExampleLevel(GaussianMechanism(0.0, GlobalClipping(0.3)), 1.0, STEPS, silo_size=SIZE)
    changes = [
        train_silo(wrapped, start, silo(examples), level, RECIPE, task).change
        for examples in (spoilt, others)
    ]
    torch.testing.assert_close(*changes, rtol=0, atol=1e-6)


def test_a_silo_without_examples_sends_noise_of_full_strength():
    model, task, examples = small_vit()
    nobody = examples.take(torch.tensor([], dtype=torch.int64))
    start = Layout.of(model).join(parameters_of(model))
    wrapped = GhostGradients(model, loss_reduction="sum")
    level = level_of(GlobalClipping(0.3), noise_multiplier=2.0)
    recipe = LocalTraining(steps=STEPS, lr=0.1)
    change, _, seen = train_silo(wrapped, start, silo(nobody), level, recipe, task)
    noise = np.random.default_rng(2)
    drawn = sum(noise.standard_normal(len(start)) for _ in range(STEPS))
    expected = 0.1 * 2.0 * 0.3 * torch.from_numpy(drawn) / (RATE * SIZE)
    assert seen.gradients == 0
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)


def test_large_cancelling_activations_are_clipped_to_the_bound():
    """One example whose two tokens cancel: norms in float32 see nothing of its gradient."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 64, bias=False)
    wrapped = GhostGradients(linear, loss_reduction="sum")
    right = torch.randn(64) * 1e4
    inputs = torch.stack([right, torch.randn(64) - right])[None]
    (wrapped(inputs) * (torch.randn(64) * 1e4)).sum().backward()
    assert isinstance(linear.weight.grad_sample, OuterProducts)
    assert float(linear.weight.grad.norm()) > 1e5
    total, _ = summed([linear.weight.grad_sample], [64 * 64], GlobalClipping(1.0))
    assert math.sqrt(math.fsum(x**2 for x in total.tolist())) <= 1
    assert float(total.norm()) == pytest.approx(1, rel=1e-3)


def test_a_weight_that_is_used_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(64, 64)

        def forward(self, x):
            return self.map(self.map(x))

    wrapped = GhostGradients(Twice(), loss_reduction="sum")
    with pytest.raises(ValueError, match="once"):
        wrapped(torch.randn(2, 64)).sum().backward()
