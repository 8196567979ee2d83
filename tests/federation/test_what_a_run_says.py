"""What a run writes of itself, against what was heard on the way and independent accountants."""

import json
import math

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from flwr.app import Message
from flwr.app.error import Error
from in_process import SILOS, InProcessGrid, small_config, train_small
from listened import ListeningGrid, begun

from fedpriv import experiment
from fedpriv.data.federated import Examples, PartitionedImages
from fedpriv.errors import ClientFault
from fedpriv.federation import client_app
from fedpriv.privacy import Adjacency, Ledger, Purpose, Randomness
from fedpriv.training.example_level import train_silos


def test_epsilon_by_both_accountants_is_that_of_the_rounds_so_far(tmp_path):
    changes = {"privacy__accountants": ["rdp", "pld"], "rounds": 3, "evaluation__every": 2}
    directory, _ = train_small(tmp_path / "run", **changes)
    rows = directory.read_metrics()
    event = PoissonSampledDpEvent(8 / 60, GaussianDpEvent(1.0))
    for row in rows:
        rdp = RdpAccountant().compose(event, row["round"]).get_epsilon(1e-3)
        assert row["epsilon"]["rdp"] == pytest.approx(rdp, rel=1e-9)
        if row["round"] > 1:
            pld = PLDAccountant().compose(event, row["round"]).get_epsilon(1e-3)
            assert row["epsilon"]["pld"] == pytest.approx(pld, rel=1e-6)
    assert [sorted(row["epsilon"]) for row in rows] == [["rdp"], ["pld", "rdp"], ["pld", "rdp"]]


def test_epsilon_under_replace_one_is_that_of_twice_the_sensitivity(tmp_path):
    everybody = {"privacy__sampling": {"kind": "all"}, "privacy__adjacency": "replace_one"}
    directory, _ = train_small(tmp_path / "run", rounds=2, **everybody)
    relation = Adjacency.REPLACE_ONE.relation
    halved = RdpAccountant(neighboring_relation=relation).compose(GaussianDpEvent(0.5), 2)
    said = directory.read_metrics()[-1]["epsilon"]["rdp"]
    assert said == pytest.approx(halved.get_epsilon(1e-3), rel=1e-9)
    ledger = Ledger.open(directory.ledger)
    assert ledger.adjacency is Adjacency.REPLACE_ONE
    assert [r.adjacency for r in ledger] == ["replace_one"] * 2
    assert [r.sensitivity for r in ledger] == pytest.approx([0.2] * 2)


@pytest.fixture
def some_are_not_finite(monkeypatch):
    """Every fourth user's images are not numbers."""
    honest = PartitionedImages.user

    def user(self, index):
        examples = honest(self, index)
        if index % 4:
            return examples
        return Examples(examples.inputs * math.nan, examples.targets)

    monkeypatch.setattr(PartitionedImages, "user", user)
    monkeypatch.setattr(client_app, "_TRAINERS", client_app._Trainers())


def test_private_values_are_means_over_those_who_contributed(tmp_path, some_are_not_finite):
    run = begun(tmp_path / "run", rounds=2, privacy__sampling__expected_cohort=20).go()
    plan, names = run.prepared.plan, run.prepared.plan.layout.names
    for row in run.directory.read_metrics():
        generator = plan.randomness.numpy(Purpose.SAMPLING, row["round"], 0)
        drawn = plan.sampling.draw(generator)
        finite = int((drawn % 4 != 0).sum())
        assert 0 < finite < len(drawn)
        seen = row["simulation_only"]
        assert seen["cohort"] == len(drawn)
        assert seen["non_finite"] == len(drawn) - finite
        assert seen["examples"] == 6 * len(drawn)
        sums = [answer.summed for answer in run.grid.heard[row["round"]]]
        for name in ("loss", "norm", "clipped"):
            mean = sum(getattr(each, name) for each in sums) / finite
            assert seen[name] == pytest.approx(mean, rel=1e-12)
        assert seen["loss"] == pytest.approx(math.log(10), rel=0.2)  # of untrained models
        squares = np.square(list(seen["block_norms"].values())).sum()
        assert 0.5 * seen["norm"] ** 2 < squares <= seen["norm"] ** 2 * (1 + 1e-9)
        assert list(seen["block_norms"]) == list(seen["block_clipped"]) == list(names)


def test_the_environment_of_a_deployment_says_nothing_of_its_users(tmp_path):
    """A simulation describes its data: how many users there are, and of what sizes."""
    for deployment in (False, True):
        where = {"run_dir": str(tmp_path / str(deployment))}
        prepared = experiment.prepare(small_config(runtime__deployment=deployment, **where))
        written = (experiment.create(prepared).path / "environment.json").read_text()
        described = json.dumps(prepared.trainer.dataset.description)[1:-1]
        assert "60 users" in described
        assert (described in written) is not deployment
        assert ("60 users" in written) is not deployment


# ---------------------------------------------------------------- nodes of a deployment


class CrashingOnce(ListeningGrid):
    """The client code of node 1 raises."""

    def answer(self, message):
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
            return Message(Error(code=2, reason="KeyError: 'x'"), reply_to=message)
        return super().answer(message)


def test_a_crash_of_one_node_loses_it_in_a_deployment_and_ends_a_simulation(tmp_path):
    everybody = {"privacy__sampling": {"kind": "all"}, "rounds": 2}
    run = begun(tmp_path / "run", CrashingOnce(), runtime__deployment=True, **everybody).go()
    assert [row["nodes_lost"] for row in run.directory.read_metrics()] == [1, 1]
    assert len(run.ledger) == 2
    with pytest.raises(ClientFault, match="KeyError"):
        begun(tmp_path / "simulation", CrashingOnce(), **everybody).go()


class Leaving(ListeningGrid):
    """Node 2 is away in round 2 and comes back."""

    def get_node_ids(self):
        return [1000, 1001] if len(self.heard) == 1 else [1000, 1001, 1002]


def test_a_node_of_a_deployment_that_left_is_not_asked_until_it_is_back(tmp_path):
    changes = {"runtime__deployment": True, "runtime__workers": 3, "rounds": 3}
    everybody = {"privacy__sampling": {"kind": "all"}}
    run = begun(tmp_path / "run", Leaving(3), **changes, **everybody).go()
    asked = [sorted(a.partition for a in run.grid.heard[round_]) for round_ in (1, 2, 3)]
    assert asked == [[0, 1, 2], [0, 1], [0, 1, 2]]
    assert [row["nodes_lost"] for row in run.directory.read_metrics()] == [0, 0, 0]
    for answers in run.grid.heard.values():
        for answer in answers:
            assert answer.work.users == list(range(20))


def test_a_fault_of_the_code_at_a_node_is_not_taken_for_wrong_input(tmp_path, monkeypatch):
    def faulty(*given):
        raise KeyError("a bug")

    monkeypatch.setattr(client_app, "train_cohort", faulty)
    with pytest.raises(ClientFault, match=r"KeyError: .a bug"):
        train_small(tmp_path / "run", InProcessGrid())


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("feedback", ["none", "user"])
def test_sums_are_taken_in_double_precision(tmp_path, feedback):
    """Rounding to float32 would depend on everybody, and one user could move it."""
    run = begun(tmp_path / "run", rounds=1, privacy__error_feedback=feedback).go()
    for answer in run.grid.heard[1]:
        total = answer.summed.total
        assert total.dtype == torch.float64
        finer = total != total.float().double()
        assert float(finer.double().mean()) > 0.5


def test_silos_draw_other_samples_in_each_round_and_attempt():
    """Without noise a silo's change says which of its examples were drawn."""
    options = {"privacy__example": {"sampling_rate": 0.5, "silo_size": 40}}
    changes = {**SILOS, **options, "privacy__noise_multiplier": 0.0, "data__examples_per_user": 40}
    prepared = experiment.prepare(small_config(**changes))
    start, secret = prepared.server.parameters(), Randomness.simulation(3, "run")

    def change(round_, attempt, silo):
        level = prepared.plan.mechanism.level
        summed = train_silos(prepared.trainer, level, start, [silo], round_, attempt, secret, 1e-3)
        return summed.total

    once = change(1, 0, 0)
    assert once.equal(change(1, 0, 0))
    for other in (change(2, 0, 0), change(1, 1, 0)):
        assert not once.equal(other)
