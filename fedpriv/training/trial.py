"""A model is tried on a few examples before anything is spent on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedpriv.data.federated import Batch
from fedpriv.draws import drawing_from
from fedpriv.errors import InputError
from fedpriv.failures import told_as
from fedpriv.models.parameters import unchanged_buffers
from fedpriv.tasks.base import Task

_FEW = 2


def try_model(model: nn.Module, task: Task[Any], examples: Batch, classes: int, name: str) -> None:
    """Pass a few prepared examples through a model, as in training.

    Raises:
        InputError: it fails, does not give what the task needs, or keeps something of them.
    """
    device = next(model.parameters()).device
    few = examples.take(torch.arange(min(_FEW, len(examples)))).to(device)
    model.train()
    task.require_targets(few, classes)
    told = told_as(f"model.name: {name} fails on examples of these data")
    with torch.no_grad(), drawing_from(0, device), unchanged_buffers(model), told:
        try:
            task.require_model(model, few, classes)
        except InputError as error:
            raise InputError(f"model.name: {name} {error}") from None
