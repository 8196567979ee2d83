"""Tuning that is counted: its law, its price, and whole tunings, interrupted and repeated."""

import copy
import dataclasses
import errno
import fcntl
import io
import json
import math
import re
from contextlib import contextmanager

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from in_process import SILOS, SMALL
from rich.console import Console
from scipy import stats
from test_cli import assert_one_line, call

import fedpriv
from fedpriv import api, tuning
from fedpriv.errors import Diverged, InputError, Interrupted, WorkerLost
from fedpriv.failures import told_as
from fedpriv.optimizers.server import Server
from fedpriv.preparation import ready_trainer
from fedpriv.privacy import Adjacency, Ledger
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.trials import SHAPES, Trials, Tuning, price
from fedpriv.reporting.report import render
from fedpriv.tuning import tune

EXPERIMENT = fedpriv.Experiment(**SMALL).with_(rounds=2)
EVENT = PoissonSampledDpEvent(8 / 60, GaussianDpEvent(1.0))
GRID = {"server.lr": [0.01, 0.1], "local.lr": [0.05, 0.3, 0.5]}


def expected(rounds: int, *laws: tuple[str, float], delta: float = 1e-3) -> float:
    accountant = RdpAccountant()
    for law, mean in laws:
        trial = SelfComposedDpEvent(EVENT, rounds)
        accountant.compose(RepeatAndSelectDpEvent(trial, mean, SHAPES[law]))
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize("law", SHAPES)
@pytest.mark.parametrize("mean", [1.5, 10.0, 60.0])
def test_the_number_of_trials_has_its_law(law, mean):
    generator = np.random.default_rng(1)
    drawn = np.array([Trials(law, mean).draw(generator) for _ in range(20_000)])
    if law == "geometric":
        exact = stats.geom(1 / mean)
    elif law == "poisson":
        exact = stats.poisson(mean)
    else:  # η = 0 of Papernot and Steinke's definition: P(k) in proportion to (1 - γ)^k / k
        gamma = 1.0
        for _ in range(200):  # 1/γ = 1 + mean·log(1/γ)
            gamma = 1 / (1 + mean * math.log(1 / max(gamma, 1e-12))) if gamma < 1 else 0.1
        exact = stats.logser(1 - gamma)
    assert exact.mean() == pytest.approx(mean, rel=1e-6)
    assert abs(drawn.mean() - mean) < 6 * exact.std() / math.sqrt(len(drawn))
    for k in (1, 2, 5):
        p = exact.pmf(k)
        assert abs(np.mean(drawn == k) - p) < 6 * math.sqrt(p * (1 - p) / len(drawn)) + 1e-9


@pytest.mark.parametrize("law", SHAPES)
@pytest.mark.parametrize(("mean", "rounds"), [(2.0, 5), (10.0, 50)])
def test_the_price_is_dp_accountings(law, mean, rounds):
    trials = Trials(law, mean)
    one = Tuning(trials, {EVENT: rounds})
    found = price([one], Adjacency.ADD_OR_REMOVE_ONE, 1e-5)
    assert found.epsilon == pytest.approx(expected(rounds, (law, mean), delta=1e-5), rel=1e-9)
    twice = price([one, one], Adjacency.ADD_OR_REMOVE_ONE, 1e-5)
    both = expected(rounds, (law, mean), (law, mean), delta=1e-5)
    assert twice.epsilon == pytest.approx(both, rel=1e-9)


def test_laws_and_means_that_are_none_are_refused():
    for law, mean in (("uniform", 5.0), ("geometric", 1.0), ("poisson", 0.0), ("poisson", np.nan)):
        with pytest.raises(InputError, match=r"--trials|--mean"):
            Trials(law, mean)


# ---------------------------------------------------------------- whole tunings


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning") / "tuning"
    return folder, tune(EXPERIMENT, GRID, "geometric", 3.0, run_dir=folder, progress=False)


def record(folder):
    return json.loads((folder / "tuning.json").read_text())


def test_the_best_of_all_is_chosen_and_every_trial_is_its_own_run(tuned):
    folder, found = tuned
    (one,) = record(folder)["calls"]
    private = one["simulation_only"]
    assert one["finished"]
    assert len(private["points"]) == len(private["qualities"]) >= 1
    assert found.best.quality == max(private["qualities"])
    assert found.cost.epsilon == pytest.approx(expected(2, ("geometric", 3.0)), rel=1e-6)
    assert found.best.epsilon() == found.cost.epsilon
    places = sorted((folder / "simulation_only").iterdir())
    assert len(places) == len(private["points"])
    runs = [fedpriv.Run.open(place) for place in places]
    by_label = {run.config.trial: run for run in runs}
    runs = [by_label[label] for label in private["labels"]]
    places = [run.path for run in runs]
    # Neither cohorts nor noise are shared, and the users are the same.
    headers = [Ledger.open(place / "ledger.jsonl").header for place in places]
    assert len({header.fingerprint for header in headers}) == len(headers)
    assert len({header.data for header in headers}) == 1
    for run, point in zip(runs, private["points"], strict=True):
        assert run.config.server.lr == point["server.lr"]
        assert run.config.local.lr == point["local.lr"]
        assert all(point[key] in values for key, values in GRID.items())


def test_a_trial_that_ended_early_costs_what_all_its_rounds_cost(tmp_path):
    still = {"server.optimizer": "sgd", "server.lr": 1e-12}
    early = {"evaluation.every": 1, "evaluation.stop_after": 1, "rounds": 4}
    experiment = EXPERIMENT.with_({**still, **early})
    found = tune(experiment, {"local.lr": [0.1]}, "geometric", 2.0, run_dir=tmp_path / "t")
    assert len(found.best.ledger) == 2
    assert found.cost.epsilon == pytest.approx(expected(4, ("geometric", 2.0)), rel=1e-6)


def test_the_statement_has_a_number_and_no_number_of_trials(tuned):
    folder, found = tuned
    text = render([found.best.path], "md")
    assert "Counted: every ε here is what choosing this run cost" in text
    assert "geometric, 3 expected, over local.lr, server.lr" in text
    assert "Not counted" not in text
    told = json.loads((found.best.path / "tuned.json").read_text())
    assert told["epsilon"] == found.cost.epsilon
    assert "points" not in json.dumps(told)
    for place in (folder / "simulation_only").iterdir():
        if place != found.best.path:
            assert "is not recorded beside it" in render([place], "md")


def test_a_second_tuning_in_the_folder_adds_to_the_price(tuned, tmp_path):
    folder, _ = tuned
    again = tune(EXPERIMENT, {"server.lr": [0.05]}, "poisson", 1.0, run_dir=folder, progress=False)
    both = expected(2, ("geometric", 3.0), ("poisson", 1.0))
    assert again.cost.epsilon == pytest.approx(both, rel=1e-6)
    calls = record(folder)["calls"]
    qualities = [q for each in calls for q in each["simulation_only"]["qualities"]]
    assert again.best.quality == max(qualities)
    with pytest.raises(InputError, match="cost something else"):
        tune(EXPERIMENT.with_(rounds=3), GRID, run_dir=folder, progress=False)


@contextmanager
def interrupted_after(trials, monkeypatch):
    """Within it a tuning is stopped, as by Ctrl-C, when that many trials are trained."""
    honest, trained = fedpriv.Experiment._trained_in, []

    def interrupted(*given):
        if len(trained) == trials:
            raise Interrupted("stopped")
        trained.append(given)
        return honest(*given)

    with monkeypatch.context() as patched:
        patched.setattr(fedpriv.Experiment, "_trained_in", interrupted)
        with pytest.raises(Interrupted):
            yield


def test_an_interrupted_tuning_goes_on_with_the_same_trials(tmp_path, monkeypatch):
    folder, whole = tmp_path / "tuning", tmp_path / "whole"
    done = tune(EXPERIMENT, GRID, "geometric", 4.0, run_dir=whole, progress=False)
    assert len(record(whole)["calls"][0]["simulation_only"]["points"]) > 1
    with interrupted_after(1, monkeypatch):
        tune(EXPERIMENT, GRID, "geometric", 4.0, run_dir=folder, progress=False)
    with pytest.raises(InputError, match="with other trials is unfinished"):
        tune(EXPERIMENT, GRID, "geometric", 5.0, run_dir=folder, progress=False)
    found = tune(EXPERIMENT, GRID, "geometric", 4.0, run_dir=folder, progress=False)
    assert record(folder) == record(whole)
    assert found.cost == done.cost
    assert found.best.quality == done.best.quality


def test_where_no_trial_is_drawn_it_costs_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(Trials, "draw", lambda self, generator: 0)
    found = tune(EXPERIMENT, GRID, "poisson", 3.0, run_dir=tmp_path / "t", progress=False)
    assert (found.best, found.point) == (None, None)
    assert found.cost.epsilon == pytest.approx(expected(2, ("poisson", 3.0)), rel=1e-6)


PRIVACY = SMALL["privacy"]
CLIPPED = PRIVACY["clipping"]
SEPARATED = EXPERIMENT.with_(
    {
        "privacy.mechanism": {"kind": "correlated", "bands": 2},
        "privacy.sampling": {"kind": "min_separation", "rounds": 5, "expected_cohort": 4},
    }
)
REFUSED = {
    "costs": (EXPERIMENT, {"privacy.noise_multiplier": [1.0, 2.0]}, "costs another ε"),
    "rounds": (EXPERIMENT, {"rounds": [1, 2]}, "costs another ε"),
    "seed": (EXPERIMENT, {"seed": [1, 2]}, "no hyper-parameter"),
    "whose": (EXPERIMENT, {"data.users": [100, 200]}, "bears on who is protected"),
    "judged": (EXPERIMENT, {"evaluation.every": [1, 2]}, "bears on who is protected"),
    "nothing": (EXPERIMENT, {}, "at least one value"),
    "no privacy": (EXPERIMENT.with_(privacy=None), GRID, "nothing to count"),
    "a point without privacy": (EXPERIMENT, {"privacy": [PRIVACY, None]}, "nothing to count"),
    "a point without noise": (EXPERIMENT, {"privacy.noise_multiplier": [0.0]}, "nothing to count"),
    "users' noise": (EXPERIMENT, {"privacy.noise_by": ["users"]}, "have no price"),
    "users' noise inside": (
        EXPERIMENT,
        {
            "privacy": [
                {**PRIVACY, "noise_by": "users", "clipping": {**CLIPPED, "bound": b}}
                for b in (0.1, 0.2)
            ]
        },
        "have no price",
    ),
    "nodes' noise": (EXPERIMENT, {"privacy.noise_by": ["nodes"]}, "whoever tunes sees every trial"),
    "allocated": (
        EXPERIMENT,
        {"privacy.sampling": [{"kind": "random_allocation", "rounds": 6}]},
        "random_allocation: nothing prices",
    ),
    "no first round": (EXPERIMENT, {"privacy.budget.epsilon": [0.01]}, "allows 0 rounds"),
    "nothing measured": (
        EXPERIMENT.with_({"rounds": 4, "privacy.budget.epsilon": 1.5}),
        GRID,
        "allows 1 round,",
    ),
    "budgets": (
        EXPERIMENT.with_({"evaluation.every": 1}),
        {"privacy.budget.epsilon": [1.5, 5.0]},
        "costs another ε",
    ),
    "together": (
        SEPARATED,
        {"rounds": [8, 10], "server.lr": [0.1, 0.2], "privacy.sampling.rounds": [5, 4]},
        "with rounds=10, server.lr=0.1, privacy.sampling.rounds=4 costs another ε than one with "
        "rounds=8, server.lr=0.1, privacy.sampling.rounds=5,",
    ),
    "too many": (
        EXPERIMENT,
        {
            key: [0.1 + each / 1000 for each in range(40)]
            for key in ("rounds", "server.x", "privacy")
        },
        "64,000 combinations of rounds, server.x, .* at most 1,000",
    ),
    "told a tracker": (EXPERIMENT.with_(tracker={"name": "tensorboard"}), GRID, "^tracker: "),
    "no values": (EXPERIMENT, {"server.lr": [object()]}, "cannot be written down"),
}


@pytest.mark.parametrize(("experiment", "values", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_price_is_refused_before_anything_is_trained(
    experiment, values, reason, tmp_path
):
    with pytest.raises(InputError, match=reason):
        tune(experiment, values, run_dir=tmp_path / "t", progress=False)
    assert not (tmp_path / "t").exists()


def test_the_best_trials_label_does_not_say_how_many_there_were(tmp_path):
    """Nothing that goes with the released run is a place in the row of trials."""
    labels = []
    for seed in range(3):
        changed = EXPERIMENT.with_(seed=seed)
        plan = tuning._checked(changed, GRID)
        for law, mean in (("geometric", 3.0), ("geometric", 300.0)):
            folder = tmp_path / f"{seed}-{mean}"
            folder.mkdir()
            opened = tuning._Record.opened(folder, plan)
            call = opened.call(Trials(law, mean), GRID, seed)
            labels += call["simulation_only"]["labels"]
    assert len(set(labels)) == len(labels) > 300
    # Uniform: the mean of so many lies within six deviations of the middle.
    assert abs(np.mean(labels) / 2**62 - 0.5) < 6 / math.sqrt(12 * len(labels))


@pytest.mark.parametrize(("whose", "why"), [("same", "users themselves"), ("unknown", "facts")])
def test_examples_of_users_choose_no_trial(whose, why, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "ready_trainer", _held_out_of(whose))
    with pytest.raises(InputError, match=rf"^data: .*best trial.*{why}"):
        tune(EXPERIMENT, GRID, run_dir=tmp_path / "t", progress=False)
    assert not (tmp_path / "t").exists()


def _held_out_of(whose):
    def ready(config, seeded=True):
        config, trainer = ready_trainer(config, seeded)
        facts = dataclasses.replace(trainer.dataset.facts, held_out=whose)
        dataset = copy.copy(trainer.dataset)
        object.__setattr__(dataset, "facts", facts)
        return config, dataclasses.replace(trainer, dataset=dataset)

    return ready


def test_silos_have_no_price(tmp_path):
    changes = {key.replace("__", "."): value for key, value in SILOS.items()}
    with pytest.raises(InputError, match="have no price"):
        tune(EXPERIMENT.with_(changes), GRID, run_dir=tmp_path / "t", progress=False)


def test_the_command_says_the_best_and_the_price(tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(EXPERIMENT.config.to_yaml())
    options = ["tune", str(path), "--set", "runtime.grid=local", "--run-dir", str(tmp_path / "t")]
    refused = call(monkeypatch, capsys, *options, "--grid", "server.lr")
    assert_one_line(refused, "--grid: write key=a,b,c")
    monkeypatch.setattr(Trials, "draw", lambda self, generator: 1)
    grid = ["--grid", "server.lr=0.02,0.02", "--mean", "2"]
    code, out, _ = call(monkeypatch, capsys, *options, *grid)
    assert code == 0
    assert "best: server.lr=0.02" in out
    assert "all tunings there cost ε = " in out
    assert tuning.TUNED in {each.name for each in (tmp_path / "t").rglob("*.json")}


def test_a_large_grid_of_what_bears_on_no_price_is_looked_at_value_by_value():
    rates = [0.01 * each for each in range(1, 11)]
    grid = {"server.lr": rates, "local.lr": rates, "local.batch_size": [2, 3, 4, 5]}
    points = list(tuning._combinations(grid, {key: each[0] for key, each in grid.items()}))
    assert len(points) == 1
    assert tuning._checked(EXPERIMENT, {key: each[:2] for key, each in grid.items()})


@pytest.mark.parametrize("seed", range(3))
def test_the_price_is_of_the_grid_and_not_of_what_was_drawn(seed, tmp_path, monkeypatch):
    """Trials that a budget ends, or that diverge, or are none, cost what each might have."""
    limited = EXPERIMENT.with_({"rounds": 6, "seed": seed, "privacy.budget.epsilon": 1.8})
    had = tuning._checked(limited, GRID).affordable_rounds()
    assert 1 < had < 6
    wanted = expected(had, ("poisson", 1.5))
    for drawn in (0, 1, 2):
        monkeypatch.setattr(Trials, "draw", lambda self, generator, n=drawn: n)
        folder = tmp_path / str(drawn)
        found = tune(limited, GRID, "poisson", 1.5, run_dir=folder, progress=False)
        assert found.cost.epsilon == pytest.approx(wanted, rel=1e-6)


# ---------------------------------------------------------------- trials that fail

WILD = {"server.options": [{}, {"weight_decay": 1e38}]}
PLAIN = EXPERIMENT.with_({"server.optimizer": "sgd", "evaluation.every": 1})


def drawing(monkeypatch, count):
    monkeypatch.setattr(Trials, "draw", lambda self, generator: count)


def test_a_trial_that_diverged_is_the_worst_and_the_tuning_goes_on(tmp_path, monkeypatch):
    drawing(monkeypatch, 6)
    found = tune(PLAIN, WILD, "geometric", 6.0, run_dir=tmp_path / "t", progress=False)
    (one,) = record(tmp_path / "t")["calls"]
    private = one["simulation_only"]
    diverged = [bool(point["server.options"]) for point in private["points"]]
    assert any(diverged)
    assert not all(diverged)
    assert [quality is None for quality in private["qualities"]] == diverged
    assert found.point == {"server.options": {}}
    assert found.cost.epsilon == pytest.approx(expected(2, ("geometric", 6.0)), rel=1e-6)


def test_a_trial_that_diverged_is_not_tried_and_charged_again(tmp_path, monkeypatch):
    drawing(monkeypatch, 6)
    with interrupted_after(5, monkeypatch):
        tune(PLAIN, WILD, "geometric", 6.0, run_dir=tmp_path / "t", progress=False)
    found = tune(PLAIN, WILD, "geometric", 6.0, run_dir=tmp_path / "t", progress=False)
    assert found.cost.epsilon == pytest.approx(expected(2, ("geometric", 6.0)), rel=1e-6)
    for place in (tmp_path / "t" / "simulation_only").iterdir():
        rounds = [release.round for release in Ledger.open(place / "ledger.jsonl")]
        assert len(rounds) == len(set(rounds))


def test_where_all_diverge_it_is_one_line_and_counted(tmp_path, monkeypatch, capsys):
    drawing(monkeypatch, 2)
    path = tmp_path / "small.yaml"
    path.write_text(PLAIN.config.to_yaml())
    options = ["tune", str(path), "--set", "runtime.grid=local", "--run-dir", str(tmp_path / "t")]
    grid = ["--grid", "server.options={weight_decay: 1e38}", "--mean", "2"]
    refused = call(monkeypatch, capsys, *options, *grid)
    *marked, reason = refused[2].strip().splitlines()
    assert refused[:2] == (2, "")
    assert reason.startswith("error: --grid: the held-out measure of no trial is a number")
    assert f"ε = {epsilon_text(expected(2, ('geometric', 2.0)))} at δ = 0.001" in reason
    assert all(line.startswith("simulation only: trial ") for line in marked)
    (one,) = record(tmp_path / "t")["calls"]
    assert one["finished"]
    drawing(monkeypatch, 1)
    again = tune(PLAIN, {"server.lr": [0.01]}, "poisson", 1.0, run_dir=tmp_path / "t")
    both = expected(2, ("geometric", 2.0), ("poisson", 1.0))
    assert again.cost.epsilon == pytest.approx(both, rel=1e-6)


def test_an_optimizer_that_fails_on_what_was_released_is_the_worst_as_well(tmp_path, monkeypatch):
    drawing(monkeypatch, 2)
    honest, steps = Server.step, []

    def fails_first(self, *given, **options):
        steps.append(given)
        if len(steps) == 2:
            with told_as("server.optimizer: sgd fails", Diverged):
                raise ValueError("no such matrix")
        return honest(self, *given, **options)

    monkeypatch.setattr(Server, "step", fails_first)
    found = tune(PLAIN, GRID, "geometric", 2.0, run_dir=tmp_path / "t", progress=False)
    (one,) = record(tmp_path / "t")["calls"]
    assert [each is None for each in one["simulation_only"]["qualities"]] == [True, False]
    assert found.cost.epsilon == pytest.approx(expected(2, ("geometric", 2.0)), rel=1e-6)


@pytest.mark.parametrize(
    "fault",
    [OSError(errno.ENOSPC, "full"), MemoryError(), WorkerLost("Ray died"), Interrupted("^C")],
)
def test_what_the_machine_does_stops_a_tuning_that_goes_on_later(fault, tmp_path, monkeypatch):
    drawing(monkeypatch, 2)

    def raises(*given):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(fedpriv.Experiment, "_trained_in", raises)
        with pytest.raises(type(fault)):
            tune(PLAIN, GRID, "geometric", 2.0, run_dir=tmp_path / "t", progress=False)
    assert not any(record(tmp_path / "t")["calls"][0]["simulation_only"]["done"])
    assert tune(PLAIN, GRID, "geometric", 2.0, run_dir=tmp_path / "t", progress=False).best


# ---------------------------------------------------------------- what is seen meanwhile


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_of_a_trial_is_shown_but_how_far_it_is_and_that_is_marked(
    terminal, tmp_path, monkeypatch
):
    drawing(monkeypatch, 2)
    seen = io.StringIO()
    console = Console(file=seen, force_terminal=terminal, width=140)
    monkeypatch.setattr(tuning, "beside", lambda shown=True: console)
    monkeypatch.setattr(api, "beside", lambda shown=True: console)
    early = {"evaluation.stop_after": 1, "rounds": 4, "server.lr": 1e-12}
    tune(PLAIN.with_(early), {"local.lr": [0.1, 0.2]}, "geometric", 2.0, run_dir=tmp_path / "t")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.getvalue())
    assert "simulation only: trial 2 of 2" in text
    assert not re.search(r"ε\s*=?\s*\d", text)
    shown = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert all("simulation only:" in line for line in shown if re.search("trial|%", line)), shown
    assert all("simulation only:" in line for line in shown if not terminal), shown


# ---------------------------------------------------------------- one at a time


def test_a_second_process_in_the_folder_gets_one_line(tmp_path, monkeypatch, capsys):
    drawing(monkeypatch, 1)
    path, folder = tmp_path / "small.yaml", tmp_path / "t"
    path.write_text(EXPERIMENT.config.to_yaml())
    options = ["tune", str(path), "--set", "runtime.grid=local", "--run-dir", str(folder)]
    folder.mkdir()
    held = (folder / ".lock").open("wb")
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    grid = ["--grid", "server.lr=0.02,0.05", "--mean", "2"]
    refused = call(monkeypatch, capsys, *options, *grid)
    assert_one_line(refused, f"{folder}: another process is tuning there")
    assert refused[0] == 2
    assert not (folder / "tuning.json").exists()
    held.close()
    assert call(monkeypatch, capsys, *options, *grid)[0] == 0


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^run_dir: cannot write .*file/t"):
        tune(EXPERIMENT, GRID, run_dir=tmp_path / "file" / "t", progress=False)
