"""Nodes that lie: none moves the model beyond its users' bound, and none ends a run."""

from __future__ import annotations

import io
import math
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from in_process import InProcessGrid, Silent, drive_on, small_config

from fedpriv import experiment
from fedpriv.errors import ClientFault, Interrupted
from fedpriv.federation import inbox
from fedpriv.federation.gate import Asked, Expected, Refused, hosting_in, sum_in
from fedpriv.federation.grids.base import FIRST_NODE
from fedpriv.federation.messages import FlatArray
from fedpriv.privacy import Ledger

LIAR = FIRST_NODE + 1
Lie = Callable[[Message], None]


def says(**values: Any) -> Lie:
    """Another value of what the node saw; None leaves it out."""

    def lie(reply: Message) -> None:
        for name, value in values.items():
            if value is None:
                del reply.content["seen"][name]
            else:
                reply.content["seen"][name] = value

    return lie


def sends(change: Callable[[np.ndarray], Any]) -> Lie:
    """Another sum, as an array that stays one in this process."""

    def lie(reply: Message) -> None:
        total = np.array(reply.content["sum"]["flat"].numpy())
        reply.content["sum"] = ArrayRecord({"flat": FlatArray(np.asarray(change(total)))})

    return lie


def writes(change: Callable[[bytes], bytes], stype: str = "numpy.ndarray") -> Lie:
    """Another sum, as bytes that came over a network; what Flower says of them is not read."""

    def lie(reply: Message) -> None:
        honest = Array(np.array(reply.content["sum"]["flat"].numpy()))
        array = Array("float64", (1,), stype, change(honest.data))
        reply.content["sum"] = ArrayRecord({"flat": array})

    return lie


def saved(numbers: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, numbers, **options)
    return file.getvalue()


def header(shape: tuple[int, ...], descr: Any = "<f8", order: bool = False) -> bytes:
    """A header of NumPy's format without the numbers that it promises."""
    file = io.BytesIO()
    written = {"descr": descr, "fortran_order": order, "shape": shape}
    np.lib.format.write_array_header_1_0(file, written)
    return file.getvalue()


def replaced(name: str, value: Any) -> Lie:
    def lie(reply: Message) -> None:
        reply.content[name] = value

    return lie


def removed(name: str) -> Lie:
    def lie(reply: Message) -> None:
        del reply.content[name]

    return lie


def in_the_name_of(node: int) -> Lie:
    def lie(reply: Message) -> None:
        reply.metadata.__dict__["_src_node_id"] = node

    return lie


def both(*lies: Lie) -> Lie:
    def lie(reply: Message) -> None:
        for each in lies:
            each(reply)

    return lie


def answering(message: str) -> Lie:
    def lie(reply: Message) -> None:
        reply.metadata.__dict__["_reply_to_message_id"] = message

    return lie


MILLION = 10**6
LIES: dict[str, Lie] = {
    "a huge sum": sends(lambda total: total * 0 + 1e5),
    "a sum a little too large": sends(lambda total: total / np.linalg.norm(total) * 6.1),
    "a sum of NaN": sends(lambda total: total * math.nan),
    "one NaN": sends(lambda total: np.where(np.arange(len(total)) == 3, math.nan, total)),
    "one infinity": sends(lambda total: np.where(np.arange(len(total)) == 3, math.inf, total)),
    "numbers whose squares overflow": sends(lambda total: total * 0 + 1e200),
    "one number less": sends(lambda total: total[:-1]),
    "one number more": sends(lambda total: np.append(total, 0.0)),
    "no number": sends(lambda total: total[:0]),
    "a matrix": sends(lambda total: total[None]),
    "a scalar": sends(lambda total: total[0]),
    "float32": sends(lambda total: total.astype(np.float32)),
    "float16": sends(lambda total: total.astype(np.float16)),
    "integers": sends(lambda total: total.astype(np.int64)),
    "booleans": sends(lambda total: total > 0),
    "complex numbers": sends(lambda total: total.astype(np.complex128)),
    "the other byte order": sends(lambda total: total.astype(">f8")),
    "text": sends(lambda total: np.array(["x"] * len(total))),
    "no bytes": writes(lambda data: b""),
    "bytes that are no array": writes(lambda data: b"x" * 100),
    "bytes cut short": writes(lambda data: data[:-8]),
    "half a header": writes(lambda data: data[:20]),
    "more bytes": writes(lambda data: data + bytes(8)),
    "many more bytes": writes(lambda data: data + bytes(2 * MILLION)),
    "another stype": writes(lambda data: data, stype="pickle"),
    "a pickle": writes(lambda data: saved(np.array([{}], dtype=object), allow_pickle=True)),
    "an archive": writes(lambda data: b"PK\x03\x04" + bytes(100)),
    "a promise of a terabyte": writes(lambda data: header((2**37,))),
    "a negative shape": writes(lambda data: header((-1,)) + data[128:]),
    "a header that is code": writes(lambda data: data[:10] + b"__import__('os')" + data[26:]),
    "Fortran's order of a matrix": writes(lambda data: header((1, 5), order=True) + data[128:]),
    "float32 as bytes": writes(lambda data: saved(np.zeros(7, np.float32))),
    "NaN as bytes": writes(lambda data: data[:-8] + np.array([math.nan]).tobytes()),
    "version 9 of the format": writes(lambda data: data[:6] + b"\x09\x00" + data[8:]),
    "no array": lambda reply: replaced("sum", ArrayRecord())(reply),
    "two arrays": lambda reply: reply.content["sum"].update({"more": Array(np.zeros(3))}),
    "an array of another name": replaced("sum", ArrayRecord({"other": Array(np.zeros(3))})),
    "metrics for a sum": replaced("sum", MetricRecord({"flat": 1.0})),
    "a config for a sum": replaced("sum", ConfigRecord({"flat": b"x"})),
    "no sum": removed("sum"),
    "nothing seen": removed("seen"),
    "arrays for what was seen": replaced("seen", ArrayRecord({"a": Array(np.zeros(3))})),
    "more than was asked for": replaced("more", ConfigRecord({"a": 1})),
    "a file beside it": replaced("journal", ConfigRecord({"path": "/etc/passwd"})),
    "nothing": lambda reply: reply.content.clear(),
    "another's partition": says(partition=0),
    "a partition that is not there": says(partition=7),
    "a negative partition": says(partition=-1),
    "a partition in words": says(partition="1"),
    "a partition that is a fraction": says(partition=1.0),
    "a partition that is true": says(partition=True),
    "no partition": says(partition=None),
    "in the name of a node that is not there": in_the_name_of(9999),
    "in the name of the server": in_the_name_of(1),
    "in the name of the other node": both(in_the_name_of(FIRST_NODE), says(partition=0)),
    "in the other's name, twice as large": both(
        in_the_name_of(FIRST_NODE), says(partition=0), sends(lambda total: total * 2)
    ),
    "an answer to what was never asked": answering("e3b0c442"),
    "an answer to nothing": answering(""),
    "more users than asked for": says(users=13),
    "fewer than no users": says(users=-1),
    "users in words": says(users="many"),
    "users that are a fraction": says(users=1.5),
    "users that are true": says(users=True),
    "no users": says(users=None),
    "more users not finite than users": says(non_finite=MILLION),
    "fewer than no examples": says(examples=-5),
    "examples in words": says(examples="all"),
    "fewer than none skipped": says(skipped=-1),
    "a loss in words": says(loss="low"),
    "losses": says(loss=[1.0]),
    "a loss beyond all floats": says(loss=10**400),
    "more clipped than users": says(clipped=MILLION),
    "fewer clipped than none": says(clipped=-1),
    "NaN clipped": says(clipped=math.nan),
    "infinitely many clipped": says(clipped=math.inf),
    "too few blocks": says(block_clipped=[0.0]),
    "a block clipped too often": lambda reply: says(
        block_clipped=[1e9] * len(reply.content["seen"]["block_clipped"])
    )(reply),
    "norms of too many blocks": lambda reply: says(
        block_norms=[*reply.content["seen"]["block_norms"], 1.0]
    )(reply),
    "norms in words": lambda reply: says(
        block_norms=["x"] * len(reply.content["seen"]["block_norms"])
    )(reply),
    "norms that are a number": says(block_norms=1.0),
    "bounds that move where none adapts": says(bound_moves=[1.0]),
    "bounds that move by NaN": says(bound_moves=[math.nan]),
    "bounds that are bytes": says(bound_moves=b"abc"),
    "memories that are reset before they are kept": says(memory_reset=MILLION),
    "a memory's norm in words": says(memory_norm="none"),
    "more trained alone than users": says(alone=MILLION),
    "a reason that is a number": says(slowed=1),
    "reasons": says(slowed=["a", "b"]),
}


class Lying(InProcessGrid):
    """The node of partition 1 tells another lie in every round."""

    #: The run goes on, as with nodes that are started anew.
    replaces_nodes = True

    def __init__(self, lies: list[Lie], **options: Any) -> None:
        super().__init__(**options)
        self.lies = iter(lies)

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        asked = message.metadata
        if (asked.message_type, asked.dst_node_id) == ("train", LIAR) and not reply.has_error():
            next(self.lies)(reply)
        return reply


def train(folder, grid, **changes):
    prepared = experiment.prepare(small_config(run_dir=str(folder), **changes))
    directory, observer = experiment.create(prepared), Silent()
    experiment.train(prepared, directory, observer, drive_on(grid))
    return prepared, directory, observer


#: Who is drawn comes from the operating system, so everybody is: a node without users is not asked.
DEPLOYED = {
    "runtime": {"workers": 2, "deployment": True, "device": "cpu"},
    "data__users": 60,
    "privacy__sampling": {"kind": "all"},
}


@pytest.fixture(scope="module")
def settings():
    """A deployment in which nothing is left to chance: everybody, all at once, without noise."""
    return {
        **DEPLOYED,
        "rounds": len(LIES),
        "evaluation__every": 1000,
        "data__users": 12,
        "local": {"epochs": 1, "batch_size": 6, "lr": 0.1},
        "privacy__clipping": {"kind": "global", "bound": 0.1},
        "privacy__sampling": {"kind": "fixed_size", "expected_cohort": 12},
        "privacy__noise_multiplier": 0.0,
        "server": {"optimizer": "sgd", "lr": 1.0},
    }


def assert_alike(one, other):
    """But for rounding: the order of a user's examples is a secret of its node."""
    one, other = one.server.parameters(), other.server.parameters()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_run_goes_on_as_if_a_node_that_lies_were_away(tmp_path, settings):
    lying, directory, observer = train(tmp_path / "lying", Lying(list(LIES.values())), **settings)
    away = Lying([], dead=[1])
    honest, _, _ = train(tmp_path / "away", away, **settings)
    assert_alike(lying, honest)
    assert len(Ledger.open(directory.ledger)) == len(LIES)
    assert [row["nodes_lost"] for row in observer.rows] == [1] * len(LIES)
    told = [each for each in observer.sentences if "takes no part" in each]
    # Whoever speaks in another's name is refused, and the other is missed.
    told = [each for each in told if "nothing of it arrived" not in each]
    assert len(told) == len(LIES)
    for sentence in told:
        assert sentence.isprintable()
        assert len(sentence) < 200


def test_what_honest_nodes_send_passes_in_process_and_as_bytes(tmp_path, settings):
    few = {**settings, "rounds": 2}
    honest, _, _ = train(tmp_path / "plain", InProcessGrid(), **few)
    as_bytes = Lying([writes(lambda data: data)] * 2)
    sent, _, observer = train(tmp_path / "bytes", as_bytes, **few)
    assert_alike(sent, honest)
    assert not observer.sentences


def reply_of(total: np.ndarray, users: int = 3) -> Message:
    seen = {
        **dict.fromkeys(["examples", "skipped", "non_finite", "memory_reset", "alone"], 0),
        "slowed": "",
        **dict.fromkeys(["loss", "norm", "clipped", "memory_norm"], 0.0),
        "users": users,
        "partition": 1,
        "block_norms": [0.0],
        "block_clipped": [0.0],
        "block_shares": [0.0],
        "block_sent": [0.0],
        "bound_moves": [],
    }
    content = RecordDict(
        {"sum": ArrayRecord({"flat": FlatArray(total)}), "seen": ConfigRecord(seen)}
    )
    asked = Message(RecordDict(), LIAR, "train")
    return Message(content, reply_to=asked)


def test_a_sum_may_have_the_bound_of_each_user_and_no_more():
    expected = Expected(4, 1, 0, lambda users: (0.25 * users,), seen=False)
    asked = {LIAR: Asked(1, 3)}
    at_most = np.array([0.75, 0.0, 0.0, 0.0])
    assert sum_in(reply_of(at_most), asked, expected)[0] == 1
    with pytest.raises(Refused, match=r"at most 0\.75"):
        sum_in(reply_of(at_most * (1 + 1e-5)), asked, expected)
    with pytest.raises(Refused, match="not asked"):
        sum_in(reply_of(at_most), {}, expected)


def test_a_bound_holds_for_each_payload(tmp_path):
    def larger_control(total):
        model, control = np.split(total, 2)
        return np.concatenate([model, np.full_like(control, 0.01)])

    algorithm = {"name": "scaffold", "bounds": {"control": 1e-3}}
    grid = Lying([sends(larger_control)])
    with pytest.raises(ClientFault, match="is possible"):
        train(tmp_path, grid, algorithm=algorithm, rounds=1)


def test_bounds_of_users_follow_no_moves_that_a_node_claims(tmp_path):
    clipping = {"kind": "adaptive", "bound": 0.1}
    grid = Lying([says(bound_moves=[10.0])])
    _, _, observer = train(tmp_path, grid, privacy__clipping=clipping, rounds=1, **DEPLOYED)
    assert observer.rows[0]["nodes_lost"] == 1


def test_one_users_infinite_loss_does_not_lose_the_others(tmp_path):
    _, _, observer = train(tmp_path, Lying([says(loss=math.inf)]), rounds=1)
    assert observer.rows[0]["nodes_lost"] == 0


@pytest.mark.parametrize("noise_by", ["nodes", "users"])
def test_noise_of_nodes_passes_and_what_is_larger_does_not(tmp_path, noise_by):
    from fedpriv.privacy.mechanisms.base import Mechanism

    changes = {
        "privacy__clipping": {"kind": "global", "bound": 0.1},
        "privacy__noise_by": noise_by,
        "privacy__sampling": {"kind": "all"},
    }
    prepared, _, observer = train(tmp_path / "run", InProcessGrid(), rounds=3, **changes)
    assert not observer.sentences
    mechanism: Mechanism = prepared.plan.mechanism
    sizes = prepared.plan.sizes
    generator = np.random.default_rng(3)
    drawn = [float(mechanism.gaussian.noise(sizes, generator).norm()) for _ in range(200)]
    most = mechanism.gaussian.largest_noise(sizes)
    assert max(drawn) < most < 1.5 * np.mean(drawn)
    lies = [sends(lambda total: total * 2 + 1.0)] * 3
    _, _, observer = train(tmp_path / "lying", Lying(lies), rounds=3, **{**DEPLOYED, **changes})
    assert sum("takes no part" in each for each in observer.sentences) == 3


class Garbled(InProcessGrid):
    """What the node of partition 1 sends cannot be made into an object, each time otherwise."""

    def __init__(self, ways: list[Callable[[], Any]]) -> None:
        super().__init__()
        self.ways = iter(ways)

    def answer(self, message: Message) -> Message:
        asked = message.metadata
        if (asked.message_type, asked.dst_node_id) == ("train", LIAR):
            return next(self.ways)()
        return super().answer(message)


def raising(error: Exception) -> Callable[[], Any]:
    def raise_it() -> Any:
        raise error

    return raise_it


def endless() -> bytes:
    """A piece of a megabyte that, by a few bytes of a reply, comes a thousand times."""
    made, piece = bytearray(), bytes(2**20)
    while len(made) < 2**30:
        made += piece
    return bytes(made)


GARBLED: dict[str, Callable[[], Any]] = {
    "bytes that are no JSON": raising(ValueError("x" * 10**5)),
    "a class that there is not": raising(KeyError("Evil")),
    "a list where a table should be": raising(TypeError("'list' object is not a mapping")),
    "objects within objects without end": raising(RecursionError()),
    "a name that there is not": raising(AttributeError("\x1b[2J")),
    "an object that is no message": lambda: ArrayRecord(),
    "nothing": lambda: None,
    "more than the machine has": raising(MemoryError()),
    "a piece that comes without end": endless,
}


def test_what_cannot_be_read_loses_its_node_alone(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(inbox, "_BESIDE", 2**27)
    ways = list(GARBLED.values())
    few = {**settings, "rounds": len(ways)}
    garbled, directory, observer = train(tmp_path / "garbled", Garbled(ways), **few)
    honest, _, _ = train(tmp_path / "away", Lying([], dead=[1]), **few)
    assert_alike(garbled, honest)
    assert len(Ledger.open(directory.ledger)) == len(ways)
    assert [row["nodes_lost"] for row in observer.rows] == [1] * len(ways)
    assert len(observer.sentences) == len(ways)
    for sentence in observer.sentences:
        assert sentence.startswith(f"node {LIAR} takes no part: what it sent cannot be read (")
        assert len(sentence) < 100
    assert observer.sentences[-1].endswith("(MemoryError)")
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_a_link_that_is_down_is_no_nodes_lie(tmp_path, settings):
    class Down(InProcessGrid):
        down = False

        def pull_messages(self, message_ids):
            self.down = any(m.metadata.message_type == "train" for m in self._asked.values())
            return super().pull_messages(message_ids) if not self.down else self.get_node_ids()

        def get_node_ids(self):
            if self.down:
                raise ConnectionError("the SuperLink has gone")
            return super().get_node_ids()

    with pytest.raises(ConnectionError, match="has gone"):
        train(tmp_path / "run", Down(), **settings)


def test_a_node_that_goes_between_the_look_and_the_question_is_missed_alone(tmp_path, settings):
    class Leaving(InProcessGrid):
        def push_messages(self, messages):
            messages = list(messages)
            there = [one for one in messages if one.metadata.dst_node_id != LIAR]
            if any(one.metadata.message_type == "query" for one in messages):
                return super().push_messages(messages)
            ids = iter(super().push_messages(there))
            return [next(ids) if one in there else "" for one in messages]

    _, _, observer = train(tmp_path / "run", Leaving(), **{**settings, "rounds": 1})
    assert observer.rows[0]["nodes_lost"] == 1
    assert observer.sentences == [f"node {LIAR} takes no part: nothing of it arrived in time"]


HOSTS: dict[str, dict[str, Any]] = {
    "a partition beyond the last": {"partition": 3},
    "a negative partition": {"partition": -1},
    "a partition in words": {"partition": "1"},
    "another's partition": {"partition": 0},
    "another number of nodes": {"partitions": 4},
    "no nodes": {"partitions": 0},
    "that it is the only node": {"partition": 0, "partitions": 1},
    "anybody": {"users": -1},
    "a billion nodes": {"partitions": 10**9},
    "more users than there are places": {"users": 10**6},
    "users beyond counting": {"users": 2**62},
    "users in words": {"users": "all"},
    "ids in the open": {"ids": "ann,bob"},
    "ids that are bytes": {"ids": b"x"},
    "a digest too long": {"ids": "a" * 10_000},
}


@pytest.mark.parametrize("lie", HOSTS.values(), ids=HOSTS)
def test_a_node_that_lies_of_whom_it_hosts_takes_no_part(tmp_path, lie):
    class Claims(InProcessGrid):
        def answer(self, message):
            reply = super().answer(message)
            if "hosting" in reply.content and message.metadata.dst_node_id == LIAR + 1:
                reply.content["hosting"].update(lie)
            return reply

    grid = Claims(nodes=3)
    runtime = {"workers": 3, "deployment": True, "device": "cpu", "node_share": 0.3}
    sampling = {"kind": "fixed_size", "expected_cohort": 60}
    changes = {"runtime": runtime, "rounds": 1, "privacy__sampling": sampling}
    _, _, observer = train(tmp_path / "run", grid, **changes)
    trained = {m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"}
    assert LIAR + 1 not in trained
    assert LIAR in trained
    assert len(observer.rows) == 1
    assert any("takes no part" in sentence for sentence in observer.sentences)


@pytest.mark.parametrize("lie", [{"partitions": 1, "partition": 0}, {"users": -1}], ids=str)
def test_one_lie_of_two_nodes_leaves_the_other_in_with_its_own_users(tmp_path, lie):
    class Claims(InProcessGrid):
        def answer(self, message):
            reply = super().answer(message)
            if "hosting" in reply.content and message.metadata.dst_node_id == LIAR:
                reply.content["hosting"].update(lie)
            return reply

    grid = Claims()
    _, directory, observer = train(tmp_path / "run", grid, **DEPLOYED, rounds=1)
    trained = {m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"}
    assert trained == {FIRST_NODE}
    assert [each.partition for each in Ledger.open(directory.ledger).places.values()] == [0]
    assert observer.rows[0]["nodes_absent"] == 1


def test_a_number_that_two_nodes_claim_is_whose_users_the_ledger_has(tmp_path):
    class Claims(InProcessGrid):
        claiming = False

        def answer(self, message):
            reply = super().answer(message)
            liar = message.metadata.dst_node_id == LIAR
            if self.claiming and liar and "hosting" in reply.content:
                reply.content["hosting"].update({"partition": 0})
            return reply

    grid = Claims()
    config = small_config(run_dir=str(tmp_path / "run"), rounds=2, **DEPLOYED)
    prepared = experiment.prepare(config)
    directory, stopping = experiment.create(prepared), Stopping()
    with pytest.raises(Interrupted):
        experiment.train(prepared, directory, stopping, drive_on(grid))
    grid.claiming, before = True, len(grid.sent)
    directory, prepared = experiment.reopen(directory.path)
    experiment.train(prepared, directory, Silent(), drive_on(grid))
    asked = {m.metadata.dst_node_id for m in grid.sent[before:] if "arrays" in m.content}
    assert asked == {FIRST_NODE}


class Stopping(Silent):
    """The run is interrupted after a round, as by Ctrl-C."""

    def finished(self, row: dict[str, Any]) -> None:
        super().finished(row)
        raise Interrupted("stopped")


FAILURES: dict[str, Any] = {
    "no reason": ConfigRecord({}),
    "a number": ConfigRecord({"reason": 7}),
    "a novel": ConfigRecord({"reason": "x" * 10**6}),
    "what moves a terminal's cursor": ConfigRecord({"reason": "\x1b[2J\x1b[1;31mdone\n\n"}),
    "arrays": ArrayRecord({"reason": Array(np.zeros(3))}),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_however_a_node_says_that_it_failed_it_is_one_sentence(tmp_path, failure):
    class Failing(InProcessGrid):
        def answer(self, message):
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == LIAR:
                return Message(RecordDict({"failure": failure}), reply_to=message)
            return super().answer(message)

    _, _, observer = train(tmp_path / "run", Failing(), **DEPLOYED, rounds=1)
    (sentence,) = observer.sentences
    assert sentence.isprintable()
    assert len(sentence) < 600
    assert observer.rows[0]["nodes_lost"] == 1


def test_errors_of_unknown_codes_are_lost_nodes(tmp_path):
    class Odd(InProcessGrid):
        def answer(self, message):
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == LIAR:
                return Message(Error(code=-77, reason="\x00" * 10), reply_to=message)
            return super().answer(message)

    _, _, observer = train(tmp_path / "run", Odd(), **DEPLOYED, rounds=1)
    assert observer.rows[0]["nodes_lost"] == 1


def test_whoever_was_not_asked_hosts_nobody():
    asked = Message(RecordDict(), LIAR, "query")
    reply = Message(RecordDict({"hosting": ConfigRecord({"partition": 0})}), reply_to=asked)
    with pytest.raises(Refused, match="not asked"):
        hosting_in(reply, [FIRST_NODE])
    with pytest.raises(Refused, match="does not say"):
        hosting_in(reply, [LIAR])


def test_a_reply_that_is_sent_twice_counts_once(tmp_path, settings):
    class Twice(InProcessGrid):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            return [each for reply in replies for each in (reply, reply)]

    once, _, _ = train(tmp_path / "once", InProcessGrid(), **{**settings, "rounds": 1})
    twice, _, _ = train(tmp_path / "twice", Twice(), **{**settings, "rounds": 1})
    assert_alike(once, twice)
