"""DiceSGD as an Opacus optimizer."""

import copy
import math

import opacus
import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedpriv.optimizers.dice_sgd import DiceSGD
from fedpriv.privacy import GlobalClipping, PerLayerClipping, PoissonSampling
from fedpriv.privacy.dice import DiceMechanism
from fedpriv.privacy.dice_accounting import dice_epsilon

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]

N, BATCH, CLASSES = 60, 12.0, 3


def data():
    generator = torch.Generator().manual_seed(5)
    x = 3 * torch.randn(N, 4, generator=generator)
    return x, torch.arange(N) % CLASSES


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def rules(kind, model, bound):
    if kind == "flat":
        return GlobalClipping(bound)
    count = len(list(model.parameters()))
    return PerLayerClipping(bound, (bound / math.sqrt(count),) * count)


def mechanism(kind, model, z=0.0, c1=0.4, c2=0.3):
    return DiceMechanism(
        PoissonSampling(N, BATCH), z, rules(kind, model, c1), rules(kind, model, c2)
    )


def dice_on(model, dice, inner=torch.optim.SGD, **options):
    wrapped = GradSampleModule(model)
    return wrapped, DiceSGD(inner(model.parameters(), lr=0.3), mechanism=dice, **options)


def backward(model, x, y):
    nn.functional.cross_entropy(model(x), y).backward()


def clipped(blocks, kind, bound):
    """min(1, C/‖g‖)·g in plain float64, over all blocks or in each."""
    if kind == "flat":
        norm = math.sqrt(sum(float(b.square().sum()) for b in blocks))
        return [b * min(1.0, bound / norm) if norm else b for b in blocks]
    share = bound / math.sqrt(len(blocks))
    return [b * min(1.0, share / float(b.norm())) if float(b.norm()) else b for b in blocks]


@pytest.mark.parametrize("kind", ["flat", "per layer"])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adam])
def test_steps_are_those_of_a_plain_loop_over_examples(kind, inner):
    x, y = data()
    model, reference = network(), network()
    dice = mechanism(kind, model)
    wrapped, optimizer = dice_on(model, dice, inner)
    plain = inner(reference.parameters(), lr=0.3)
    e = [torch.zeros(p.shape, dtype=torch.float64) for p in reference.parameters()]
    for first, last in ((0, 9), (9, 9), (9, 30), (30, 31)):  # one batch is empty
        optimizer.zero_grad()
        backward(wrapped, x[first:last], y[first:last])
        optimizer.step()
        v, whole = clipped(e, kind, 0.3), [torch.zeros_like(b) for b in e]
        for i in range(first, last):
            loss = nn.functional.cross_entropy(reference(x[i : i + 1]), y[i : i + 1])
            g = [b.double() for b in torch.autograd.grad(loss, list(reference.parameters()))]
            v = [a + b / BATCH for a, b in zip(v, clipped(g, kind, 0.4), strict=True)]
            whole = [a + b / BATCH for a, b in zip(whole, g, strict=True)]
        e = [a + b - c for a, b, c in zip(e, whole, v, strict=True)]
        for p, gradient in zip(reference.parameters(), v, strict=True):
            p.grad = gradient.float()
        plain.step()
        flat = torch.cat([b.flatten() for b in e])
        # Adam divides by the gradient's size, and so enlarges what rounding left.
        tolerance = 2e-5 if inner is torch.optim.Adam else 2e-6
        assert float((optimizer.memory - flat).norm()) < tolerance
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance)
    assert float(optimizer.memory.norm()) > 0.3  # the memory was clipped too


def test_without_memory_it_is_opacus_own_dp_sgd():
    x, y = data()
    results = []
    for make in (
        lambda m: dice_on(
            m, mechanism("flat", m, 1.5, c2=0.0), generator=torch.Generator().manual_seed(1)
        ),
        lambda m: (
            GradSampleModule(m),
            DPOptimizer(
                torch.optim.SGD(m.parameters(), lr=0.3),
                noise_multiplier=1.5,
                max_grad_norm=0.4,
                expected_batch_size=BATCH,
                generator=torch.Generator().manual_seed(1),
            ),
        ),
    ):
        model = network()
        wrapped, optimizer = make(model)
        for first in (0, 20, 40):
            optimizer.zero_grad()
            backward(wrapped, x[first : first + 20], y[first : first + 20])
            optimizer.step()
        results.append(torch.cat([p.flatten() for p in model.parameters()]).detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_noise_has_the_stated_size_and_the_memory_never_sees_it(reduction):
    model = nn.Linear(100, 50)
    x, y = torch.zeros(0, 100), torch.zeros(0, dtype=torch.int64)
    dice = mechanism("flat", model, z=2.0)
    wrapped = GradSampleModule(model, loss_reduction=reduction)
    optimizer = DiceSGD(
        torch.optim.SGD(model.parameters(), lr=1.0), mechanism=dice, loss_reduction=reduction
    )
    before = model.weight.detach().clone()
    nn.functional.cross_entropy(wrapped(x), y, reduction=reduction).backward()
    optimizer.step()
    moved = (model.weight - before).detach()
    stddev = dice.stddev * (BATCH if reduction == "sum" else 1)
    assert float(moved.std()) == pytest.approx(stddev, rel=0.05)  # 5000 draws: 1 % is one sigma
    assert dice.stddev == pytest.approx(2.0 * 0.4 / BATCH)
    assert float(optimizer.memory.abs().max()) == 0


def test_physical_batches_of_a_step_add_up():
    x, y = data()
    states = []
    for parts in ([30], [13, 10, 7], [30, 0]):
        model = network()
        wrapped, optimizer = dice_on(model, mechanism("flat", model))
        for step in range(2):
            first = 30 * step
            for index, size in enumerate(parts):
                optimizer.zero_grad()
                optimizer.signal_skip_step(index < len(parts) - 1)
                # The mean over a physical batch: Opacus undoes it.
                backward(wrapped, x[first : first + size], y[first : first + size])
                optimizer.step()
                first += size
        assert optimizer.steps == 2
        states.append((optimizer.memory, *(p.detach() for p in model.parameters())))
    for other in states[1:]:
        for one, two in zip(states[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_a_nan_gradient_counts_as_zero():
    x, y = data()
    x[2, 1] = math.nan
    model, other = network(), network()
    wrapped, optimizer = dice_on(model, mechanism("flat", model))
    clean, expected = dice_on(other, mechanism("flat", other))
    backward(wrapped, x[:5], y[:5])
    optimizer.step()
    kept = [0, 1, 3, 4]
    backward(clean, x[kept], y[kept])
    expected.step()
    assert (optimizer.non_finite, expected.non_finite) == (1, 0)
    torch.testing.assert_close(optimizer.memory, expected.memory, rtol=1e-5, atol=1e-7)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_state_dict_carries_the_memory_and_the_steps():
    x, y = data()

    def trained(optimizer, wrapped, batches):
        for first in batches:
            optimizer.zero_grad()
            backward(wrapped, x[first : first + 10], y[first : first + 10])
            optimizer.step()

    model, other = network(), network()
    dice = mechanism("flat", model)
    wrapped, optimizer = dice_on(model, dice, torch.optim.Adam)
    trained(optimizer, wrapped, (0, 10))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    trained(optimizer, wrapped, (20, 30))

    again, resumed = dice_on(other, dice, torch.optim.Adam)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    trained(resumed, again, (20, 30))
    assert resumed.steps == optimizer.steps == 4
    assert resumed.memory.equal(optimizer.memory)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.equal(q)
    with pytest.raises(ValueError, match="state dict"):
        resumed.load_state_dict(torch.optim.Adam(other.parameters()).state_dict())


def engine_with(clipping="flat", bound=0.5, **options):
    x, y = data()
    model = network()
    engine = PrivacyEngine(accountant="rdp")
    parts = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=7),
        noise_multiplier=3.0,
        max_grad_norm=bound,
        clipping=clipping,
        **options,
    )
    return engine, *parts


@pytest.mark.parametrize(
    ("clipping", "bound"), [("flat", 0.5), ("per_layer", [0.1, 0.2, 0.1, 0.4])]
)
@pytest.mark.parametrize("accounting", ["provable", "published"])
def test_in_opacus_engine_its_epsilon_becomes_dice_sgds(clipping, bound, accounting):
    engine, model, dp, loader = engine_with(clipping, bound)
    optimizer = DiceSGD.in_engine(engine, dp, loader, memory_norm=0.001, accounting=accounting)
    dice = optimizer.mechanism
    assert dice.sampling.probability == pytest.approx(loader.sample_rate)
    assert dice.batch == pytest.approx(N * loader.sample_rate)  # and not its whole part
    norms = [bound] if clipping == "flat" else bound
    assert dice.examples.bound == pytest.approx(math.hypot(*norms))
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
    ) as parts:
        for x, y in parts:
            optimizer.zero_grad()
            backward(model, x, y)
            optimizer.step()
    assert optimizer.steps == len(loader) == len(engine.accountant)
    expected = dice_epsilon(dice, len(loader), 1e-3, accounting)
    assert engine.get_epsilon(1e-3) == expected.epsilon
    assert optimizer.privacy_spent(1e-3, accounting) == expected
    assert accounting in engine.accountant.mechanism()
    assert ("not proved" in engine.accountant.mechanism()) == (accounting == "published")
    saved = engine.accountant.state_dict()
    fresh = type(engine.accountant)(dice)
    fresh.load_state_dict(saved)
    assert fresh.get_epsilon(1e-3) == expected.epsilon


def test_a_bound_on_gradients_reaches_the_mechanism():
    engine, _, dp, loader = engine_with("per_layer", [0.1, 0.2, 0.1, 0.4])
    dice = DiceSGD.in_engine(engine, dp, loader, memory_norm=0.1, gradient_norm=2.0).mechanism
    assert dice.gradients.bound == pytest.approx(2.0)
    assert dice.memory.bound == pytest.approx(0.1)
    assert dice.residual_bound < math.inf


def test_what_would_be_accounted_wrongly_is_refused():
    engine, _, dp, loader = engine_with()
    with pytest.raises(ValueError, match="Poisson"):
        DiceSGD.in_engine(engine, dp, DataLoader(loader.dataset), memory_norm=0.1)
    engine.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(ValueError, match="already"):
        DiceSGD.in_engine(engine, dp, loader, memory_norm=0.1)
    engine, _, adaptive, loader = engine_with(
        "adaptive",
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=1.0,
        min_clipbound=0.1,
        unclipped_num_std=2.0,
    )
    with pytest.raises(ValueError, match="AdaClip"):
        DiceSGD.in_engine(engine, adaptive, loader, memory_norm=0.1)
    model = network()
    _, optimizer = dice_on(model, mechanism("flat", model))
    hook = opacus.accountants.RDPAccountant().get_optimizer_hook_fn(sample_rate=0.1)
    with pytest.raises(ValueError, match="DP-SGD"):
        optimizer.attach_step_hook(hook)


def test_a_step_that_is_not_the_mechanisms_is_refused():
    x, y = data()
    model = network()
    wrapped, optimizer = dice_on(model, mechanism("flat", model, z=1.0))
    backward(wrapped, x[:5], y[:5])
    backward(wrapped, x[5:9], y[5:9])
    with pytest.raises(ValueError, match="backward"):
        optimizer.step()
    optimizer.zero_grad()
    backward(wrapped, x[:5], y[:5])
    optimizer.noise_multiplier = 0.5
    with pytest.raises(ValueError, match="fixed"):
        optimizer.step()
    optimizer.noise_multiplier = 1.0
    optimizer.step()
    with pytest.raises(ValueError, match="cleared"):
        optimizer.step()
    assert optimizer.steps == 1
