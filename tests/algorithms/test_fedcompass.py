"""Silos that arrive in groups: the schedule, the steps, and what each silo pays."""

import json
import random
from collections import Counter
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dp_accounting.rdp import RdpAccountant
from in_process import SILOS, BreaksIn, InProcessGrid, resume_small, small_config, train_small
from typer.testing import CliRunner

from fedpriv.algorithms.fedcompass import Compass
from fedpriv.cli import app
from fedpriv.errors import BudgetError, InputError, WorkerLost
from fedpriv.experiment import prepare
from fedpriv.federation.builders import build_algorithm
from fedpriv.models.parameters import Layout
from fedpriv.models.registry import build_model
from fedpriv.privacy import Adjacency, Ledger, PayerAccounts, most_charged, read_ledger
from fedpriv.privacy.ledger import _seal
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render, write_report
from fedpriv.reporting.spent import spent

SECONDS = [1.0, 1.0, 2.0, 3.0, 4.0, 8.0]
COMPASS = {
    **SILOS,
    "rounds": 12,
    "algorithm": {"name": "fedcompass", "seconds": SECONDS, "min_steps": 1, "staleness": 0.7},
    "local__steps": 4,
    "privacy__sampling": {"kind": "all"},
}


def parameters(prepared):
    return prepared.server.parameters().double()


def taken(turns):
    """How many steps each silo has taken."""
    steps = Counter()
    for turn in turns:
        steps.update(dict(zip(turn.silos, turn.steps, strict=True)))
    return steps


def by_dp_accounting(steps):
    accountant = RdpAccountant()
    if steps:
        gaussian = dp_accounting.GaussianDpEvent(1.0)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(0.5, gaussian), steps)
    return accountant.get_epsilon(1e-3) if steps else 0.0


# ---------------------------------------------------------------- the schedule


def test_two_silos_of_which_one_is_twice_as_fast_meet_by_the_papers_rules():
    """By hand. Silo 0 comes at 4 alone, begins a group of four more steps, and comes at 8; begins
    another. Silo 1, which comes at 8 too, can be at 12 with it after two steps: so it goes on."""
    found = Compass((1.0, 2.0), fewest=1, most=4, latest=1.5).arrivals(6)
    assert [(a.seconds, a.silos, a.steps, a.stale) for a in found] == [
        (4, (0,), (4,), (0,)),
        (8, (0,), (4,), (0,)),
        (8, (1,), (4,), (2,)),
        (12, (0, 1), (4, 2), (1, 0)),
        (16, (0, 1), (4, 2), (0, 0)),
        (20, (0, 1), (4, 2), (0, 0)),
    ]


def test_a_silo_that_can_join_nobody_is_timed_for_the_fastest_of_another_group():
    """By hand, Q_min = 3, λ = 2. At 10 silo 1, with steps of 2.5, has no time for one until 12. The
    other group, which began at 8 and is there at 16 at the latest, may be there again at 20, after
    four steps more: so silo 1 takes (20 - 10)/2.5 = 4, and meets it. Where its steps take 2 it
    would be (18 - 8)/2 = 5 with λ = 1.5, more than Q_max, which it takes."""
    near = Compass((1.0, 2.5), fewest=3, most=4, latest=2.0).arrivals(6)
    assert [(a.seconds, a.silos, a.steps) for a in near[2:]] == [
        (10, (1,), (4,)),
        (12, (0,), (4,)),
        (16, (0,), (4,)),
        (20, (0, 1), (4, 4)),
    ]
    far = Compass((1.0, 2.0), fewest=3, most=4, latest=1.5).arrivals(5)
    assert [(a.seconds, a.silos, a.steps) for a in far[2:]] == [
        (8, (1,), (4,)),
        (12, (0,), (4,)),
        (16, (0, 1), (4, 4)),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_schedule_keeps_its_bounds(seed):
    drawn = random.Random(seed)
    seconds = tuple(drawn.uniform(0.1, 10) for _ in range(drawn.randint(1, 8)))
    fewest = drawn.randint(1, 20)
    most = drawn.randint(fewest, 100)
    compass = Compass(seconds, fewest, most, drawn.choice([1.0, 1.2, 2.0]))
    found = compass.arrivals(80)
    assert found[:30] == compass.arrivals(30)
    assert [a.seconds for a in found] == sorted(a.seconds for a in found)
    began = dict.fromkeys(range(len(seconds)), (0.0, 0))
    for number, arrival in enumerate(found, start=1):
        here = zip(arrival.silos, arrival.steps, arrival.stale, strict=True)
        for silo, steps, stale in here:
            assert fewest <= steps <= most
            since, round_ = began[silo]
            # Done before the group is complete, and no step more would have fitted in.
            spare = arrival.seconds - since - steps * seconds[silo]
            assert -1e-6 <= spare <= max(seconds) + 1e-6
            assert stale == number - 1 - round_
            began[silo] = (arrival.seconds, number)


# ---------------------------------------------------------------- the rounds


def by_the_paper(prepared, rate, exponent):
    """Each silo alone, from the very model that it was sent, with every example in each step."""
    config, dataset = prepared.config, prepared.trainer.dataset
    model = build_model(config.model, dataset.input_shape, dataset.classes, config.seed).double()
    layout = Layout.of(model)
    models, began = [parameters(prepare(config))], {}
    for turn in build_algorithm(config).turns(config.rounds, 4):
        total = torch.zeros_like(models[0])
        for silo, steps in zip(turn.silos, turn.steps, strict=True):
            examples, x = dataset.user(silo), models[began.get(silo, 0)]
            y = x.clone()
            for _ in range(steps):
                y = y.detach().requires_grad_()
                outputs = torch.func.functional_call(
                    model, layout.split(y), examples.inputs.double()
                )
                loss = F.cross_entropy(outputs, examples.targets, reduction="sum") / 6
                y = y - config.local.lr * torch.autograd.grad(loss, y)[0]
            stale = len(models) - 1 - began.get(silo, 0)
            total += (1 + stale) ** -exponent * (x - y.detach())
        began |= dict.fromkeys(turn.silos, len(models))
        models.append(models[-1] - rate * total / len(SECONDS))
    return models[-1]


def test_rounds_are_those_of_the_paper(tmp_path):
    settings = {
        **COMPASS,
        "server__lr": 0.9,
        "privacy__noise_multiplier": 0.0,
        "privacy__clipping__bound": 1e4,
        "privacy__example": {"sampling_rate": 1.0, "silo_size": 6},
    }
    _, prepared = train_small(tmp_path / "run", **settings)
    expected = by_the_paper(prepared, 0.9, 0.7)
    torch.testing.assert_close(parameters(prepared), expected, rtol=1e-5, atol=1e-6)
    assert (expected - parameters(prepare(prepared.config))).norm() > 0.1
    # Some were stale, and of many silos more than one came.
    turns = build_algorithm(prepared.config).turns(12, 4)
    assert max(max(turn.stale) for turn in turns) > 2
    assert max(len(turn.silos) for turn in turns) > 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("compass") / "run", **COMPASS)


@pytest.mark.parametrize("broken", [4, 8])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(whole, tmp_path, broken):
    directory, prepared = whole
    with pytest.raises(RuntimeError, match="crash"):
        train_small(tmp_path / "run", BreaksIn(broken), **COMPASS)
    again, resumed = resume_small(tmp_path / "run")
    assert parameters(resumed).equal(parameters(prepared))
    assert list(Ledger.open(again.ledger)) == list(Ledger.open(directory.ledger))


def test_metrics_say_the_virtual_time(whole):
    directory, prepared = whole
    turns = build_algorithm(prepared.config).turns(12, 4)
    assert [row["virtual_seconds"] for row in directory.read_metrics()] == [
        turn.seconds for turn in turns
    ]


# ---------------------------------------------------------------- what it costs


def test_each_silo_pays_for_the_steps_that_it_took(whole):
    directory, prepared = whole
    turns = build_algorithm(prepared.config).turns(12, 4)
    for number, row in enumerate(directory.read_metrics(), start=1):
        assert row["silos"]["took_part"] == list(turns[number - 1].silos)
        steps = taken(turns[:number])
        each = [by_dp_accounting(steps[silo]) for silo in range(6)]
        assert row["epsilon"]["rdp"] == pytest.approx(max(each), rel=1e-9)
        assert row["silos"]["median"] == pytest.approx(np.median(each), rel=1e-9)
    account = spent(read_run(directory.path))
    assert account.disagreements == ()
    assert account.epsilons["rdp"] == pytest.approx(max(each), rel=1e-9)
    assert prepared.plan.planned_cost().epsilon == pytest.approx(max(each), rel=1e-9)


def test_the_target_is_for_the_silo_with_most_steps_by_pld_too(tmp_path):
    settings = {
        **COMPASS,
        "privacy__noise_multiplier": None,
        "privacy__target_epsilon": 8.0,
        "privacy__budget": {"epsilon": 8.0},
        "privacy__accountants": ["rdp", "pld"],
    }
    directory, _ = train_small(tmp_path / "run", **settings)
    account = spent(read_run(directory.path))
    assert account.disagreements == ()
    assert 7.99 < account.epsilons["pld"] <= 8.0
    assert len(Ledger.open(directory.ledger)) == 12
    more = {**settings, "privacy__budget": {"epsilon": 6.0}}
    with pytest.raises(BudgetError, match="above the budget of 6"):
        train_small(tmp_path / "less", **more)
    made = len(Ledger.open(tmp_path / "less" / "ledger.jsonl"))
    assert made == prepare(small_config(**more)).plan.affordable_rounds()
    assert 0 < made < 12


def test_silos_of_a_node_that_died_pay_for_their_turn(tmp_path):
    with pytest.raises(WorkerLost, match="died in round 2"):
        train_small(tmp_path / "run", InProcessGrid(dead=[1]), **COMPASS)
    turns = build_algorithm(small_config(**COMPASS)).turns(2, 4)
    charged = list(Ledger.open(tmp_path / "run" / "ledger.jsonl"))
    assert [(each.silos, each.turns) for each in charged] == [(t.silos, t.steps) for t in turns]


def test_the_statement_says_that_it_is_a_schedule(whole):
    text = render([whole[0].path], "md")
    assert "each with some of 6 silos" in text
    assert "is a schedule that was made before the run from public numbers alone" in text
    assert "at most 4 steps a round" in text
    assert "for the steps that it took" in text
    assert "FedCompass (Li et al. 2024)" in text
    for false in ("drawn anew", "rounds in which it was drawn", "all of 6 silos"):
        assert false not in text


def test_the_worst_is_the_silo_with_most_steps_and_is_billed_for_its_own(whole):
    """Not the one of the longest rounds, nor that of most rounds."""
    first = next(iter(Ledger.open(whole[0].ledger)))
    releases = [
        replace(first, round=1, silos=(0, 1, 2), turns=(4, 3, 1)),
        replace(first, round=2, silos=(1, 2), turns=(3, 1)),
        replace(first, round=3, silos=(2,), turns=(1,)),
    ]
    worst = most_charged(releases)
    assert [(each.round, each.event().count) for each in worst] == [(1, 3), (2, 3)]
    accounts = PayerAccounts(Adjacency.ADD_OR_REMOVE_ONE, 6)
    accounts.charge_all(releases)
    expected = [by_dp_accounting(steps) for steps in (4, 6, 3, 0, 0, 0)]
    np.testing.assert_allclose(accounts.epsilons(1e-3), expected, rtol=1e-9)


def test_no_figure_or_table_says_that_all_were_expected(whole, tmp_path):
    page = write_report([whole[0].path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Silos on a schedule come when it is their turn" in page
    assert "dropped out" not in page
    found = CliRunner().invoke(app, ["ledger", "show", str(whole[0].path)])
    (row,) = [line for line in found.output.splitlines() if line.strip().startswith("1–12")]
    assert row.split() == ["1–12", "12", "0", "some", "0.1", "1", "schedule"]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: {**body, "turns": body["turns"][1:]},
        lambda body: {**body, "turns": [0] * len(body["turns"])},
        lambda body: {**body, "turns": [5] * len(body["turns"])},
        lambda body: {k: v for k, v in body.items() if k != "turns"},
        lambda body: {**body, "turns": [3.5] * len(body["turns"])},
        lambda body: {**body, "turns": [True] * len(body["turns"])},
        lambda body: {**body, "turns": "4" * len(body["turns"])},
        lambda body: {**body, "silos": [], "turns": []},
        lambda body: {**body, "silos": [6], "turns": [4]},
        lambda body: {**body, "silos": [0, 0], "turns": [4, 4]},
        lambda body: {**body, "steps": "x"},
    ],
    ids=[
        *("fewer", "none", "more than the most", "untold", "halves", "truth", "text", "nobody"),
        *("nobody that is there", "one twice", "no number"),
    ],
)
def test_a_ledger_that_says_other_steps_than_a_schedule_can_have_is_refused(
    whole, tmp_path, change
):
    lines = [json.loads(line) for line in whole[0].ledger.read_text().splitlines()]
    path, previous = tmp_path / "ledger.jsonl", ""
    with path.open("wb") as file:
        for body in lines:
            body = change(body) if body.get("round") == 5 else body
            line, previous = _seal(
                {k: v for k, v in body.items() if k not in ("previous", "hash")}, previous
            )
            file.write(line)
    with pytest.raises(InputError, match=r"round 5 (says of|is of mechanism)|another version"):
        read_ledger(path)


def test_a_run_that_ends_early_costs_what_its_schedule_would_have(tmp_path):
    """When it ends follows from what it released, and who would have come in later rounds not."""
    settings = {
        **COMPASS,
        "rounds": 40,
        "privacy__noise_multiplier": None,
        "privacy__target_epsilon": 8.0,
        "evaluation": {"every": 1, "stop_after": 2},
    }
    directory, prepared = train_small(tmp_path / "run", **settings)
    read = read_run(directory.path)
    assert len(read.releases) < 40
    turns = build_algorithm(prepared.config).turns(40, 4)
    assert [(r.silos, r.turns) for r in read.ahead] == [
        (turn.silos, turn.steps) for turn in turns[len(read.releases) :]
    ]
    planned = prepared.plan.planned_cost().epsilon
    assert spent(read).epsilons["rdp"] == pytest.approx(planned, rel=1e-9)
    assert planned <= 8.0


def test_a_round_ahead_is_charged_to_everybody_with_the_most_steps(whole):
    release = next(iter(Ledger.open(whole[0].ledger)))
    ahead = release.mechanism.in_round(release, 13)
    assert ahead.bills() == [(ahead.event(), tuple(range(6)))]
    assert ahead.event().count == 4


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"privacy": None}, "users: how fast one computes is private"),
        ({"privacy__unit": "user", "privacy__example": None}, "users: how fast one computes"),
        ({"privacy__sampling": {"kind": "poisson", "expected_cohort": 3}}, "kind: poisson: all"),
        (
            {"privacy__clipping": {"kind": "adaptive", "bound": 0.1, "count_noise": 5.0}},
            r"clipping\.kind: adaptive",
        ),
        ({"server": {"optimizer": "adam", "lr": 0.1}}, r"server\.optimizer other than sgd"),
        ({"runtime__deployment": True}, r"runtime\.deployment: its schedule is of virtual time"),
        ({"algorithm": {"name": "fedcompass", "seconds": [], "min_steps": 1}}, "seconds"),
        ({"algorithm": {"name": "fedcompass", "seconds": [0.0], "min_steps": 1}}, "seconds"),
        ({"algorithm": {"name": "fedcompass", "seconds": [1.0]}}, "min_steps"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(changes, reason):
    with pytest.raises(InputError, match=reason):
        small_config(**{**COMPASS, **changes})


def test_steps_below_the_fewest_and_seconds_for_others_are_refused():
    with pytest.raises(InputError, match=r"local\.steps: 4, .* below algorithm\.min_steps: write"):
        prepare(small_config(**{**COMPASS, "algorithm__min_steps": 5}))
    with pytest.raises(InputError, match=r"algorithm\.seconds: 2 numbers, .* there are 6 silos"):
        prepare(small_config(**{**COMPASS, "algorithm__seconds": [1.0, 2.0]}))
