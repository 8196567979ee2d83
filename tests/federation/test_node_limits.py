"""What a node looks at before it takes work: versions, the size of a model, and how often."""

import json
import math
import sys

import numpy as np
import pytest
from deployed import asked, context_of, deployed_config, start_of
from flwr.app import Message
from replies import hosting_of, sum_of
from writers import write_writers

from fedpriv import __version__
from fedpriv.federation import client_app, messages
from fedpriv.federation.gate import reason_in
from fedpriv.federation.grids.base import identify
from fedpriv.federation.messages import flat_record, query_message, train_message
from fedpriv.federation.node_ledger import Limits, NodeLedger, Participation

POLICY = "smallest_z: 1.0\nlargest_bound: 1.0\nrounds: 99\n"
OUTSIDE = """
import torch
from torch import nn
def wide(input_shape, classes, width):
    if torch.empty(0).device.type != "meta":
        raise MemoryError("it is built")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, classes))
def looking(input_shape, classes, width):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, classes))
    assert model[1].weight.max().item() < 10
    return model
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_writers(tmp_path_factory.mktemp("users"), {100 + n: 4 for n in range(6)})


@pytest.fixture(autouse=True)
def _fresh():
    client_app._TRAINERS.__init__()  # a node's process ends with its message
    identify()


def context(tmp_path, folder, policy=POLICY):
    file = tmp_path / "policy.yaml"
    file.write_text(policy)
    made = context_of(folder)
    made.node_config["policy"] = str(file)
    return made


# ---------------------------------------------------------------- versions


def question(folder, **versions: str) -> Message:
    message = query_message(1000, deployed_config(folder))
    for name, version in versions.items():
        message.content["config"][f"version of {name}"] = version
    return message


def test_a_server_of_another_version_is_refused_before_its_config_is_read(folder, caplog):
    message = question(folder, fedpriv="99.0")
    message.content["config"]["experiment"] = json.dumps({"a key of version 99": 1})
    reason = reason_in(asked(message, context_of(folder)))
    assert reason == f"fedpriv is {__version__} at this node and 99.0 at the server; install one"
    assert reason in caplog.text


@pytest.mark.parametrize("library", ["torch", "numpy", "flwr"])
def test_another_library_is_told_to_the_nodes_operator_alone(folder, caplog, library):
    reply = asked(question(folder, **{library: "0.1"}), context_of(folder))
    assert hosting_of(reply).users == 6
    assert f"{library} is " in caplog.text
    assert "and 0.1 at the server: sums may round differently" in caplog.text
    assert "0.1" not in str(reply.content)


def test_the_same_versions_are_not_told(folder, caplog):
    assert hosting_of(asked(question(folder), context_of(folder))).users == 6
    assert "at the server" not in caplog.text
    assert set(messages._versions()) == {
        f"version of {name}" for name in ("fedpriv", "torch", "numpy", "flwr")
    }


# ---------------------------------------------------------------- the size of a model


def of_model(folder, **model) -> Message:
    message = query_message(1000, deployed_config(folder))
    document = json.loads(message.content["config"]["experiment"])
    message.content["config"]["experiment"] = json.dumps({**document, "model": model})
    return message


def test_a_model_beyond_the_policy_is_refused_before_it_takes_memory(tmp_path, folder):
    node = context(tmp_path, folder, POLICY + "limits: {parameters: 20000}\n")
    large = of_model(folder, name="vit", dim=64, depth=2)
    assert "parameters, and it allows 20000" in reason_in(asked(large, node))
    small = of_model(folder, name="vit", dim=16, depth=1)
    assert hosting_of(asked(small, node)).users == 6
    # Also where the model is there, for another policy.
    node = context(tmp_path, folder, POLICY + "limits: {parameters: 100}\n")
    assert "parameters, and it allows 100" in reason_in(asked(small, node))


def test_whatever_takes_no_end_of_memory_is_refused_by_default(tmp_path, folder):
    node = context(tmp_path, folder)
    huge = of_model(folder, name="vit", dim=16384, depth=64)
    assert "and it allows 1000000000" in reason_in(asked(huge, node))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module of somebody else's models."""
    name = f"models_of_{tmp_path.name.replace('-', '_').replace('.', '_')}"
    (tmp_path / f"{name}.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def test_a_model_from_outside_is_measured_before_it_is_built(tmp_path, folder, module):
    listed = f"components: ['{module}:wide', '{module}:looking']\n"
    node = context(tmp_path, folder, POLICY + listed + "limits: {parameters: 20000}\n")
    wide = of_model(folder, name=f"{module}:wide", width=60_000)
    assert "a model of 4500010 parameters, and it allows 20000" in reason_in(asked(wide, node))
    # Where its builder looks at its numbers, it is built and then refused.
    looking = of_model(folder, name=f"{module}:looking", width=1000)
    assert "a model of 75010 parameters, and it allows 20000" in reason_in(asked(looking, node))
    fits = of_model(folder, name=f"{module}:looking", width=100)
    assert hosting_of(asked(fits, node)).users == 6


@pytest.mark.parametrize("width", [10**9, [[10**9]], {"deep": [10**9]}, -(10**9)], ids=str)
def test_no_option_of_a_model_is_beyond_counting(tmp_path, folder, module, width):
    """A depth of a billion would take days to build, even without numbers."""
    node = context(tmp_path, folder, POLICY + f"components: ['{module}:wide']\n")
    reason = reason_in(asked(of_model(folder, name=f"{module}:wide", width=width), node))
    assert reason == "refused: model has an option of 1e+09, and it allows 65536"


# ---------------------------------------------------------------- how often


def test_a_user_takes_part_in_no_more_than_its_share_of_a_run(tmp_path, folder):
    config = deployed_config(folder, rounds=5)
    node = context(tmp_path, folder, POLICY + "share: 0.3\n")  # 2 of 5 rounds
    arrays = flat_record(start_of(config))

    def trained(run, round_, users):
        node.run_id = run
        message = train_message(1000, config, arrays, round_, np.array(users), ())
        reply = asked(message, node)
        return reason_in(reply) or sum_of(reply)[1].users

    assert [trained(1, round_, [0, 1]) for round_ in (1, 2)] == [2, 2]
    assert trained(1, 3, [0, 1, 2]) == 1  # the third alone
    assert "take part in no more" in trained(1, 4, [0, 1])
    assert trained(2, 1, [0, 1]) == 2  # another run


@pytest.mark.parametrize(("share", "rounds"), [(0.01, 1), (0.5, 4), (0.3, 10), (1.0, 3)])
def test_the_share_is_of_the_rounds_of_the_config(tmp_path, share, rounds):
    ledger = NodeLedger(tmp_path / "ledger")
    most = math.ceil(share * rounds)
    limits = Limits(rounds=99, in_run=most)
    answers = [
        ledger.charge(["a"], Participation(1.0), limits, run=1, round=round_)
        for round_ in range(1, rounds + 2)
    ]
    assert [bool(answer) for answer in answers] == [True] * most + [False] * (rounds + 1 - most)


def test_a_run_without_end_is_refused(tmp_path, folder):
    """Of which a share would be without end, too."""
    node = context(tmp_path, folder, POLICY + "share: 0.3\n")
    message = query_message(1000, deployed_config(folder, rounds=10**9))
    assert "rounds is 1000000000, and it allows 100000" in reason_in(asked(message, node))
