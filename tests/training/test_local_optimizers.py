"""Optimizers of local training against torch's own, and what each user's begins with."""

import dataclasses
import math

import pytest
import torch
from in_process import SILOS, small_config
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR
from training.test_stacked import Images, flat, trainer_of

from fedpriv import experiment
from fedpriv.data.federated import Examples
from fedpriv.errors import InputError
from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.optimizers.local import (
    LOCAL_OPTIMIZERS,
    SGD,
    LocalOptimizer,
    build_local_optimizer,
)
from fedpriv.optimizers.schedules import LocalScheduleConfig
from fedpriv.tasks.classification import Classification
from fedpriv.training.cohort import train_cohort
from fedpriv.training.local import LocalTraining, train_user

STEPS, LR = 6, 0.03
ADAMW = {"name": "adamw", "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.3}
RMSPROP = {"name": "torch.optim:RMSprop", "alpha": 0.9, "momentum": 0.5}


def built(options: object, momentum: float = 0.0) -> LocalOptimizer:
    return build_local_optimizer(LOCAL_OPTIMIZERS.parse(options), momentum)


#: What a config says, and torch's own.
KNOWN = {
    "sgd": (SGD(), lambda p: torch.optim.SGD(p, lr=LR)),
    "momentum": (built("sgd", 0.9), lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9)),
    "adam": (built("adam"), lambda p: torch.optim.Adam(p, lr=LR)),
    "adam with decay": (
        built({"name": "adam", "weight_decay": 0.2}),
        lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.2),
    ),
    "adamw by default": (built("adamw"), lambda p: torch.optim.AdamW(p, lr=LR)),
    "adamw": (
        built(ADAMW),
        lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3),
    ),
    "from outside": (
        built(RMSPROP),
        lambda p: torch.optim.RMSprop(p, lr=LR, alpha=0.9, momentum=0.5),
    ),
}
SCHEDULES = {
    "constant": (LocalScheduleConfig(), None),
    "linear": (
        LocalScheduleConfig(kind="linear", final_factor=0.25),
        lambda o: LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=STEPS),
    ),
    "cosine": (
        LocalScheduleConfig(kind="cosine"),
        lambda o: CosineAnnealingLR(o, T_max=STEPS),
    ),
}


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("optimizer", sorted(KNOWN))
def test_steps_are_those_of_torch(optimizer, schedule):
    (ours, theirs), (rates, scheduler) = KNOWN[optimizer], SCHEDULES[schedule]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    steps = [
        Examples(torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,)))
        for _ in range(STEPS)
    ]
    start = {name: p.clone() for name, p in parameters_of(model).items()}
    optimizer = theirs(model.parameters())
    falling = scheduler and scheduler(optimizer)
    for batch in steps:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
        if falling:
            falling.step()
    expected = {name: start[name] - p for name, p in parameters_of(model).items()}
    recipe = LocalTraining(optimizer=ours, lr=LR, schedule=rates)
    found = train_user(model, start, steps, recipe, Classification()).update
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(math.isfinite(float(p.sum())) and p.abs().max() > 0 for p in found.values())


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
@pytest.mark.parametrize("optimizer", ["adam", ADAMW, RMSPROP], ids=str)
def test_nothing_that_an_optimizer_remembers_reaches_the_next_user(optimizer, engine):
    config = small_config(local__optimizer=optimizer, local__epochs=2, runtime__engine=engine)
    trainer = build_trainer(config)
    start = Layout.of(trainer.model).join(parameters_of(trainer.model)).clone()

    def sent(*users: int) -> torch.Tensor:
        return train_cohort(trainer, start, users, round_=1).total

    one, two = sent(3), sent(4)
    both = [sent(3, 4), sent(4, 3), train_cohort(
        dataclasses.replace(trainer, stack=1), start, [3, 4], round_=1
    ).total]  # fmt: skip
    for each in both:
        torch.testing.assert_close(each, one + two, rtol=0, atol=1e-6)
    assert sent(3).equal(one)
    assert one.norm() > 0.01


@pytest.mark.parametrize("optimizer", ["momentum", "adam with decay", "adamw"])
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.1, "proximal_mu": 0.3}], ids=str)
def test_the_engines_agree_where_users_take_other_numbers_of_steps(optimizer, more):
    """With a schedule each then has a rate of its own in every step."""
    kind, users = "vit pre layernorm mean", Images((9, 1, 4, 6, 2), dtype=torch.float64)
    cosine = LocalScheduleConfig(kind="cosine")
    recipe = LocalTraining(
        batch_size=2, optimizer=KNOWN[optimizer][0], lr=LR, schedule=cosine, **more
    )
    totals = []
    for engine in ("stacked", "sequential"):
        exact = {"dtype": torch.float64}
        trainer = trainer_of(kind, users, recipe, engine=engine, shape=exact)
        assert (trainer.stacked is None) == (engine == "sequential")
        totals.append(train_cohort(trainer, flat(trainer.model), range(5), round_=1).total)
    torch.testing.assert_close(*totals, rtol=1e-6, atol=1e-8)
    assert totals[0].norm() > 0.01


def test_one_from_outside_trains_users_one_after_another():
    trainer = build_trainer(small_config(local__optimizer=RMSPROP))
    assert trainer.stacked is None
    assert build_trainer(small_config(local__optimizer="adam")).stacked is not None


def closed(params: object, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


WRONG = {
    "an unknown name": ({"optimizer": "adamx"}, r"^local\.optimizer\.name: unknown.*mean adam\?"),
    "an unknown option": ({"optimizer": {"name": "adam", "beta": 1}}, r"^local\.optimizer\.beta: "),
    "beta of 1": ({"optimizer": {"name": "adam", "betas": [0.9, 1]}}, r"^local\.optimizer\.betas"),
    "one beta": ({"optimizer": {"name": "adam", "betas": [0.9]}}, r"^local\.optimizer\.betas"),
    "momentum": ({"optimizer": "adam", "momentum": 0.9}, r"^local: momentum is that of .*sgd"),
    "momentum inside": ({"optimizer": {"name": "sgd", "momentum": 0.9}}, r"write it there$"),
    "a schedule": ({"schedule": {"kind": "cosin"}}, r"^local\.schedule\.kind: "),
    "a final factor": ({"schedule": {"final_factor": 0.1}}, r"^local\.schedule: final_factor"),
    "no such option": (
        {"optimizer": {"name": "torch.optim:RMSprop", "betas": [0.9, 0.9]}},
        r"^local\.optimizer\.betas: unknown key",
    ),
    "a closure": ({"optimizer": "torch.optim:LBFGS"}, r"LBFGS cannot take a step of gradients"),
    "no optimizer": ({"optimizer": "builtins:dict"}, r"^local\.optimizer\.name: "),
    "of others": ({"optimizer": closed}, r"of the params that it is given$"),
    "made already": (
        {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)},
        r"of the params that it is given$",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_one_line(case):
    local, reason = WRONG[case]
    with pytest.raises(InputError, match=reason) as told:
        build_trainer(small_config(**{f"local__{key}": value for key, value in local.items()}))
    assert "\n" not in str(told.value)


def test_what_is_written_of_sgd_leaves_a_run_what_it_was():
    """Its noise derives from the fingerprint: a run of an earlier config goes on with its own."""
    plain = small_config().fingerprint("")
    assert small_config(local__optimizer="sgd").fingerprint("") == plain
    assert small_config(local__optimizer={"name": "sgd"}).fingerprint("") == plain
    others = [
        small_config(**{f"local__{key}": value}).fingerprint("")
        for key, value in [
            ("optimizer", "adam"),
            ("optimizer", {"name": "adam", "eps": 1e-6}),
            ("optimizer", "adamw"),
            ("optimizer", "torch.optim:RMSprop"),
            ("schedule", {"kind": "linear"}),
        ]
    ]
    assert len({plain, *others}) == 6


def test_a_silos_optimizer_costs_nothing():
    costs = [
        experiment.prepare(small_config(**SILOS, **changes)).plan.planned_cost()
        for changes in ({}, {"local__optimizer": ADAMW, "local__schedule": {"kind": "cosine"}})
    ]
    assert costs[0] == costs[1] is not None
