"""DP-SGD inside a silo against a plain loop over examples with the same coins and noise."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from training.test_example_gradients import images, speech, vit

from fedpriv.models.parameters import Layout, load_parameters, parameters_of
from fedpriv.optimizers.local import SGD, Adam
from fedpriv.privacy import (
    SPLITS,
    AdaptiveBounds,
    Adjacency,
    CountNoise,
    ExampleLevel,
    GaussianMechanism,
    GlobalClipping,
    PerLayerClipping,
    clip,
)
from fedpriv.privacy.clipping import bounds_of
from fedpriv.training.example_gradients import GRADIENTS
from fedpriv.training.example_level import Silo, train_silo
from fedpriv.training.local import LocalTraining

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

RATE, STEPS, SIZE = 0.6, 3, 5
# Two examples at once, so that a sample is taken in several parts.
RECIPE = LocalTraining(steps=STEPS, batch_size=2, lr=0.3, optimizer=SGD(0.5), proximal_mu=0.2)


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


def adaptive_level(rule):
    mechanism = GaussianMechanism(0.7, rule, CountNoise(len(bounds_of(rule)), stddev=3.0))
    bounds = AdaptiveBounds(quantile=0.3, lr=2.0)
    return ExampleLevel(mechanism, RATE, STEPS, silo_size=SIZE, adaptive=bounds)


def plain_loop(model, task, examples, rule, noise_multiplier, follow=None):
    """The steps as Abadi et al. 2016 write them, then the pull of FedProx and the optimizer."""
    coins, noise = np.random.default_rng(1), np.random.default_rng(2)
    parameters = dict(model.named_parameters())
    start = torch.cat([p.detach().flatten() for p in parameters.values()]).double()
    now, velocity = start.clone(), torch.zeros_like(start)
    adam = follow and follow([now])
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
        if adam:
            now.grad = gradient
            adam.step()
            continue
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
    trained = train_silo(wrapped, start, silo(examples), level_of(rule), RECIPE, task)
    change, moves, seen = trained
    assert moves == ()
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)
    assert seen.gradients > 0
    assert float(change.abs().max()) > 1e-2


def test_adam_follows_the_noisy_gradient_of_a_silo():
    torch.manual_seed(0)
    model, task, examples = vit()
    layout, rule = Layout.of(model), GlobalClipping(0.3)
    start = layout.join(parameters_of(model))
    betas, decay = (0.8, 0.9), 0.1
    follow = partial(torch.optim.AdamW, lr=RECIPE.lr, betas=betas, weight_decay=decay)
    expected = plain_loop(model, task, examples, rule, 0.7, follow)
    recipe = replace(RECIPE, optimizer=Adam(betas, weight_decay=decay, decoupled=True))
    wrapped = GradSampleModule(model, loss_reduction="sum")
    change = train_silo(wrapped, start, silo(examples), level_of(rule), recipe, task).change
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-5)


def adaptive_loop(model, task, examples, bound, whole):
    """Plain DP-SGD with the bounds of Andrew et al. 2021, algorithm 1, one example at a time.

    Without momentum and FedProx. Returns the change and the bounds at the end.
    """
    coins, noise = np.random.default_rng(1), np.random.default_rng(2)
    parameters = dict(model.named_parameters())
    start = torch.cat([p.detach().flatten() for p in parameters.values()]).double()
    now, layout = start.clone(), Layout.of(model)
    shares = [1.0] if whole else SPLITS["dim"](1.0, layout.sizes)
    bounds = [bound * share for share in shares]
    count = len(bounds)
    for _ in range(STEPS):
        load_parameters(model, layout.split(now.float()))
        total, within = torch.zeros_like(start), [0.0] * count
        for index, coin in enumerate(coins.random(len(examples))):
            if coin >= RATE:
                continue
            loss = task.losses(model, examples.take(torch.tensor([index]))).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            parts = [g.flatten().double() for g in gradients]
            parts = [torch.cat(parts)] if whole else parts
            norms = [float(part.norm()) for part in parts]
            total += torch.cat(
                [
                    p * min(1, c / n) if n else p
                    for p, n, c in zip(parts, norms, bounds, strict=True)
                ]
            )
            within = [
                w + (0.5 if n <= c else -0.5) for w, n, c in zip(within, norms, bounds, strict=True)
            ]
        # The whole release, z = 0.7: what the counts do not use is left for the gradients.
        left = 0.7**-2 - count / (2 * 3.0) ** 2
        sigma = np.sqrt(sum(c**2 for c in bounds)) / np.sqrt(left)
        drawn = noise.standard_normal(len(total) + count)
        total += sigma * torch.from_numpy(drawn[: len(total)])
        now = now - RECIPE.lr * total / (RATE * SIZE)
        fractions = [
            (w + 3.0 * n) / (RATE * SIZE) + 0.5
            for w, n in zip(within, drawn[len(total) :], strict=True)
        ]
        bounds = [c * np.exp(-2.0 * (f - 0.3)) for c, f in zip(bounds, fractions, strict=True)]
    return start - now, bounds


@pytest.mark.parametrize("whole", [True, False], ids=["flat", "per layer"])
@pytest.mark.parametrize(
    ("case", "gradients"),
    [(vit, "instantiated"), (speech, "instantiated"), (speech, "ghost")],
    ids=["vit", "speech", "ghost"],
)
def test_bounds_adapt_within_a_silo_as_in_a_plain_loop(case, gradients, whole):
    torch.manual_seed(0)
    model, task, examples = case()
    layout, bound = Layout.of(model), 0.3
    rule = GlobalClipping(bound)
    if not whole:
        rule = PerLayerClipping(bound, SPLITS["dim"](bound, layout.sizes))
    level, start = adaptive_level(rule), layout.join(parameters_of(model))
    recipe = LocalTraining(steps=STEPS, batch_size=2, lr=RECIPE.lr)
    change, bounds = adaptive_loop(model, task, examples, bound, whole)
    wrapped = GRADIENTS[gradients](model, loss_reduction="sum")
    trained = train_silo(wrapped, start, silo(examples), level, recipe, task)
    # A bound that grows takes its noise with it: changes here are as large as 100.
    torch.testing.assert_close(trained.change, change, rtol=1e-5, atol=1e-6)
    assert np.exp(trained.moves) * bounds_of(rule) == pytest.approx(bounds, rel=1e-9)
    assert max(abs(move) for move in trained.moves) > 0.1


def test_a_silo_known_to_be_empty_sends_noise_and_keeps_its_bounds():
    model, task, examples = vit()
    none = examples.take(torch.tensor([], dtype=torch.int64))
    start = Layout.of(model).join(parameters_of(model))
    wrapped = GradSampleModule(model, loss_reduction="sum")
    public = adaptive_level(GlobalClipping(0.3))
    own = replace(public, silo_size=None, adjacency=Adjacency.ZERO_OUT)
    kept = train_silo(wrapped, start, silo(none), own, RECIPE, task)
    assert kept.moves == (0.0,)
    assert float(kept.change.abs().max()) > 0
    # With a public size nobody may see that there are none: the bounds move by the noise.
    assert train_silo(wrapped, start, silo(none), public, RECIPE, task).moves != (0.0,)


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
    change = train_silo(wrapped, start, silo(kept), level, recipe, task).change
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
        train_silo(wrapped, start, silo(examples), level, RECIPE, task).change
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
