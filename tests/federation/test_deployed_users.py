"""In a deployment each person decides for itself alone, and randomness is the node's secret."""

import json
import math
from collections import Counter

import pytest
import torch
from deployed import (
    COUNTS,
    AfterRound,
    Deployed,
    deployed_config,
    hosting_answer,
    start_of,
    three_nodes,
    train_answer,
    trained,
    trainer_of,
)
from in_process import Silent, drive_on, small_config
from replies import hosting_of, sum_of
from writers import by_writers, write_writers

from fedpriv import experiment
from fedpriv.errors import BudgetError, InputError
from fedpriv.federation import client_app
from fedpriv.federation.gate import reason_in
from fedpriv.privacy import Adjacency, Ledger, Purpose, Randomness, RdpAccountant
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import privacy_statement
from fedpriv.training.cohort import train_cohort

REST = {writer: count for writer, count in COUNTS.items() if writer != 100}
RECIPES = [
    {},
    {"lr": 0.1},
    {"lr": 0.5, "batch_size": 1, "epochs": 4},
    {"lr": 0.5, "momentum": 0.9, "proximal_mu": 0.1},
    {"steps": 7, "epochs": 1, "max_grad_norm": 1.0},
]


def contribution(config, folder, users):
    answer = train_answer(config, folder, users)
    assert reason_in(answer) is None
    return sum_of(answer)[1]


@pytest.fixture
def folders(tmp_path):
    """The same people in two folders, but for writer 100, the first."""
    return write_writers(tmp_path / "all", COUNTS), write_writers(tmp_path / "rest", REST)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_one_person_less_moves_the_sum_of_a_node_by_the_bound_at_most(folders, recipe, monkeypatch):
    """What others add has the same law: with the node's secret held still, it is the same."""
    monkeypatch.setattr(Randomness, "operating_system", lambda: Randomness(7, reproducible=False))
    whole, rest = folders
    local = {"epochs": 2, "batch_size": 2, **recipe}
    config = deployed_config(whole, local=local, model__dropout=0.2)
    others = contribution(config, whole, range(1, 12)).total
    assert contribution(config, rest, range(11)).total.equal(others)
    moved = float((contribution(config, whole, range(12)).total - others).norm())
    assert 0.05 < moved <= 1.0


def test_in_a_simulation_all_others_are_trained_alike_to_the_bit(folders):
    sums = []
    for folder, users in zip(folders, (range(1, 12), range(11)), strict=True):
        config = small_config(
            **by_writers(folder), model__dropout=0.2, runtime__engine="sequential"
        )
        trainer = experiment.prepare(config).trainer
        start = start_of(config)
        sums.append([train_cohort(trainer, start, [user], 1).total for user in users])
    assert all(map(torch.equal, *sums))


def test_no_randomness_of_a_deployment_comes_from_the_config(folders, monkeypatch):
    config = deployed_config(folders[0])
    start = start_of(config)

    def refused(*args):
        raise AssertionError("derived from the config")

    monkeypatch.setattr(Randomness, "simulation", refused)
    assert hosting_of(hosting_answer(config, folders[0])).users == 12
    sums = [contribution(config, folders[0], range(12)).total for _ in range(2)]
    assert not sums[0].equal(sums[1])
    assert start.equal(start_of(config))


def test_each_message_of_a_deployment_has_randomness_of_its_own(folders):
    config = deployed_config(folders[0])
    drawn = set()
    for _ in range(3):
        trainer = trainer_of(config, folders[0])
        drawn.add(trainer.randomness.torch_seed(Purpose.LOCAL_TRAINING, 1))
    assert len(drawn) == 3


class BrokenError(Exception):
    """Whatever may go wrong in one person's data."""


@pytest.mark.parametrize("error", [InputError, ValueError, OverflowError, BrokenError])
def test_what_is_wrong_with_one_person_loses_that_person_alone(folders, error, monkeypatch):
    monkeypatch.setattr(Randomness, "operating_system", lambda: Randomness(7, reproducible=False))
    whole, rest = folders
    config = deployed_config(whole)
    expected = contribution(config, rest, range(11))
    dataset = type(trainer_of(config, whole).dataset)
    built = dataset.user

    def user(self, place):
        if self.user_ids[place] == "writer-100":
            raise error("private words")
        return built(self, place)

    monkeypatch.setattr(dataset, "user", user)
    summed = contribution(config, whole, range(12))
    assert summed.total.equal(expected.total)
    assert (summed.users, summed.non_finite) == (12, 1)


def test_a_model_that_cannot_learn_from_one_person_loses_that_person_alone(folders, monkeypatch):
    whole, _ = folders
    config = deployed_config(whole)
    dataset = type(trainer_of(config, whole).dataset)
    built = dataset.user

    def user(self, place):
        examples = built(self, place)
        if self.user_ids[place] == "writer-100":
            examples.targets[:] = 11  # of ten classes
        return examples

    monkeypatch.setattr(dataset, "user", user)
    summed = contribution(config, whole, range(12))
    assert (summed.users, summed.non_finite) == (12, 1)
    assert float(summed.total.norm()) > 0.5


def test_a_node_says_nothing_of_what_is_wrong_with_its_data(tmp_path, folders, caplog):
    nowhere = tmp_path / "private-name"
    for answer in (
        hosting_answer(deployed_config(folders[0]), nowhere),
        train_answer(deployed_config(folders[0]), nowhere, range(3)),
    ):
        assert reason_in(answer) == "it could not do its part; the reason is in its own log"
        assert "private-name" not in str(answer.content)
    assert "private-name" in caplog.text


LOCAL_NOISE = {
    "rounds": 10,
    "privacy__noise_by": "users",
    "privacy__noise_multiplier": 4.0,
    "privacy__sampling": {"kind": "fixed_size", "expected_cohort": 4},
    "runtime": {"workers": 3, "deployment": True, "device": "cpu"},
}


@pytest.mark.parametrize("seed", range(2))
def test_who_is_charged_is_who_sent_whichever_nodes_are_there(tmp_path, seed):
    folders = three_nodes(tmp_path)
    config = deployed_config(folders[0], data={"users": 12}, **LOCAL_NOISE, seed=seed)
    config = config.model_copy(update={"run_dir": tmp_path / "run"})
    grid = Deployed(folders)
    directory = trained(config, grid, AfterRound(4, lambda: grid.away.add(0)))
    ledger = Ledger.open(directory.ledger)
    assert [places.first for places in ledger.places.values()] == [0, 4, 8]
    sent = Counter(
        {ledger.places[node].first + user: n for (node, user), n in grid.messages.items()}
    )
    charged = Counter(user for release in ledger for user in release.users)
    assert sum(sent.values()) > 20
    assert all(charged[user] >= count for user, count in sent.items())
    # Whoever was there in all rounds is charged for what was sent, and no more.
    assert {u: charged[u] for u in range(4, 12)} == {u: sent[u] for u in range(4, 12)}


@pytest.mark.parametrize("noise_by", ["server", "nodes"])
def test_who_is_hosted_is_marked_and_the_statement_says_so(tmp_path, noise_by):
    folders = three_nodes(tmp_path)
    config = deployed_config(
        folders[0],
        data={"users": 12},
        rounds=1,
        privacy__noise_by=noise_by,
        privacy__sampling={"kind": "poisson", "expected_cohort": 4},
        runtime={"workers": 3, "deployment": True, "device": "cpu"},
    ).model_copy(update={"run_dir": tmp_path / "run"})
    directory = trained(config, Deployed(folders), Silent())
    lines = map(json.loads, directory.ledger.read_text().splitlines())
    places = [line for line in lines if line["kind"] == "places"]
    assert [set(line) for line in places] == [
        {"kind", "partition", "private", "previous", "hash"}
    ] * 3
    assert [line["private"]["users"] for line in places] == [4, 4, 4]
    run = read_run(directory.path)
    sections = {each.key: each.sentences for each in privacy_statement(run, spent(run)).sections}
    assert any("how many users it hosts" in sentence for sentence in sections["logged"])
    assert any("how many users it hosts" in s for s in sections["trust"]) is (noise_by == "nodes")


def test_the_budget_holds_for_the_person_who_sent_most(tmp_path):
    folders = three_nodes(tmp_path)
    config = deployed_config(
        folders[0], data={"users": 12}, **LOCAL_NOISE, privacy__budget={"epsilon": 4.0}
    ).model_copy(update={"run_dir": tmp_path / "run", "rounds": 60})
    grid = Deployed(folders)
    with pytest.raises(BudgetError):
        trained(config, grid, AfterRound(3, lambda: grid.away.add(1)))
    event = next(iter(Ledger.open(tmp_path / "run" / "ledger.jsonl"))).event()
    accountant = RdpAccountant(Adjacency.REPLACE_ONE)
    accountant.compose(event, max(grid.messages.values()))
    assert accountant.epsilon(1e-3) <= 4.0


def test_places_are_those_of_the_run_also_after_a_resume(tmp_path):
    folders = three_nodes(tmp_path)
    config = deployed_config(folders[0], data={"users": 12}, **LOCAL_NOISE)
    config = config.model_copy(update={"run_dir": tmp_path / "run", "rounds": 2})
    grid = Deployed(folders)
    directory = trained(config, grid, Silent())
    (directory.checkpoints / "round-000002.safetensors").unlink()
    known = Ledger.open(directory.ledger).places
    again, prepared = experiment.reopen(directory.path)
    assert prepared.finished_rounds == 1
    grid = Deployed(folders[1:] + folders[:1])  # other folders under the same numbers: other people
    observer = Silent()
    with pytest.raises(InputError, match="no node is left"):
        experiment.train(prepared, again, observer, drive_on(grid))
    assert Ledger.open(directory.ledger).places == known


def test_a_node_whose_people_are_others_is_refused_and_the_rest_go_on(tmp_path):
    folders = three_nodes(tmp_path)
    config = deployed_config(folders[0], data={"users": 13}, **LOCAL_NOISE)
    runtime = config.runtime.model_copy(update={"node_share": 0.3})
    config = config.model_copy(
        update={"run_dir": tmp_path / "run", "rounds": 6, "runtime": runtime}
    )
    grid = Deployed(folders)

    def exchanged():
        write_writers(folders[1], {500: 4, 501: 4, 502: 4, 503: 4})
        grid.away.add(0)  # someone leaves, so the others are asked again
        client_app._TRAINERS.__init__()  # a node's process ends with its message

    observer = AfterRound(2, exchanged)
    trained(config, grid, observer)
    assert len(observer.rows) == 6
    assert any("node 1 hosts other users than when this run began" in s for s in observer.sentences)
    assert sum(n for (node, _), n in grid.messages.items() if node == 1) < 12


def test_a_node_that_comes_late_with_too_many_people_is_told_and_takes_no_part(tmp_path):
    folders = three_nodes(tmp_path)
    config = deployed_config(folders[0], data={"users": 10}, **LOCAL_NOISE)
    config = config.model_copy(update={"run_dir": tmp_path / "run", "rounds": 5})
    config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"workers": 2})})
    grid = Deployed(folders)
    grid.away = {2}
    observer = AfterRound(2, grid.away.clear)
    directory = trained(config, grid, observer)
    assert len(observer.rows) == 5
    assert any("node 2 hosts 4 users" in sentence for sentence in observer.sentences)
    assert not any(node == 2 for node, _ in grid.messages)
    assert set(Ledger.open(directory.ledger).places) == {0, 1}


def test_one_wrong_label_on_one_node_stops_nobody_and_is_not_told(tmp_path):
    folders = three_nodes(tmp_path)
    write_writers(folders[1], dict(list(COUNTS.items())[1::3]), labels={101: 11})
    settings = {"rounds": 2, "data": {"users": 12}}
    runtime = {"workers": 3, "deployment": True, "device": "cpu"}
    config = deployed_config(
        folders[0],
        **settings,
        runtime=runtime,
        privacy__sampling={"kind": "poisson", "expected_cohort": 6},
    ).model_copy(update={"run_dir": tmp_path / "run"})
    observer = Silent()
    trained(config, Deployed(folders), observer)
    assert len(observer.rows) == 2
    assert not any("label" in sentence for sentence in observer.sentences)
    assert math.isfinite(observer.rows[-1]["epsilon"]["rdp"])
