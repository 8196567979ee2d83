"""What a node sends counts only if it can be true; no reply ends a run."""

import math
import re

import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from in_process import InProcessGrid, Silent, drive_on, small_config

from fedpriv import experiment
from fedpriv.federation.messages import flat_record, flat_tensor


def scaled(reply, factor):
    reply.content["sum"] = flat_record(flat_tensor(reply.content["sum"]) * factor)


def put(reply, name, value):
    reply.content["seen"][name] = value


def replaced(reply, flat):
    reply.content["sum"] = flat_record(flat)


TAMPERED = {
    "too large": (lambda r: scaled(r, 1e6), "larger than"),
    "not finite": (lambda r: scaled(r, math.nan), "not finite"),
    "another dtype": (lambda r: replaced(r, flat_tensor(r.content["sum"]).float()), "float32"),
    "another shape": (lambda r: replaced(r, torch.zeros(3, dtype=torch.float64)), r"\[3\]"),
    "nothing": (lambda r: setattr(r, "content", RecordDict({})), "cannot be read"),
    "no array": (lambda r: r.content.update({"sum": ArrayRecord()}), "cannot be read"),
    "another's number": (lambda r: put(r, "partition", 0), "called that of node 0"),
    "too many users": (lambda r: put(r, "users", 1000), "counts"),
    "negative counts": (lambda r: put(r, "block_clipped", [-5.0] * 12), "counts"),
    "another type": (lambda r: put(r, "users", "many"), "cannot be read"),
}


class Tampering(InProcessGrid):
    """The second node's answers are not what it was asked for."""

    replaces_nodes = True

    def __init__(self, tamper):
        super().__init__(2)
        self.tamper = tamper

    def answer(self, message):
        reply = super().answer(message)
        if message.metadata.dst_node_id == 1001 and "sum" in reply.content:
            self.tamper(reply)
        return reply


def trained(folder, grid, **changes):
    prepared = experiment.prepare(small_config(run_dir=str(folder), rounds=1, **changes))
    directory, observer = experiment.create(prepared), Silent()
    experiment.train(prepared, directory, observer, drive_on(grid))
    return prepared.server.parameters(), directory.read_metrics()[0], observer.sentences


@pytest.mark.parametrize("name", TAMPERED)
def test_what_cannot_be_true_loses_its_node_alone(tmp_path, name):
    tamper, reason = TAMPERED[name]
    model, row, sentences = trained(tmp_path / "tampered", Tampering(tamper))
    dead = InProcessGrid(dead=[1])
    dead.replaces_nodes = True
    without, _, _ = trained(tmp_path / "dead", dead)
    assert model.equal(without)
    assert row["nodes_lost"] == 1
    assert [each for each in sentences if each.startswith("node 1 is lost for this round")]
    assert re.search(reason, " ".join(sentences))


def test_one_users_infinite_loss_does_not_lose_the_others(tmp_path):
    _, row, _ = trained(tmp_path, Tampering(lambda reply: put(reply, "loss", math.inf)))
    assert row["nodes_lost"] == 0


def test_a_bound_holds_for_each_payload(tmp_path):
    def tamper(reply):
        model, control = flat_tensor(reply.content["sum"]).chunk(2)
        replaced(reply, torch.cat([model, torch.full_like(control, 0.01)]))

    algorithm = {"name": "scaffold", "bounds": {"control": 1e-3}}
    _, row, sentences = trained(tmp_path, Tampering(tamper), algorithm=algorithm)
    assert row["nodes_lost"] == 1
    assert "larger than" in sentences[-1]


class Repeating(InProcessGrid):
    """Hands on every sum twice."""

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        return [one for reply in replies for one in (reply,) * (1 + ("sum" in reply.content))]


def test_a_sum_counts_once(tmp_path):
    model, row, sentences = trained(tmp_path / "twice", Repeating())
    once, _, _ = trained(tmp_path / "once", InProcessGrid())
    assert model.equal(once)
    assert row["nodes_lost"] == 0
    assert "sent a sum for which nobody had asked" in sentences[0]
