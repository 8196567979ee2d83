"""A deployment is recognised: neither a server nor a config can declare real nodes simulated."""

import sys
from dataclasses import dataclass

import numpy as np
import pytest
from deployed import COUNTS, context_of, deployed_config, start_of
from deployed import asked as answered
from flwr.app import ConfigRecord, Context, RecordDict
from in_process import InProcessGrid, Silent, small_config
from writers import write_writers

from fedpriv import experiment
from fedpriv.errors import InputError
from fedpriv.federation.client_app import client_node
from fedpriv.federation.gate import reason_in
from fedpriv.federation.grids.base import identify
from fedpriv.federation.messages import flat_record, query_message, train_message
from fedpriv.federation.simulated import SimulatedContext, simulated_node, simulates
from fedpriv.flower_app import app

REAL = "this node is real; write runtime.deployment: true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_writers(tmp_path_factory.mktemp("data") / "users", COUNTS)


def bare() -> Context:
    """A SuperNode that was told nothing but its number: it has no policy and no folder."""
    return Context(1, 1000, {"partition-id": 0, "num-partitions": 2}, RecordDict(), {})


@pytest.fixture(scope="module")
def messages(folder):
    """What a server sends that says that it simulates."""
    identify()
    config = deployed_config(folder, runtime__deployment=False)
    arrays = flat_record(start_of(config))
    return {
        "whom it hosts": query_message(1000, config, "digest"),
        "to train": train_message(1000, config, arrays, 1, np.array([0]), (), data="digest"),
    }


@pytest.mark.parametrize("has", ["nothing of its own", "a folder"])
@pytest.mark.parametrize("asks", ["whom it hosts", "to train"])
def test_a_real_node_takes_no_part_in_what_is_said_to_be_a_simulation(folder, messages, has, asks):
    context = bare() if has == "nothing of its own" else context_of(folder)
    assert REAL in reason_in(answered(messages[asks], context))


def test_a_real_node_without_a_folder_reads_none_that_a_server_names(folder):
    """It may be the folder of somebody's data."""
    reply = answered(query_message(1000, deployed_config(folder)), bare())
    assert "data.path names a file or folder" in reason_in(reply)


def test_nothing_that_a_server_sends_makes_a_node_simulated(messages):
    """What it chooses of a node's context: the run's number, its config and its state."""
    context = bare()
    context.run_config = {"simulated": True, "runtime.deployment": False, "backend": "ray"}
    context.state = RecordDict({"simulated": ConfigRecord({"simulated": True})})
    context.run_id = context.series_id = 0
    message = messages["whom it hosts"]
    message.content["config"]["simulated"] = True
    assert REAL in reason_in(answered(message, context))


def test_only_an_actor_of_ray_or_a_node_of_ours_is_simulated(monkeypatch):
    """A SuperNode's own process may use Ray, as a driver of it."""

    class Ray:
        actor: str | None = None

        @staticmethod
        def is_initialized():
            return True

        @classmethod
        def get_runtime_context(cls):
            return cls

        @classmethod
        def get_actor_id(cls):
            return cls.actor

    monkeypatch.setitem(sys.modules, "ray", Ray)
    assert not simulated_node(bare())
    Ray.actor = "an id"
    assert simulated_node(bare())
    monkeypatch.delitem(sys.modules, "ray")
    assert not simulated_node(bare())
    assert simulated_node(SimulatedContext(1, 1000, {}, RecordDict(), {}))


def test_a_node_of_ours_answers_a_simulation():
    identify()
    assert reason_in(client_node(0, 2)(query_message(1000, small_config(rounds=1)))) is None


# ---------------------------------------------------------------- the server's end


@dataclass
class Run:
    """What Flower knows of a run, as far as anybody looks."""

    primary_task_type: str


class OfFlower(InProcessGrid):
    """A grid that Flower hands over, of a run of some task."""

    simulated = None

    def __init__(self, task: str) -> None:
        super().__init__()
        self.set_run(Run(task) if task else object())


KINDS = [("flwr-simulation", True), ("flwr-serverapp", False), ("another", False), ("", False)]


@pytest.mark.parametrize(("task", "simulated"), KINDS)
def test_nodes_of_flower_are_real_unless_its_run_is_a_simulation(tmp_path, task, simulated):
    grid = OfFlower(task)
    assert simulates(grid) is simulated
    changes = {"rounds": 1, "runtime__deployment": simulated}
    prepared = experiment.prepare(small_config(run_dir=str(tmp_path / "run"), **changes))
    directory = experiment.create(prepared)
    instead = "false" if simulated else "true"
    with pytest.raises(InputError, match=f"write runtime.deployment: {instead}"):
        experiment.train(prepared, directory, Silent(), lambda strategy: strategy.start(grid))
    assert not grid.sent


@pytest.mark.parametrize("deployment", [True, False])
def test_flwr_run_refuses_the_wrong_nodes_before_it_makes_anything(tmp_path, caplog, deployment):
    config = tmp_path / "config.yaml"
    config.write_text(small_config(runtime__deployment=deployment).to_yaml())
    grid = OfFlower("flwr-simulation" if deployment else "flwr-serverapp")
    run_config = {"config": str(config), "set": f"run_dir={tmp_path / 'run'}"}
    with pytest.raises(InputError):
        app(grid, Context(1, 0, {}, RecordDict(), run_config))
    (line,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "\n" not in line
    assert f"write runtime.deployment: {str(not deployment).lower()}" in line
    assert not (tmp_path / "run").exists()


def test_flower_calls_its_simulations_as_we_look_for_them():
    from flwr.supercore.constant import TaskType
    from flwr.supercore.run import Run

    assert (TaskType.SIMULATION, TaskType.SERVER_APP) == ("flwr-simulation", "flwr-serverapp")
    assert "primary_task_type" in Run.__dataclass_fields__
