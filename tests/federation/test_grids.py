"""Our grids: what is sent comes, what fails is told, and who dies is replaced, alone."""

import os
import signal
import time

import numpy as np
import pytest
import ray
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from in_process import InProcessGrid, Silent, small_config, train_small
from ray.exceptions import OutOfDiskError

from fedpriv import experiment
from fedpriv.disk import has_no_room
from fedpriv.errors import ClientFault, InputError, WorkerLost
from fedpriv.federation import client_app
from fedpriv.federation.grids import ray as ray_grids
from fedpriv.federation.grids.base import OwnGrid
from fedpriv.federation.grids.local import LocalGrid
from fedpriv.federation.grids.ray import RayGrid
from fedpriv.federation.messages import flat_record, flat_tensor
from fedpriv.federation.ray_cluster import cluster, ensure_started
from fedpriv.privacy import Ledger
from fedpriv.runtime import RuntimeConfig

RUNTIME = RuntimeConfig(workers=2)


def obedient(partition: int, partitions: int):
    """A node that does what its messages say: nothing, die, raise, or sleep."""

    def answer(message: Message) -> Message:
        order = str(message.content["config"]["order"])
        if order == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "raise":
            raise KeyError("a bug")
        if order == "sleep":
            time.sleep(60)
        doubled = flat_record(2 * flat_tensor(message.content["arrays"]))
        said = ConfigRecord({"order": order, "partition": partition, "pid": os.getpid()})
        return Message(RecordDict({"sum": doubled, "said": said}), reply_to=message)

    return answer


def sent(node: int, order: str = "", arrays: ArrayRecord | None = None) -> Message:
    content = RecordDict(
        {
            "config": ConfigRecord({"order": order}),
            "arrays": arrays or flat_record(torch.arange(3.0)),
        }
    )
    return Message(content, node, MessageType.TRAIN)


def said(replies: list[Message]) -> dict[int, str]:
    """What each node answered, by its id."""
    return {
        reply.metadata.src_node_id: "lost"
        if reply.has_error()
        else str(reply.content["said"]["order"])
        for reply in replies
    }


def first_of(grid: OwnGrid, ids: list[str]) -> list[Message]:
    """The first replies that come."""
    while True:
        if replies := grid.pull_messages(ids):
            return replies


def all_up(grid: RayGrid) -> list[int]:
    """The ids of both nodes, as soon as both are up."""
    deadline = time.monotonic() + 120
    while len(nodes := grid.get_node_ids()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return nodes


@pytest.fixture(scope="module")
def up():
    """A cluster with room for three nodes."""
    room = RuntimeConfig(workers=3)
    with cluster(room):
        ensure_started(room)
        yield


@pytest.fixture(scope="module")
def actors(up):
    return RayGrid(RUNTIME, obedient)


@pytest.fixture
def ray_grid(actors):
    all_up(actors)
    for place in actors._places.values():
        place.deaths = place.answers = 0
    return actors


@pytest.fixture(params=["local", "ray"])
def grid(request):
    return (
        LocalGrid(2, obedient) if request.param == "local" else request.getfixturevalue("ray_grid")
    )


def test_arrays_come_and_go_as_they_are(grid):
    arrays = flat_record(torch.randn(300_000, dtype=torch.float64))
    messages = [sent(node, arrays=arrays) for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages, timeout=240)
    assert sorted(reply.metadata.src_node_id for reply in replies) == [1000, 1001]
    for reply in replies:
        assert flat_tensor(reply.content["sum"]).equal(2 * flat_tensor(arrays))
    assert set(messages[0].content) == {"config", "arrays"}


def test_arrays_that_nodes_share_travel_once(ray_grid, monkeypatch):
    put, stored = ray.put, []
    monkeypatch.setattr(ray, "put", lambda value: (stored.append(value), put(value))[1])
    arrays = flat_record(torch.zeros(10))
    ray_grid.send_and_receive([sent(node, arrays=arrays) for node in (1000, 1001)])
    assert stored == [arrays]


def test_an_exception_of_a_nodes_code_is_told_and_no_loss(grid):
    ids = grid.push_messages([sent(1000, "raise")])
    with pytest.raises(ClientFault, match=r"a node's code raised KeyError: 'a bug'") as caught:
        first_of(grid, ids)
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_a_node_still_owes_when_it_is_asked_anew_is_dropped(grid):
    (late,) = grid.push_messages([sent(1000, "sleep" if isinstance(grid, RayGrid) else "late")])
    if isinstance(grid, RayGrid):
        assert grid.pull_messages([late]) == []
    (now,) = grid.push_messages([sent(1000, "now")])
    assert said(first_of(grid, [late, now])) == {1000: "now"}
    assert grid.pull_messages([late, now]) == []


def test_whoever_dies_is_replaced_alone(ray_grid):
    first = ray_grid.send_and_receive([sent(1000), sent(1001)])
    replies = ray_grid.send_and_receive([sent(1000, "die"), sent(1001)])
    assert said(replies) == {1000: "lost", 1001: ""}
    assert 1001 in ray_grid.get_node_ids()
    assert all_up(ray_grid) == [1000, 1001]
    again = ray_grid.send_and_receive([sent(1000), sent(1001)])
    assert said(again) == {1000: "", 1001: ""}
    before, after = processes(first), processes(again)
    assert before[1001] == after[1001]
    assert before[1000] != after[1000]


def processes(replies: list[Message]) -> dict[int, int]:
    return {reply.metadata.src_node_id: int(reply.content["said"]["pid"]) for reply in replies}


@pytest.mark.parametrize(("answers", "ends"), [(3, True), (4, False)])
def test_a_node_that_dies_again_and_again_ends_the_run(ray_grid, monkeypatch, answers, ends):
    """A few answers between deaths begin no new series."""
    monkeypatch.setattr(RayGrid, "_started", lambda *_: ray_grid._places[1001].actor)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    place = ray_grid._places[1000]
    place.deaths, place.answers = 4, answers
    if ends:
        with pytest.raises(WorkerLost, match=r"node 0 died 5 times in a row .* is memory short"):
            ray_grid._replace(place, OSError("gone"))
    else:
        ray_grid._replace(place, OSError("gone"))
        assert (place.deaths, place.answers) == (1, 0)


def test_where_ray_itself_has_died_no_node_is_waited_for(ray_grid, monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": False}])
    ids = ray_grid.push_messages([sent(1000, "die")])
    with pytest.raises(WorkerLost, match="Ray itself has died"):
        first_of(ray_grid, ids)


def test_a_node_that_cannot_start_is_no_dropout(up):
    def absent(partition, partitions):
        raise ModuleNotFoundError("No module named 'mine'")

    grid = RayGrid(RuntimeConfig(workers=1), absent)
    ids = grid.push_messages([sent(1000)])
    with pytest.raises(ClientFault, match=r"node 0 does not start: .*No module named 'mine'"):
        first_of(grid, ids)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": 5}, r"runtime.workers: 5 of 1 CPU each .* has 3, .* at most 3"),
        ({"threads_per_worker": 2}, r"2 of 2 CPU each .* at most 1"),
        ({"gpus_per_worker": 0.25}, r"2 of 0.25 GPU each .* has 0"),
    ],
)
def test_nodes_for_which_there_is_no_room_are_refused(up, changes, words):
    with pytest.raises(InputError, match=words):
        RayGrid(RUNTIME.model_copy(update=changes), obedient)


def test_torchs_threads_are_the_nodes_while_they_answer_and_then_as_before():
    before, seen = torch.get_num_threads(), []

    def node(partition, partitions):
        def answer(message):
            seen.append(torch.get_num_threads())
            return Message(RecordDict(), reply_to=message)

        return answer

    LocalGrid(1, node, threads=before + 1).send_and_receive([sent(1000)])
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_flowers_grids_get_the_bytes_that_flower_would_send():
    """An array is inflated there as one of Flower's own."""
    flat = np.arange(5.0)
    ours = flat_record(torch.from_numpy(flat))["flat"]
    inflated = Array.inflate(ours.deflate(), ours.children)
    np.testing.assert_array_equal(inflated.numpy(), flat)
    assert inflated.object_id == ours.object_id


def test_a_machine_of_a_cluster_that_is_silent_is_given_up(up, monkeypatch):
    """Its processes are there and do nothing, as if the network were gone; a busy one is heard."""
    monkeypatch.setattr(ray_grids, "_SILENCE", 1.0)
    grid = RayGrid(RuntimeConfig(workers=1, ray_address="joined:1"), obedient)
    (pid,) = processes(grid.send_and_receive([sent(1000)])).values()
    (asked,) = grid.push_messages([sent(1000, "sleep")])
    until = time.monotonic() + 3
    while time.monotonic() < until:
        assert grid.pull_messages([asked]) == []
    os.kill(pid, signal.SIGSTOP)
    try:
        assert said(first_of(grid, [asked])) == {1000: "lost"}
    finally:
        os.kill(pid, signal.SIGKILL)


def test_no_room_for_an_array_is_a_full_disk(ray_grid, monkeypatch):
    def full(value):
        raise OutOfDiskError("Local disk is full")

    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(OSError, match=r"Ray's object store") as caught:
        ray_grid.push_messages([sent(1000)])
    assert has_no_room(caught.value)


# ---------------------------------------------------------------- runs


def test_a_run_in_which_a_users_code_raises_charges_nothing(tmp_path, monkeypatch):
    def faulty(*given):
        raise KeyError("a bug")

    monkeypatch.setattr(client_app, "train_cohort", faulty)
    prepared = experiment.prepare(
        small_config(run_dir=str(tmp_path / "run"), runtime__grid="local")
    )
    directory = experiment.create(prepared)
    with pytest.raises(ClientFault, match=r"KeyError: 'a bug'"):
        experiment.train(prepared, directory, Silent())
    assert len(Ledger.open(directory.ledger)) == 0


class Replacing(InProcessGrid):
    """Node 1 dies in round 2, is away in round 3, and is back in round 4."""

    replaces_nodes = True

    def push_messages(self, messages):
        messages = list(messages)
        if messages[0].metadata.message_type == "train":
            round_ = int(messages[0].metadata.group_id)
            self.dead = {1} if round_ == 2 else set()
        return super().push_messages(messages)

    def get_node_ids(self):
        asked = [int(m.metadata.group_id) for m in self.sent if m.metadata.message_type == "train"]
        return [1000] if max(asked, default=0) == 2 else super().get_node_ids()


def test_users_of_a_lost_node_are_trained_elsewhere_until_it_is_back(tmp_path):
    grid = Replacing()
    directory, _ = train_small(tmp_path / "run", grid)
    rows = directory.read_metrics()
    assert [row["nodes_lost"] for row in rows] == [0, 1, 0, 0]
    trained = {round_: {} for round_ in range(1, 5)}
    for message in grid.sent:
        if message.metadata.message_type == "train":
            work = message.content["config"]
            trained[work["round"]][message.metadata.dst_node_id] = list(work["users"])
    assert [sorted(nodes) for nodes in trained.values()] == [
        [1000, 1001], [1000, 1001], [1000], [1000, 1001],
    ]  # fmt: skip
    assert len(trained[3][1000]) == rows[2]["simulation_only"]["cohort"]
    assert len(Ledger.open(directory.ledger)) == 4


def test_where_nodes_add_the_noise_all_of_them_are_waited_for(tmp_path):
    """Fewer would release noise alone, for the same price."""

    class Late(Replacing):
        looked = 0

        def get_node_ids(self):
            nodes = super().get_node_ids()
            self.looked += len(nodes) < 2
            return [1000, 1001] if self.looked > 3 else nodes

    grid = Late()
    changes = {"privacy__noise_by": "nodes", "privacy__lost_nodes": 1}
    directory, _ = train_small(tmp_path / "run", grid, **changes)
    assert [row["nodes_lost"] for row in directory.read_metrics()] == [0, 1, 0, 0]
    asked = [m.metadata.group_id for m in grid.sent if m.metadata.message_type == "train"]
    assert asked.count("3") == 2


@pytest.mark.parametrize("noise_by", ["server", "nodes"])
def test_a_round_waits_for_a_node_that_died_when_it_was_asked_whom_it_hosts(tmp_path, noise_by):
    """With the noise of nodes it would release noise alone; with no node, nothing at all."""

    class DiesOnce(InProcessGrid):
        replaces_nodes = True
        queries = 0

        def answer(self, message):
            if message.metadata.message_type == "query":
                self.queries += 1
                if self.queries == 1:
                    return Message(Error(code=0, reason="the worker died"), reply_to=message)
            return super().answer(message)

    workers = 1 if noise_by == "server" else 2
    grid = DiesOnce(workers)
    directory, _ = train_small(
        tmp_path / "run", grid, rounds=1, runtime__workers=workers, privacy__noise_by=noise_by
    )
    (row,) = directory.read_metrics()
    assert row["nodes_lost"] == 0
    assert "noise_only" not in row
    assert grid.queries == 2 * workers


def test_what_belongs_to_ray_is_refused_without_it():
    with pytest.raises(InputError, match=r"gpus_per_worker: belongs to Ray"):
        small_config(runtime={"grid": "local", "gpus_per_worker": 1})
    with pytest.raises(InputError, match=r"ray_address: belongs to Ray"):
        small_config(runtime={"grid": "local", "ray_address": "10.0.0.1:6379"})


def test_memories_that_other_machines_would_not_see_are_refused():
    with pytest.raises(
        InputError, match=r"error_feedback: user keeps memories in the run director"
    ):
        small_config(runtime={"ray_address": "10.0.0.1:1"}, privacy__error_feedback="user")


def test_a_machine_of_a_cluster_with_other_data_is_refused():
    config = small_config(runtime={"ray_address": "10.0.0.1:1"})
    there = experiment.prepare(config).trainer.dataset.digest()
    trainers = client_app._Trainers()
    assert trainers.of(config, there).dataset.digest() == there
    with pytest.raises(InputError, match=r"^data: .* has other data .* copy the same files"):
        trainers.of(config, "another digest")
