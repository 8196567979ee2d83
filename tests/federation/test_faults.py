"""Nodes of a deployment are missing, fail or come back, and a ServerApp is started again."""

import errno
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from deployed import AfterRound, Deployed, deployed_config, three_nodes, trained
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from in_process import Silent, drive_on
from writers import write_writers

from fedpriv import experiment
from fedpriv.errors import BudgetError, InputError, WorkerLost
from fedpriv.federation import nodes as nodes_module
from fedpriv.flower_app import app
from fedpriv.privacy import Ledger, Randomness
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import privacy_statement
from fedpriv.threads import threads_of_torch


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    """One source of all randomness, so that runs can be compared to the bit."""
    monkeypatch.setattr(Randomness, "operating_system", lambda: Randomness(7, reproducible=False))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return three_nodes(tmp_path_factory.mktemp("nodes"))


class Failing(Deployed):
    """`fails` names, by how often nodes have been asked to train, who does not answer then."""

    def __init__(self, folders, fails: dict[int, Iterable[int]]) -> None:
        super().__init__(folders)
        self.fails, self.times = fails, 0
        self.asked_for: list[dict[int, list[int]]] = []

    def push_messages(self, messages):
        messages = list(messages)
        if any(message.metadata.message_type == "train" for message in messages):
            self.times += 1
            self.asked_for.append(
                {m.metadata.dst_node_id: m.content["config"]["users"] for m in messages}
            )
        return super().push_messages(messages)

    def answer(self, message):
        failing = message.metadata.dst_node_id - 1000 in self.fails.get(self.times, ())
        if failing and message.metadata.message_type == "train":
            return Message(Error(code=5, reason="it is gone"), reply_to=message)
        return super().answer(message)


EVERYBODY = {"privacy__sampling": {"kind": "all"}}
BY_USERS = {
    "privacy__noise_by": "users",
    "privacy__noise_multiplier": 4.0,
    "privacy__sampling": {"kind": "fixed_size", "expected_cohort": 9},
}


def deployment(tmp_path, folders, name="run", **changes):
    runtime = {"workers": 3, "deployment": True, "device": "cpu", "join_timeout": 0.2}
    settings = {
        "rounds": 3,
        "privacy__sampling": {"kind": "poisson", "expected_cohort": 9},
        "runtime": {**runtime, **changes.pop("runtime", {})},
    }
    config = deployed_config(folders[0], data={"users": 12}, **{**settings, **changes})
    return config.model_copy(update={"run_dir": tmp_path / name})


def charges(directory):
    return [(release.round, release.attempt) for release in Ledger.open(directory.ledger)]


def parameters(directory):
    return experiment.reopen(directory.path)[1].server.parameters()


# ---------------------------------------------------------------- too few answers


def test_a_round_that_too_few_took_part_in_is_tried_again_as_it_was(tmp_path, folders):
    """The same cohort and noise, of which nothing was released: it is paid for once."""
    with threads_of_torch(2):  # nodes compute in as many as the config says all the same
        whole = trained(deployment(tmp_path, folders, "whole"), Deployed(folders), Silent())
        grid, observer = Failing(folders, {2: {0, 1}, 3: {2, 1}}), Silent()
        directory = trained(deployment(tmp_path, folders), grid, observer)
    assert charges(directory) == charges(whole) == [(1, 0), (2, 0), (3, 0)]
    assert grid.asked_for[1] == grid.asked_for[2] == grid.asked_for[3]
    assert parameters(directory).equal(parameters(whole))
    assert [(row["tries"], row["nodes_lost"]) for row in observer.rows] == [(1, 0), (3, 0), (1, 0)]
    lost = [sentence for sentence in observer.sentences if "is lost" in sentence]
    assert len(lost) == 2
    assert "1 of 3 nodes took part, and by runtime.node_share 2 make a round" in lost[0]


def test_a_round_that_enough_took_part_in_counts_with_all_of_its_noise(tmp_path, folders):
    grid, observer = Failing(folders, {2: {1}}), Silent()
    directory = trained(deployment(tmp_path, folders), grid, observer)
    assert [(row["tries"], row["nodes_lost"]) for row in observer.rows] == [(1, 0), (1, 1), (1, 0)]
    assert charges(directory) == [(1, 0), (2, 0), (3, 0)]
    assert {release.noise_multiplier for release in Ledger.open(directory.ledger)} == {1.0}
    silent = [sentence for sentence in observer.sentences if "nothing of it arrived" in sentence]
    assert silent == ["node 1001 takes no part: nothing of it arrived in time"]


def test_noise_that_users_have_added_is_paid_for_in_each_try(tmp_path, folders):
    """Whoever received a message has it, whatever became of the round."""
    grid, observer = Failing(folders, {2: {0, 1}}), Silent()
    directory = trained(deployment(tmp_path, folders, **BY_USERS), grid, observer)
    assert charges(directory) == [(1, 0), (2, 0), (2, 1), (3, 0)]
    assert observer.rows[1]["tries"] == 2
    ledger = Ledger.open(directory.ledger)
    for asked, release in zip(grid.asked_for, ledger, strict=True):
        sent = {
            ledger.places[node - 1000].first + user
            for node, users in asked.items()
            for user in users
        }
        assert sent == set(release.users)


def test_tries_are_held_against_the_budget(tmp_path, folders):
    budget = {"privacy__budget": {"epsilon": 3.0}, "rounds": 40}
    config = deployment(tmp_path, folders, runtime={"retries": 100}, **BY_USERS, **budget)
    always = dict.fromkeys(range(2, 200), (0, 1))
    with pytest.raises(BudgetError, match="round 2 is not run"):
        trained(config, Failing(folders, always), Silent())


def test_a_round_that_is_lost_too_often_stops_the_run_which_goes_on_later(tmp_path, folders):
    whole = trained(deployment(tmp_path, folders, "whole"), Deployed(folders), Silent())
    always = dict.fromkeys(range(2, 99), (0, 1))
    grid = Failing(folders, always)
    config = deployment(tmp_path, folders, runtime={"retries": 2})
    with pytest.raises(WorkerLost, match=r"round 2 was lost 3 times.*resume the run"):
        trained(config, grid, Silent())
    assert grid.times == 4
    directory, prepared = experiment.reopen(tmp_path / "run")
    assert charges(directory) == [(1, 0)]
    experiment.train(prepared, directory, Silent(), drive_on(Deployed(folders)))
    assert charges(directory) == [(1, 0), (2, 0), (3, 0)]
    assert parameters(directory).equal(parameters(whole))


# ---------------------------------------------------------------- nodes that are not there


class Coming(Deployed):
    """The node `late` comes when the server has looked for nodes so many times."""

    late = -1

    def __init__(self, folders, after):
        super().__init__(folders)
        self.looks = itertools.count(1)
        self.after = after

    def get_node_ids(self):
        if next(self.looks) == self.after:
            self.away.discard(self.late)
        return super().get_node_ids()


def test_too_few_nodes_are_waited_for_and_told_in_one_line(tmp_path, folders, monkeypatch):
    monkeypatch.setattr(nodes_module, "_PATIENCE", 0.0)
    grid, observer = Coming(folders, after=3), Silent()
    grid.away, grid.late = {0, 2}, 2
    with pytest.raises(InputError, match=r"only 2 of 3 nodes \(runtime.workers\) came within 0.2"):
        trained(deployment(tmp_path, folders), grid, observer)
    within = "start the others within 0 s (runtime.join_timeout)"
    assert observer.sentences == [
        f"waiting for nodes: {there} of 3 are there; {within}" for there in (1, 2)
    ]
    assert not grid.sent
    assert not list(Ledger.open(tmp_path / "run" / "ledger.jsonl"))


@pytest.mark.parametrize("noise", [{}, BY_USERS], ids=["by the server", "by users"])
def test_nobody_is_asked_or_charged_while_too_few_nodes_are_there(tmp_path, folders, noise):
    """Two of three leave after round 1, and are back after two waits."""

    class Told(AfterRound):
        def say(self, sentence):
            super().say(sentence)
            if sum("is lost" in each for each in self.sentences) == 2:
                grid.away.clear()

    grid = Failing(folders, {})
    observer = Told(1, lambda: grid.away.update({0, 1}))
    directory = trained(deployment(tmp_path, folders, **noise), grid, observer)
    assert charges(directory) == [(1, 0), (2, 0), (3, 0)]
    assert grid.times == 3
    assert observer.rows[1]["tries"] == 3
    assert any("1 of 3 nodes are there" in sentence for sentence in observer.sentences)


def test_absent_nodes_are_counted_and_told(tmp_path, folders):
    grid = Deployed(folders)
    observer = AfterRound(1, lambda: grid.away.add(2))
    config = deployment(tmp_path, folders, **EVERYBODY, rounds=4)
    directory = trained(config, grid, observer)
    counted = [(row["nodes_absent"], row["nodes_lost"]) for row in observer.rows]
    assert counted == [(0, 0), (1, 0), (1, 0), (1, 0)]
    told = [sentence for sentence in observer.sentences if "take part" in sentence]
    assert told == [
        "2 of 3 nodes take part; the users of the others contribute nothing until they do"
    ]
    run = read_run(directory.path)
    sections = {each.key: each.sentences for each in privacy_statement(run, spent(run)).sections}
    assert any(
        "Of 4 rounds nodes were absent in 3 (rounds 2–4)." in each for each in sections["logged"]
    )


def test_a_node_whose_data_cannot_be_read_is_left_out_and_its_log_alone_says_why(
    tmp_path, folders, caplog
):
    broken = write_writers(tmp_path / "private-name", {900: 4})
    (broken / "train-images-idx3-ubyte").write_bytes(b"torn")
    grid, observer = Deployed([*folders[:2], broken]), Silent()
    directory = trained(deployment(tmp_path, folders), grid, observer)
    assert [row["nodes_absent"] for row in observer.rows] == [1, 1, 1]
    assert charges(directory) == [(1, 0), (2, 0), (3, 0)]
    withheld = "takes no part: it could not do its part; the reason is in its own log"
    assert any(withheld in sentence for sentence in observer.sentences)
    assert not any("private" in sentence for sentence in observer.sentences)
    own = [line for line in caplog.records if "cannot do its part" in line.getMessage()]
    assert own
    # One line, for the operator who can mend it, and no trace of code that nobody can.
    assert all("private-name" in line.getMessage() and not line.exc_info for line in own)
    written = [path.read_bytes() for path in directory.path.rglob("*") if path.is_file()]
    assert not any(b"private-name" in text for text in written)


@pytest.mark.parametrize("mended", [True, False])
def test_nodes_whose_data_are_not_there_yet_are_asked_again(tmp_path, folders, mended):
    class Mounted(Silent):
        def say(self, sentence):
            super().say(sentence)
            if mended and "is lost" in sentence:
                grid.folders = folders

    grid, observer = Deployed([tmp_path / "not mounted"] * 3), Mounted()
    config = deployment(tmp_path, folders)
    if not mended:
        with pytest.raises(WorkerLost, match="lost 4 times: none of 3 nodes says whom it hosts"):
            trained(config, grid, observer)
        assert not list(Ledger.open(tmp_path / "run" / "ledger.jsonl"))
        return
    directory = trained(config, grid, observer)
    assert charges(directory) == [(1, 0), (2, 0), (3, 0)]
    assert [row["tries"] for row in observer.rows] == [2, 1, 1]


# ---------------------------------------------------------------- a ServerApp that is started again


class KilledError(BaseException):
    """The ServerApp's process ends here."""


def start(tmp_path, config, grid):
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    app(grid, Context(1, 0, {}, RecordDict(), {"config": str(file), "set": ""}))


def test_a_server_app_that_is_started_again_goes_on_where_it_stopped(tmp_path, folders):
    class Dying(Failing):
        def answer(self, message):
            if self.times == 3:
                raise KilledError
            return super().answer(message)

    whole = trained(deployment(tmp_path, folders, "whole"), Deployed(folders), Silent())
    config = deployment(tmp_path, folders)
    with pytest.raises(KilledError):
        start(tmp_path, config, Dying(folders, {}))
    again = Failing(folders, {})
    again.away = {1}  # and one of the nodes is not there, when it goes on
    start(tmp_path, config, again)
    directory, prepared = experiment.reopen(tmp_path / "run")
    assert prepared.finished_rounds == 3
    assert again.times == 1
    assert charges(directory) == charges(whole)
    assert [row["round"] for row in directory.read_metrics()] == [1, 2, 3]
    finished = Failing(folders, {})
    start(tmp_path, config, finished)
    assert not finished.sent


def test_what_is_started_again_is_the_same_run(tmp_path, folders):
    config = deployment(tmp_path, folders, rounds=1)
    start(tmp_path, config, Deployed(folders))
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    for changes in ({"rounds": 2}, {"privacy__noise_multiplier": 0.5, "rounds": 1}):
        with pytest.raises(InputError, match="holds a run of another config"):
            start(tmp_path, deployment(tmp_path, folders, **changes), Deployed(folders))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        start(tmp_path, deployment(tmp_path, folders, "other"), Deployed(folders))
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before


# ---------------------------------------------------------------- full disks


def full_at(monkeypatch, which, times):
    """The disk fills up when a file whose name begins with `which` is synced for so many times."""
    real, seen = os.fsync, []

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name.startswith(which):
            seen.append(path)
            if len(seen) >= times:
                # What was written last has not all found room.
                os.truncate(path, path.stat().st_size - 20)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


ONCE = [(1, 0), (2, 0), (3, 0)]
# The ledger has a header and the places of three nodes before its first release.
FULL = {
    "header": ("ledger.jsonl", 1, ONCE),
    "places": ("ledger.jsonl", 3, ONCE),
    "a release": ("ledger.jsonl", 6, ONCE),
    # It was charged, and nobody knows who has seen it: it is drawn afresh, and paid for again.
    "a checkpoint": ("round-000002", 1, [(1, 0), (2, 0), (2, 1), (3, 0)]),
}


@pytest.mark.parametrize(("which", "times", "paid"), FULL.values(), ids=FULL)
def test_a_full_disk_is_told_in_a_line_and_the_run_goes_on_when_there_is_room(
    tmp_path, folders, caplog, which, times, paid
):
    config = deployment(tmp_path, folders)
    with pytest.MonkeyPatch.context() as full:
        full_at(full, which, times)
        with pytest.raises(OSError, match="No space left"):
            start(tmp_path, config, Deployed(folders))
    told = [line.getMessage() for line in caplog.records if "a disk is full" in line.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("fedpriv: ")
    assert told[0].endswith("then start the same run again")
    start(tmp_path, config, Deployed(folders))
    directory, prepared = experiment.reopen(tmp_path / "run")
    assert prepared.finished_rounds == 3
    assert [row["round"] for row in directory.read_metrics()] == [1, 2, 3]
    assert charges(directory) == paid


def test_room_for_a_round_is_held_before_anybody_is_asked(tmp_path, folders, monkeypatch):
    real, full, held = os.posix_fallocate, set(), []

    def fallocate(descriptor, offset, size):
        held.append(size)
        if len(held) in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    config, grid = deployment(tmp_path, folders), Failing(folders, {})
    full.update({2, 3})  # after round 1, and when it is started again
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            start(tmp_path, config, grid)
        directory = experiment.reopen(tmp_path / "run")[0]
        assert charges(directory) == [(1, 0)]
        assert grid.times == 1
        assert not list(directory.path.rglob("*.partial"))
    start(tmp_path, config, Deployed(folders))
    assert charges(directory) == ONCE
    newest = max(directory.checkpoints.iterdir())
    assert min(held) > newest.stat().st_size + 2 * directory.metrics.stat().st_size / 3
    assert not directory.held.exists()


def test_a_disk_that_fills_up_in_a_round_has_room_for_what_was_paid_for(tmp_path, folders):
    class Filling(Deployed):
        def answer(self, message):
            directory = tmp_path / "run"
            if message.metadata.message_type == "train":
                sizes.append((directory / "room.partial").stat().st_blocks * 512)
            return super().answer(message)

    sizes: list[int] = []
    directory = trained(deployment(tmp_path, folders), Filling(folders), Silent())
    assert len(sizes) == 9
    assert min(sizes) > max(directory.checkpoints.iterdir()).stat().st_size
