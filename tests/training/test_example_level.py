"""DP-SGD inside a silo against a plain loop over examples with the same coins and noise."""

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from training.test_example_gradients import images, speech, vit

from fedpriv.privacy import (
    SPLITS,
    Adjacency,
    ExampleLevel,
    GaussianMechanism,
    GlobalClipping,
    PerLayerClipping,
    clip,
)
from fedpriv.training.example_level import Silo, train_silo
from fedpriv.training.local import LocalTraining
from fedpriv.training.parameters import Layout, load_parameters, parameters_of

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

RATE, STEPS, SIZE = 0.6, 3, 5
# Two examples at once, so that a sample is taken in several parts.
RECIPE = LocalTraining(steps=STEPS, batch_size=2, lr=0.3, momentum=0.5, proximal_mu=0.2)


def silo(examples):
    return Silo(
        examples=examples,
        sampling=np.random.default_rng(1),
        noise=np.random.default_rng(2),
        augmentation=torch.Generator(),
        round=1,
    )


def level_of(rule, noise_multiplier=0.7, size=SIZE):
    mechanism = GaussianMechanism(noise_multiplier, rule)
    return ExampleLevel(mechanism, RATE, STEPS, silo_size=size)


def plain_loop(model, task, examples, rule, noise_multiplier):
    """The steps as Abadi et al. 2016 write them, then momentum and the pull of FedProx."""
    coins, noise = np.random.default_rng(1), np.random.default_rng(2)
    parameters = dict(model.named_parameters())
    start = torch.cat([p.detach().flatten() for p in parameters.values()]).double()
    now, velocity = start.clone(), torch.zeros_like(start)
    for _ in range(STEPS):
        load_parameters(model, Layout.of(model).split(now.float()))
        total = torch.zeros_like(start)
        for index, coin in enumerate(coins.random(len(examples))):
            if coin < RATE:
                loss = task.losses(model, examples.take(torch.tensor([index]))).sum()
                gradients = torch.autograd.grad(loss, list(parameters.values()))
                clipped = clip(dict(zip(parameters, gradients, strict=True)), rule).blocks
                total += torch.cat([block.flatten() for block in clipped.values()])
        total += noise_multiplier * rule.bound * torch.from_numpy(noise.standard_normal(len(total)))
        gradient = total / (RATE * SIZE) + RECIPE.proximal_mu * (now - start)
        velocity = RECIPE.momentum * velocity + gradient
        now = now - RECIPE.lr * velocity
    return start - now


@pytest.mark.parametrize("clipping", ["flat", "per layer"])
@pytest.mark.parametrize("case", [vit, speech], ids=["vit", "speech"])
def test_a_silo_trains_as_a_plain_loop_over_its_examples(case, clipping):
    torch.manual_seed(0)
    model, task, examples = case()
    layout, bound = Layout.of(model), 0.3
    rule = GlobalClipping(bound)
    if clipping == "per layer":
        rule = PerLayerClipping(bound, SPLITS["dim"](bound, layout.sizes))
    start = layout.join(parameters_of(model))
    expected = plain_loop(model, task, examples, rule, 0.7)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    change, seen = train_silo(wrapped, start, silo(examples), level_of(rule), RECIPE, task)
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)
    assert seen.gradients > 0
    assert float(change.abs().max()) > 1e-2


@pytest.mark.parametrize("drawn", ["empty silo", "nothing drawn"])
def test_a_silo_of_which_nothing_is_drawn_sends_noise_of_full_strength(drawn):
    model, task, examples = vit()
    none = torch.tensor([], dtype=torch.int64)
    kept = examples.take(none) if drawn == "empty silo" else examples
    rate = RATE if drawn == "empty silo" else 1e-12
    mechanism = GaussianMechanism(2.0, GlobalClipping(0.5))
    level = ExampleLevel(mechanism, rate, STEPS, silo_size=SIZE)
    start = Layout.of(model).join(parameters_of(model))
    wrapped = GradSampleModule(model, loss_reduction="sum")
    recipe = LocalTraining(steps=STEPS, lr=0.1 * rate)
    change, _ = train_silo(wrapped, start, silo(kept), level, recipe, task)
    noise = np.random.default_rng(2)
    drawn_noise = sum(noise.standard_normal(len(change)) for _ in range(STEPS))
    expected = 0.1 * 2.0 * 0.5 * torch.from_numpy(drawn_noise) / SIZE
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)


def test_an_example_that_is_not_finite_adds_nothing_and_spoils_no_other():
    model, task, _ = vit()
    good = images()
    spoilt = images()
    spoilt.inputs[2] = torch.nan
    others = good.take(torch.tensor([0, 1, 3, 4, 5]))
    start = Layout.of(model).join(parameters_of(model))
    wrapped = GradSampleModule(model, loss_reduction="sum")
    mechanism = GaussianMechanism(0.0, GlobalClipping(0.3))
    level = ExampleLevel(mechanism, 1.0, STEPS, silo_size=SIZE)
    changes = [
        train_silo(wrapped, start, silo(examples), level, RECIPE, task)[0]
        for examples in (spoilt, others)
    ]
    torch.testing.assert_close(*changes, rtol=0, atol=1e-6)


def test_the_denominator_is_exact_and_public():
    mechanism = GaussianMechanism(1.0, GlobalClipping(1.0))
    assert ExampleLevel(mechanism, 0.3, 1, silo_size=7).denominator(1000) == 0.3 * 7
    own = ExampleLevel(mechanism, 0.3, 1, Adjacency.ZERO_OUT)
    assert own.denominator(7) == 0.3 * 7
    with pytest.raises(ValueError, match="silo_size"):
        ExampleLevel(mechanism, 0.3, 1)
    with pytest.raises(ValueError, match="exchanged"):
        ExampleLevel(mechanism, 0.3, 1, Adjacency.REPLACE_ONE, silo_size=7)
