"""The ClientApp of vanilla Flower: one user a message, trained by an ordinary PyTorch loop.

A module of its own, because a Ray worker imports it and keeps model and data between messages.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import task
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

app = ClientApp()


@lru_cache(maxsize=1)
def loaded(folder: str) -> tuple[task.Task, nn.Module, Tensor, Tensor]:
    torch.set_num_threads(1)
    given, arrays = task.read(Path(folder))
    inputs, targets = torch.from_numpy(arrays.inputs), torch.from_numpy(arrays.targets)
    return given, task.network(given), inputs, targets


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the node's only user from the parameters of the message."""
    config, arrays = message.content["config"], message.content["arrays"]
    assert isinstance(config, ConfigRecord)
    assert isinstance(arrays, ArrayRecord)
    given, model, inputs, targets = loaded(str(config["folder"]))
    user = int(context.node_config["partition-id"])
    model.load_state_dict(arrays.to_torch_state_dict())
    train_user(model, inputs[user], targets[user], given)
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(targets[user])}),
        }
    )
    return Message(content, reply_to=message)


def train_user(model: nn.Module, inputs: Tensor, targets: Tensor, given: task.Task) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=given.lr)
    for _ in range(given.passes):
        for batch in torch.arange(len(targets)).split(given.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
