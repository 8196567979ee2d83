"""Local learning rates of single layers: torch's groups of parameters, in every engine; undone."""

import copy
import dataclasses
import math

import pytest
import torch
from in_process import SILOS, small_config, train_small
from opacus import GradSampleModule
from outside.groupnorm_cnn import cnn
from torch import nn
from training.test_example_gradients import vit
from training.test_example_level import RECIPE, level_of, plain_loop, silo
from training.test_local_optimizers import RMSPROP, built
from training.test_stacked import Images
from training.test_vmapped import trainer_of

from fedpriv import experiment
from fedpriv.data.federated import Examples
from fedpriv.errors import InputError
from fedpriv.federation.builders import build_clipping, build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.optimizers.layer_rates import layer_multipliers
from fedpriv.optimizers.local import SGD, Adam
from fedpriv.optimizers.server import Server
from fedpriv.privacy import GlobalClipping, clip_and_sum
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.tasks.classification import Classification
from fedpriv.training.cohort import train_cohort
from fedpriv.training.example_level import train_silo
from fedpriv.training.local import LocalTraining, train_user

TEN = {"multipliers": {"embed*": 10.0, "positions*": 10.0}}
NAMES = ("positions", "embed.weight", "blocks.0.w", "blocks.0.b", "blocks.1.w", "norm.w", "head.w")


def layout_of(config):
    trainer = build_trainer(config)
    return trainer, Layout.of(trainer.model)


@pytest.mark.parametrize(
    ("patterns", "decay", "expected"),
    [
        ({}, None, ()),
        ({"*": 1.0}, 1.0, ()),
        ({"head.*": 3.0, "*.w": 0.5}, None, (1, 1, 0.5, 1, 0.5, 0.5, 1.5)),
        ({}, 0.5, (1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 2, 1, 1)),
        ({"positions": 8.0}, 0.5, (1, 1 / 8, 1 / 4, 1 / 4, 1 / 2, 1, 1)),
    ],
    ids=str,
)
def test_patterns_and_decay_multiply(patterns, decay, expected):
    assert layer_multipliers(patterns, decay, NAMES) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("local", "reason"),
    [
        ({"multipliers": {"heads.*": 2.0}}, r"no parameter that is trained matches 'heads\.\*'"),
        ({"multipliers": {"head.*": 0.0}}, r"local\.multipliers"),
    ],
    ids=str,
)
def test_what_names_nothing_or_stands_still_is_refused(local, reason):
    with pytest.raises(InputError, match=reason):
        build_trainer(small_config(local={"batch_size": 4, **local}))


@pytest.mark.parametrize(
    ("local", "reason"),
    [
        (
            {"layer_decay": 1e-200},
            r"local\.layer_decay: embed.weight would learn at 0 times the rate",
        ),
        ({"layer_decay": 1e-7}, r"embed.weight would learn at 1e-14 times"),
        ({"multipliers": {"*" * n: 1e6 for n in range(1, 4)}}, r"multipliers: .* at 1e\+18 times"),
        (
            {"multipliers": {f"{'*' * n}embed.weight": 1e-6 for n in range(60)}},
            r"local\.multipliers: embed.weight would learn at 0 times .*write what comes",
        ),
    ],
    ids=["a layer's", "nearly", "too fast", "of many patterns"],
)
def test_a_rate_that_no_arithmetic_undoes_is_refused(local, reason):
    with pytest.raises(InputError, match=reason):
        build_trainer(small_config(local={"batch_size": 4, **local}))


def test_layers_without_numbers_cannot_decay():
    with pytest.raises(InputError, match="no layer of this model has a number"):
        layer_multipliers({}, 0.5, ["embed.weight", "head.weight"])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(), lambda groups: torch.optim.SGD(groups, lr=0.03)),
        (SGD(0.9), lambda groups: torch.optim.SGD(groups, lr=0.03, momentum=0.9)),
        (
            Adam(weight_decay=0.3, decoupled=True),
            lambda groups: torch.optim.AdamW(groups, lr=0.03, weight_decay=0.3),
        ),
        (
            built(RMSPROP),
            lambda groups: torch.optim.RMSprop(groups, lr=0.03, alpha=0.9, momentum=0.5),
        ),
    ],
    ids=["sgd", "momentum", "adamw", "from outside"],
)
def test_steps_are_those_of_torchs_groups_of_parameters(ours, theirs):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    factors = (10.0, 3.0, 1.0, 0.25)
    steps = [
        Examples(torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,)))
        for _ in range(4)
    ]
    start = {name: p.clone() for name, p in parameters_of(model).items()}
    groups = [
        {"params": [p], "lr": 0.03 * m} for p, m in zip(model.parameters(), factors, strict=True)
    ]
    optimizer = theirs(groups)
    for batch in steps:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
    expected = {name: start[name] - p for name, p in parameters_of(model).items()}
    recipe = LocalTraining(optimizer=ours, lr=0.03, multipliers=factors)
    found = train_user(model, start, steps, recipe, Classification()).update
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", {"name": "adamw", "eps": 0.1}], ids=str)
@pytest.mark.parametrize("more", [{}, {"proximal_mu": 0.2}], ids=str)
def test_the_engines_agree(optimizer, more):
    plain = {"optimizer": optimizer, "epochs": 2, "batch_size": 4, "lr": 0.01, **more}
    local = {**plain, **TEN, "layer_decay": 0.5, "schedule": {"kind": "cosine"}}
    totals = []
    for engine in ("stacked", "sequential"):
        trainer, layout = layout_of(small_config(local=local, runtime__engine=engine, privacy=None))
        start = layout.join(parameters_of(trainer.model))
        totals.append(train_cohort(trainer, start, [3, 7, 11, 20], round_=1).total)
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-6)
    trainer, layout = layout_of(small_config(local=plain, privacy=None))
    start = layout.join(parameters_of(trainer.model))
    other = train_cohort(trainer, start, [3, 7, 11, 20], round_=1).total
    assert (other - totals[0]).norm() > 0.1 * other.norm()


def test_vmap_takes_the_same_steps():
    torch.manual_seed(3)
    model, users = cnn((1, 8, 8), 3), Images((5, 4, 6, 3, 5, 4, 6, 3))
    factors = tuple(1.0 + place for place in range(len(list(model.parameters()))))
    recipe = LocalTraining(epochs=2, batch_size=4, lr=0.05, multipliers=factors)
    trainer = trainer_of(model, users, Classification(), recipe)
    start = Layout.of(model).join(parameters_of(model)).clone()
    together = train_cohort(trainer, start, range(8), round_=1).total
    own = copy.deepcopy(model)
    alone = dataclasses.replace(trainer, vmapped=None, engine="sequential", model=own)
    torch.testing.assert_close(
        train_cohort(alone, start, range(8), round_=1).total, together, rtol=1e-4, atol=1e-6
    )


def test_a_silo_moves_its_layers_by_its_noisy_gradient_times_their_rates():
    torch.manual_seed(0)
    model, task, examples = vit()
    layout, rule = Layout.of(model), GlobalClipping(0.3)
    factors = tuple(1.0 + place % 3 for place in range(len(layout.sizes)))
    rates = torch.cat(
        [torch.full((d,), m).double() for d, m in zip(layout.sizes, factors, strict=True)]
    )

    class Rated(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            (now,) = self.param_groups[0]["params"]
            now -= RECIPE.lr * rates * now.grad

    start = layout.join(parameters_of(model))
    expected = plain_loop(model, task, examples, rule, 0.7, Rated)
    recipe = dataclasses.replace(RECIPE, optimizer=SGD(), multipliers=factors)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    change = train_silo(wrapped, start, silo(examples), level_of(rule), recipe, task).change
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-5)


def test_runs_that_say_nothing_of_layers_keep_their_name():
    plain, told = small_config(), small_config(local__multipliers={}, local__layer_decay=None)
    assert plain.fingerprint("x") == told.fingerprint("x")
    assert plain.fingerprint("x") != small_config(local={"batch_size": 4, **TEN}).fingerprint("x")


# ---------------------------------------------------------------- undone


UNDONE = {
    "local": {**TEN, "epochs": 1, "batch_size": 4, "lr": 0.1},
    "privacy__clipping": {"kind": "global", "bound": 0.1, "undo": True},
}


@pytest.mark.parametrize("kind", ["global", "per_layer"])
def test_an_update_is_divided_clipped_and_multiplied_again(kind):
    config = small_config(**{**UNDONE, "privacy__clipping__kind": kind})
    trainer, layout = layout_of(config)
    multipliers = layer_multipliers(TEN["multipliers"], None, layout.names)
    generator = torch.Generator().manual_seed(2)
    updates = (
        torch.randn(9, layout.total, generator=generator) * 10.0 ** torch.arange(-7, 2)[:, None]
    )
    each = torch.cat([torch.full((d,), m) for d, m in zip(layout.sizes, multipliers, strict=True)])
    as_it_is = {"privacy__clipping__undo": False, "privacy__clipping__kind": kind}
    plain = build_clipping(small_config(**{**UNDONE, **as_it_is}), layout)
    expected = clip_and_sum(updates.double() / each, layout.sizes, plain)
    found = clip_and_sum(updates, layout.sizes, trainer.clipping)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-9, atol=1e-15)
    for row in updates:
        assert float(clip_and_sum(row[None], layout.sizes, trainer.clipping).total.norm()) <= 0.1
    assert 0 < int((expected.scales.min(1).values == 1).sum()) < 9
    server = experiment.build_server(
        small_config(**{**UNDONE, "server": {"optimizer": "sgd", "lr": 1.0}}),
        trainer.model,
        Server,
    )
    before = server.parameters()
    server.step(expected.total, 1, seed=0)
    torch.testing.assert_close(before - server.parameters(), (each * expected.total).float())


def test_without_a_bite_of_the_bound_undoing_changes_nothing(tmp_path):
    wide = {
        **UNDONE,
        "privacy__sampling": {"kind": "all"},
        "privacy__noise_multiplier": 0.0,
        "privacy__clipping__bound": 1e6,
    }
    _, one = train_small(tmp_path / "undone", **wide, rounds=2)
    _, other = train_small(tmp_path / "not", **{**wide, "privacy__clipping__undo": False}, rounds=2)
    torch.testing.assert_close(one.server.parameters(), other.server.parameters())


def test_a_run_says_that_multipliers_are_undone(tmp_path):
    directory, _ = train_small(tmp_path / "run", **UNDONE, rounds=2)
    rows = directory.read_metrics()
    for row in rows:
        seen = row["simulation_only"]
        assert math.fsum(seen["block_shares"].values()) == pytest.approx(1.0)
        assert all(0 < each <= 1 + 1e-9 for each in seen["block_coherence"].values())
    text = render([directory.path], "md")
    assert "divided by the public multiplier of its learning rate, is clipped as a whole" in text
    assert read_run(directory.path).config.privacy.clipping.undo


def test_shares_and_coherence_are_those_of_the_users_alone(tmp_path):
    changes = {**UNDONE, "rounds": 1, "privacy__sampling": {"kind": "all"}}
    directory, _ = train_small(tmp_path / "run", **changes)
    trainer, layout = layout_of(small_config(**changes))
    start = layout.join(parameters_of(trainer.model)).clone()
    sent, shares = [], torch.zeros(len(layout.sizes), dtype=torch.float64)
    m = layer_multipliers(TEN["multipliers"], None, layout.names)
    bare = dataclasses.replace(trainer, clipping=GlobalClipping(1e9))
    for user in range(60):
        moved = train_cohort(bare, start, [user], round_=1).total
        blocks = [b / f for b, f in zip(moved.split(layout.sizes), m, strict=True)]
        norms = torch.stack([block.norm() for block in blocks])
        shares += (norms / norms.norm()) ** 2 / 60
        scale = min(1.0, 0.1 / float(norms.norm()))
        sent.append([block * scale for block in blocks])
    seen = directory.read_metrics()[0]["simulation_only"]
    assert list(seen["block_shares"].values()) == pytest.approx(shares.tolist(), rel=1e-4)
    coherent = [
        float(sum(each).norm() / sum(block.norm() for block in each))
        for each in zip(*sent, strict=True)
    ]
    found = seen["block_coherence"]
    for name, expected in zip(layout.names, coherent, strict=True):
        # A key's bias has no gradient but for rounding.
        assert name.endswith("attention.k.bias") or found[name] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (SILOS, "the gradients of examples are not multiplied"),
        ({"privacy__error_feedback": {"kind": "user"}}, "what error_feedback keeps"),
        ({"privacy__clipping__kind": "per_layer", "privacy__noise": "per_block"}, "and undo"),
        ({"algorithm": {"name": "scaffold", "bounds": {"control": 1.0}}}, r"local\.multipliers"),
    ],
    ids=["silos", "memories", "noise", "scaffold"],
)
def test_what_undoing_does_not_go_with_is_refused(changes, reason):
    with pytest.raises(InputError, match=reason):
        build_trainer(small_config(**{**changes, **UNDONE, **changes}))
