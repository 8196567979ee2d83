"""A node imports what its own operator lists, and nothing that a server merely names."""

import json
import sys

import pytest
from deployed import asked, context_of, deployed_config
from flwr.app import Context, Message
from flwr.supercore.task_identity import TaskIdentity
from writers import write_writers

from fedpriv.federation.gate import reason_in
from fedpriv.federation.messages import query_message

CODE = """
from torch import nn
def flat(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported and was not."""
    name = f"components_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def question(folder, name, **changes) -> tuple[Message, Context]:
    """A server's question to a node about an experiment with a model from outside."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    document = json.loads(deployed_config(folder, **changes).model_dump_json())
    document["model"] = {"name": f"{name}:flat"}
    message = query_message(1000, deployed_config(folder))
    message.content["config"]["experiment"] = json.dumps(document)
    return message, context_of(folder)


@pytest.fixture
def folder(tmp_path):
    return write_writers(tmp_path / "data", {100 + number: 3 for number in range(4)})


@pytest.mark.parametrize("listed", [None, "", "other:flat", "os:system, json:loads"])
@pytest.mark.parametrize("deployment", [True, False], ids=["deployment", "said to be none"])
def test_what_a_server_names_is_not_imported(folder, module, listed, deployment):
    message, context = question(folder, module, runtime__deployment=deployment)
    if listed is not None:
        context.node_config["components"] = listed
    reason = reason_in(asked(message, context))
    assert f"this node does not import {module}:flat" in reason
    assert "\n" not in reason
    assert module not in sys.modules


@pytest.mark.parametrize("by", ["node config", "environment"])
def test_what_the_operator_lists_is(folder, module, by, monkeypatch):
    message, context = question(folder, module)
    if by == "node config":
        context.node_config["components"] = f"other:flat, {module}:flat"
    else:
        monkeypatch.setenv("FEDPRIV_COMPONENTS", f"{module}:flat")
    reply = asked(message, context)
    assert reason_in(reply) is None
    assert reply.content["hosting"]["users"] == 4
    assert module in sys.modules


def test_a_folder_that_a_server_names_is_not_looked_into(tmp_path, folder):
    code = tmp_path / "code"
    code.mkdir()
    (code / "their_module.py").write_text(CODE)
    message, context = question(folder, "their_module", code=str(code))
    context.node_config["components"] = "their_module:flat"
    assert "there is no module their_module" in reason_in(asked(message, context))
