"""Tuning that is counted: its law, its price, and whole tunings, interrupted and repeated."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from in_process import SILOS, SMALL
from scipy import stats
from test_cli import assert_one_line, call

import fedpriv
from fedpriv import tuning
from fedpriv.errors import InputError, Interrupted
from fedpriv.preparation import ready_trainer
from fedpriv.privacy import Adjacency, Ledger
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


def test_an_interrupted_tuning_goes_on_with_the_same_trials(tmp_path, monkeypatch):
    folder, whole = tmp_path / "tuning", tmp_path / "whole"
    done = tune(EXPERIMENT, GRID, "geometric", 4.0, run_dir=whole, progress=False)
    assert len(record(whole)["calls"][0]["simulation_only"]["points"]) > 1
    honest, trained = fedpriv.Experiment._trained_in, []

    def once(*given):
        if trained:
            raise Interrupted("stopped")
        trained.append(given)
        return honest(*given)

    with monkeypatch.context() as patched:
        patched.setattr(fedpriv.Experiment, "_trained_in", once)
        with pytest.raises(Interrupted):
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


REFUSED = {
    "costs": (EXPERIMENT, {"privacy.noise_multiplier": [1.0, 2.0]}, "costs another ε"),
    "rounds": (EXPERIMENT, {"rounds": [1, 2]}, "costs another ε"),
    "seed": (EXPERIMENT, {"seed": [1, 2]}, "no hyper-parameter"),
    "whose": (EXPERIMENT, {"data.users": [100, 200]}, "bears on who is protected"),
    "judged": (EXPERIMENT, {"evaluation.every": [1, 2]}, "bears on who is protected"),
    "nothing": (EXPERIMENT, {}, "at least one value"),
    "no privacy": (EXPERIMENT.with_(privacy=None), GRID, "nothing to count"),
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
