"""SCAFFOLD against its paper's equations in plain PyTorch, and what its two payloads cost."""

import dp_accounting
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dp_accounting.rdp import RdpAccountant
from in_process import SILOS, BreaksIn, resume_small, small_config, train_small
from scipy import stats

from fedpriv import experiment
from fedpriv.errors import InputError
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.registry import build_model
from fedpriv.privacy import (
    GaussianMechanism,
    GlobalClipping,
    Ledger,
    PayloadClipping,
    PerLayerClipping,
    Purpose,
    Randomness,
    clip_and_sum,
)
from fedpriv.privacy.randomness import id_words
from fedpriv.reporting.ledgers import verify
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.reporting.spent import spent
from fedpriv.training.local import batches
from fedpriv.training.memory_store import Journal, Memories

LR = 0.2
PLAIN = {
    "rounds": 3,
    "algorithm": {"name": "scaffold"},
    "local": {"epochs": 1, "batch_size": 2, "lr": LR},
    "server": {"optimizer": "sgd", "lr": 1.0},
    "privacy": None,
    "cohort": 10.0,
}
PRIVATE = {
    "rounds": 3,
    "algorithm": {"name": "scaffold", "bounds": {"control": 0.5}},
    "local": {"steps": 2, "batch_size": 4, "lr": 0.1},
}


def parameters(prepared):
    return prepared.server.parameters().double()


def by_the_paper(prepared, rounds):
    """Algorithm 1, option II, with η_g = 1: every user alone, in float64."""
    config, dataset = prepared.config, prepared.trainer.dataset
    model = build_model(config.model, dataset.input_shape, dataset.classes, config.seed).double()
    layout, source = Layout.of(model), Randomness.simulation(config.seed)
    x, n = layout.join(parameters_of(model)), dataset.population
    c, own = torch.zeros_like(x), torch.zeros(n, len(x), dtype=torch.float64)
    for round_ in range(1, rounds + 1):
        generator = prepared.plan.randomness.numpy(Purpose.SAMPLING, round_, 0)
        drawn = prepared.plan.sampling.draw(generator).tolist()
        moved, changed = torch.zeros_like(x), torch.zeros_like(x)
        for user in drawn:
            y, steps, examples = x.clone(), 0, dataset.user(user)
            order = source.torch(Purpose.LOCAL_TRAINING, round_, 0, *id_words(f"user-{user}"))
            shared = source.torch(Purpose.STEP_ORDER, round_)
            for index in batches(examples.sizes, prepared.trainer.recipe, order, shared):
                y.requires_grad_()
                inputs = examples.inputs[index].double()
                outputs = torch.func.functional_call(model, layout.split(y), inputs)
                loss = F.cross_entropy(outputs, examples.targets[index])
                (gradient,) = torch.autograd.grad(loss, y)
                y = y.detach()
                y = y - LR * (gradient - own[user] + c)
                steps += 1
            plus = own[user] - c + (x - y) / (steps * LR)
            moved, changed = moved + (y - x), changed + (plus - own[user])
            own[user] = plus
        cohort = prepared.plan.sampling.expected_cohort
        x = x + moved / cohort
        c = c + cohort / n * changed / cohort
    return x, c, own


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_rounds_are_those_of_the_paper(tmp_path, engine):
    _, prepared = train_small(tmp_path / "run", **PLAIN, runtime__engine=engine)
    x, c, own = by_the_paper(prepared, 3)
    torch.testing.assert_close(parameters(prepared), x, rtol=1e-6, atol=1e-6)
    # Differences of parameters, divided by Kη, are known to as many digits less.
    torch.testing.assert_close(prepared.server.shared[0].double(), c, rtol=1e-4, atol=1e-5)
    assert c.norm() > 0.01
    assert own.norm(dim=1).count_nonzero() > 15


def test_it_differs_from_fedavg_from_the_second_round_on(tmp_path):
    ends = []
    for name in ("scaffold", "fedavg"):
        for rounds in (1, 2):
            changes = {**PLAIN, "algorithm": {"name": name}, "rounds": rounds}
            # One fingerprint draws one cohort: the same users in both.
            changes |= {"cohort": None}
            ends.append(parameters(train_small(tmp_path / f"{name}{rounds}", **changes)[1]))
    torch.testing.assert_close(ends[0], ends[2])
    assert (ends[1] - ends[3]).norm() > 1e-4


def test_a_resumed_run_goes_on_with_every_control(tmp_path):
    settings = {**PRIVATE, "checkpoint__keep": 9}
    whole, prepared = train_small(tmp_path / "whole", **settings)
    train_small(tmp_path / "run", **{**settings, "rounds": 3})
    assert prepared.server.shared.norm() > 0
    with pytest.raises(RuntimeError, match="crash"):
        train_small(tmp_path / "other", BreaksIn(3), **settings)
    _, resumed = resume_small(tmp_path / "other")
    assert parameters(resumed).equal(parameters(prepared))
    assert resumed.server.shared.equal(prepared.server.shared)
    assert list(Ledger.open(tmp_path / "other" / "ledger.jsonl")) == list(Ledger.open(whole.ledger))


# ---------------------------------------------------------------- what it costs


def test_two_payloads_are_one_release_and_the_ledger_rebuilds_its_cost(tmp_path):
    directory, prepared = train_small(tmp_path / "run", **PRIVATE)
    event = dp_accounting.PoissonSampledDpEvent(8 / 60, dp_accounting.GaussianDpEvent(1.0))
    epsilon = RdpAccountant().compose(event, 3).get_epsilon(1e-3)
    for release in Ledger.open(directory.ledger):
        assert [name for name, _, _ in release.payloads] == ["model", "control"]
        assert [bound for _, bound, _ in release.payloads] == [0.1, 0.5]
        inverse = sum((bound / stddev) ** 2 for _, bound, stddev in release.payloads)
        assert inverse == pytest.approx(1.0)
        assert release.event().event.noise_multiplier == pytest.approx(1.0, rel=1e-10)
    account = spent(read_run(directory.path))
    assert account.disagreements == ()
    assert account.epsilons["rdp"] == pytest.approx(epsilon, rel=1e-9)
    assert verify(directory.path).bill.first.epsilon_rdp == pytest.approx(epsilon, rel=1e-9)
    text = render([directory.path], "md")
    assert "SCAFFOLD (Karimireddy et al. 2020)" in text
    assert "control with C = 0.5 and σ = 0.7071" in text
    assert prepared.plan.planned_cost().epsilon == pytest.approx(epsilon, rel=1e-9)


def test_a_record_cannot_claim_more_noise_than_its_payloads_show(tmp_path):
    directory, _ = train_small(tmp_path / "run", **{**PRIVATE, "rounds": 1})
    (release,) = Ledger.open(directory.ledger)
    (model, control) = release.payloads
    quieter = type(release)(
        **{**vars(release), "payloads": (model, (control[0], control[1], control[2] / 2))}
    )
    assert quieter.event().event.noise_multiplier == pytest.approx((1 / 2 + 2) ** -0.5)


def test_each_payload_gets_the_noise_of_its_own_bound(tmp_path):
    sizes, rule = (
        [20_000, 20_000],
        PayloadClipping(("model", "control"), (PerLayerClipping(0.3, (0.3,)), GlobalClipping(2.0))),
    )
    mechanism = GaussianMechanism(1.5, rule)
    noise = mechanism.noise(sizes, np.random.default_rng(0))
    for part, bound in zip(noise.split(sizes), (0.3, 2.0), strict=True):
        low, high = stats.chi2.interval(1 - 1e-7, len(part))
        assert low < float((part / (1.5 * 2**0.5 * bound)).square().sum()) < high


@pytest.mark.parametrize("large", [1e-3, 1.0, 1e6, float("nan")])
def test_no_payload_is_ever_above_its_bound(large):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, 60, generator=generator)
    rows[:, 30:] *= large
    rule = PayloadClipping(
        ("model", "control"), (PerLayerClipping(0.5, (0.3, 0.4)), GlobalClipping(0.2))
    )
    total = clip_and_sum(rows, [10, 20, 10, 20], rule).total
    assert total[:30].norm() <= 0.5
    assert total[30:].norm() <= 0.2
    if large != large:
        assert total.count_nonzero() == 0


def test_controls_move_by_what_is_sent_so_that_the_servers_is_their_mean(tmp_path):
    """Without noise, with everybody in every round, and with nearly everything clipped."""
    changes = {
        **PRIVATE,
        "privacy__noise_multiplier": 0.0,
        "privacy__sampling": {"kind": "all"},
        "algorithm": {"name": "scaffold", "bounds": {"control": 0.01}},
    }
    directory, prepared = train_small(tmp_path / "run", **changes)
    with Memories(directory.memory, 2**20).round(Journal(9, 0, 0, 0)) as memories:
        kept = memories.read(range(60)).double()
    shared = prepared.server.shared[0].double()
    torch.testing.assert_close(kept.mean(0), shared, rtol=1e-4, atol=1e-7)
    assert 0.005 < float(kept.norm(dim=1).max()) <= 3 * 0.01 * (1 + 1e-5)


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "fixed size": ({"privacy__sampling": {"kind": "fixed_size", "expected_cohort": 8}}, "fixed"),
    "nodes": ({"privacy__noise_by": "nodes"}, "noise_by: nodes"),
    "users": ({"privacy__noise_by": "users"}, "noise_by: users"),
    "silos": ({**SILOS, "local": {"steps": 2, "lr": 0.1}}, "unit: example"),
    "adaptive": ({"privacy__clipping": {"kind": "adaptive", "bound": 0.1}}, "adaptive"),
    "memories": ({"privacy__error_feedback": "user"}, "error_feedback: user"),
    "correlated": (
        {"privacy__mechanism": {"kind": "correlated", "bands": 2}},
        "mechanism.kind: correlated",
    ),
    "per block": ({"privacy__noise": "per_block"}, "per_block"),
    "deployment": ({"runtime__deployment": True}, "no store for it"),
    "no bound": ({"algorithm": {"name": "scaffold"}}, r"each payload .*\(control\)"),
    "bound alone": ({"algorithm": {"bounds": {"control": 1.0}}}, "there are none"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_proof_is_refused_with_the_reason(changes, reason):
    with pytest.raises(InputError, match=reason):
        small_config(**{**PRIVATE, **changes})


@pytest.mark.parametrize(
    "local",
    [
        {"momentum": 0.9},
        {"max_grad_norm": 1.0},
        {"proximal_mu": 0.1},
        {"schedule": {"kind": "linear"}},
        {"optimizer": "adam"},
        {"optimizer": "torch.optim:SGD"},
    ],
    ids=str,
)
def test_local_steps_that_are_not_plain_are_refused(local):
    config = small_config(**{**PRIVATE, "local": {**PRIVATE["local"], **local}})
    with pytest.raises(InputError, match=f"does not go with local.{next(iter(local))}"):
        experiment.prepare(config)
