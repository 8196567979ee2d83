import io
import math

import pytest
import torch
from torch import nn

from fedpriv.errors import InputError
from fedpriv.optimizers.registry import (
    UNSUITABLE,
    _all_optimizers,
    available_optimizers,
    optimizer_options,
    server_optimizer,
    state_types,
)
from fedpriv.optimizers.schedules import scale_learning_rates

SHAPES = [(6, 4), (6,), (3, 2, 5), (3, 6), (3,)]
NAMED_IN_THE_DESIGN = [
    "sgd",
    "adam",
    "adamw",
    "adagrad",
    "rmsprop",
    "lamb",
    "lars",
    "adamp",
    "adabelief",
    "diffgrad",
    "stablespam",
    "sgdsai",
    "apollo",
    "fira",
    "conda",
    "exadam",
    "muon",
]


def parameters() -> list[nn.Parameter]:
    """Two linear layers and a convolution's kernel."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def step(optimizer, params, number: int) -> None:
    torch.manual_seed(number)
    generator = torch.Generator().manual_seed(100 + number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def saved(optimizer) -> dict:
    """The state dict after a trip through a file that loads no code."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals(state_types()):
        return torch.load(buffer, weights_only=True)


def build(name: str, params, lr=0.01, **options):
    return server_optimizer(name, params, lr, options)


def test_the_promised_optimizers_are_available():
    assert set(NAMED_IN_THE_DESIGN) <= set(available_optimizers())
    assert available_optimizers() == sorted(available_optimizers())
    assert set(UNSUITABLE) <= set(_all_optimizers()), "an exclusion of something that is not there"


@pytest.mark.parametrize("name", available_optimizers())
def test_two_steps_change_the_parameters(name):
    params, start = parameters(), parameters()
    optimizer = build(name, params)
    for number in range(2):
        step(optimizer, params, number)
    assert all(torch.isfinite(p).all() for p in params)
    assert any(not torch.equal(p, q) for p, q in zip(params, start, strict=True))


@pytest.mark.parametrize("name", available_optimizers())
def test_a_restored_optimizer_goes_on_bit_for_bit(name):
    params = parameters()
    optimizer = build(name, params)
    for number in range(2):
        step(optimizer, params, number)
    other = [nn.Parameter(p.detach().clone()) for p in params]
    restored = build(name, other)
    restored.load_state_dict(saved(optimizer))
    for number in range(2, 4):
        step(optimizer, params, number)
        step(restored, other, number)
    assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True))


@pytest.mark.parametrize("name", available_optimizers())
def test_the_learning_rate_can_be_scheduled(name):
    params, halved = parameters(), parameters()
    optimizer, slower = build(name, params), build(name, halved)
    # grokfastadamw makes up for its amplified gradients by a third of the rate.
    expected = 0.01 / 3 if name == "grokfastadamw" else 0.01
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(expected)
    scale_learning_rates(slower, 0.5)
    assert slower.param_groups[0]["lr"] == pytest.approx(expected / 2)
    for number in range(2):
        step(optimizer, params, number)
        step(slower, halved, number)
    assert any(not torch.equal(p, q) for p, q in zip(params, halved, strict=True))


@pytest.mark.parametrize("name", ["LAMB", "SGD-SaI", "stable_spam", "AdaBelief"])
def test_names_ignore_case_and_separators(name):
    optimizer = build(name, parameters())
    assert type(optimizer).__name__.lower() == name.lower().replace("-", "").replace("_", "")


def test_torch_comes_first():
    assert isinstance(build("adam", parameters()), torch.optim.Adam)
    assert isinstance(build("rmsprop", parameters()), torch.optim.RMSprop)
    assert isinstance(build("radam", parameters()), torch.optim.RAdam)


def lamb_step(theta, g, lr, eps, betas=(0.9, 0.999)):
    """Algorithm 2 of You et al. (2020), first step, bias correction and all, φ the identity."""
    m = (1 - betas[0]) * g / (1 - betas[0])
    v = (1 - betas[1]) * g * g / (1 - betas[1])
    delta = m / (v.sqrt() + eps)
    return theta - lr * theta.norm() / delta.norm() * delta


@pytest.mark.parametrize("foreach", [True, False])
def test_first_step_of_lamb_is_the_papers(foreach):
    params = parameters()
    with torch.no_grad():
        params[0].mul_(100)  # far above the library's cap of 10 on the weight norm
    start = [p.detach().clone() for p in params]
    step(build("lamb", params, lr=0.02, eps=1e-12, foreach=foreach), params, 0)
    for p, q in zip(params, start, strict=True):
        assert torch.allclose(p, lamb_step(q, p.grad, 0.02, 1e-12), rtol=1e-5, atol=1e-6)


def test_first_step_of_lamb_has_the_papers_length_at_the_default_eps():
    params, start = parameters(), parameters()
    step(build("lamb", params, lr=0.02), params, 0)
    for p, q in zip(params, start, strict=True):
        assert (p - q).norm().item() == pytest.approx(0.02 * q.norm().item(), rel=1e-4)
        assert torch.allclose(p, lamb_step(q, p.grad, 0.02, 1e-6), atol=1e-3)


@pytest.mark.parametrize("foreach", [True, False])
def test_later_steps_of_lamb_with_decay(foreach):
    """Three rounds against the formula in `server_optimizer`, with the decay under the ratio."""
    params = [p.requires_grad_() for p in parameters()]
    theta = [p.detach().clone() for p in params]
    m, v = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
    optimizer = build("lamb", params, lr=0.1, weight_decay=0.3, eps=1e-8, foreach=foreach)
    for number in range(3):
        step(optimizer, params, number)
        for h, p in enumerate(params):
            m[h] = 0.9 * m[h] + 0.1 * p.grad
            v[h] = 0.999 * v[h] + 0.001 * p.grad**2
            delta = m[h] / (v[h].sqrt() + 1e-8) + 0.3 * theta[h]
            theta[h] = theta[h] - 0.1 * theta[h].norm() / delta.norm() * delta
            assert torch.allclose(p, theta[h], rtol=1e-4, atol=1e-5)


def test_lamb_does_not_see_the_scale_of_the_update():
    one, thousand = parameters(), parameters()
    first, second = build("lamb", one, eps=1e-12), build("lamb", thousand, eps=1e-12)
    for p, q in zip(one, thousand, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = 1000 * p.grad
    first.step()
    second.step()
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(one, thousand, strict=True))


@pytest.mark.parametrize("name", ["muon", "adamuon", "normuon", "adago"])
def test_muon_takes_the_matrices_and_adam_the_rest(name):
    optimizer = build(name, parameters(), lr=0.02, adamw_lr=0.003)
    matrices, others = optimizer.param_groups
    assert [p.ndim for p in matrices["params"]] == [2, 2]
    assert [p.ndim for p in others["params"]] == [1, 3, 1]
    assert (matrices["initial_lr"], others["initial_lr"]) == (0.02, 0.003)
    assert len(build(name, parameters()[1:3]).param_groups) == 1


@pytest.mark.parametrize("name", ["fira", "galore"])
def test_projecting_optimizers_do_project(name):
    params = parameters()
    optimizer = build(name, params, rank=2, update_proj_gap=2, projection_type="right")
    for number in range(3):
        step(optimizer, params, number)
    assert optimizer.state[params[0]]["exp_avg"].shape == (6, 2)
    assert optimizer.state[params[2]]["exp_avg"].shape == (3, 2, 5)
    build(name, parameters())


def test_lists_from_a_config_become_tuples():
    assert build("adam", parameters(), betas=[0.8, 0.9]).defaults["betas"] == (0.8, 0.9)
    assert build("qhadam", parameters(), nus=[0.5, 1]).defaults["nus"] == (0.5, 1)


@pytest.mark.parametrize(
    ("name", "lr", "options", "message"),
    [
        ("lambb", 0.1, {}, r"server\.optimizer: unknown optimizer 'lambb'; did you mean lamb"),
        (
            "zzzzzz",
            0.1,
            {},
            r"server\.optimizer: unknown optimizer 'zzzzzz'; write the name of one",
        ),
        ("LBFGS", 0.1, {}, r"server\.optimizer: LBFGS cannot be the server's, it evaluates"),
        ("sgd", 0.1, {"momentun": 1}, r"server\.options\.momentun: .*it takes .*momentum, nest"),
        ("lamb", 0.1, {"beta": 1}, r"server\.options\.beta: lamb has no such option, .*betas"),
        ("sgd", 0.1, {"lr": 1}, r"server\.options\.lr: "),
        ("sgd", 0.1, {"maximize": True}, r"server\.options\.maximize: "),
        ("adam", 0.1, {"eps": "small"}, r"server\.options\.eps: .*got 'small'"),
        ("adam", 0.1, {"eps": 1e-8, "betas": [2, 0.9]}, r"server\.options\.betas: adam refuses"),
        ("lamb", 0.1, {"betas": [0.9, 2]}, r"server\.options\.betas: lamb refuses"),
        ("sgd", 0.1, {"nesterov": True, "dampening": 0.1}, r"server\.options\.nesterov: "),
        ("adam", -1.0, {"eps": 1e-8}, r"server\.lr: adam refuses -1\.0"),
        ("lamb", -1.0, {}, r"server\.lr: lamb refuses -1\.0"),
        ("conda", 0.1, {"projection_type": "up"}, r"server\.options\.projection_type: "),
    ],
)
def test_errors_name_the_key(name, lr, options, message):
    with pytest.raises(InputError, match=message) as error:
        server_optimizer(name, parameters(), lr, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", available_optimizers())
def test_options_can_be_listed(name):
    options = optimizer_options(name)
    assert not {"params", "lr", "kwargs", "maximize"} & set(options)
    assert options


def test_steps_without_a_gradient_scale():
    """A silent round (zero update) must not move LAMB to NaN."""
    params = parameters()
    optimizer = build("lamb", params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(math.isfinite(p.norm().item()) for p in params)
