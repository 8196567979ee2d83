"""What every contender is given: a model, its start, and the users' arrays, in a folder.

This module runs in every contender's environment: it needs numpy, torch and what makes the model.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SETTINGS, _ARRAYS, _END = "task.json", "task.npz", "end.npy"


@dataclass(frozen=True)
class Task:
    """A federated training.

    Attributes:
        model: `make`, the module:object that makes it, and its arguments.
        users: population.
        cohort: users a round.
        rounds: rounds in all.
        passes: times that a user goes through its examples, in their order.
        batch_size: examples a local step.
        lr: local learning rate.
        bound: clip bound of an update; None for no privacy.
        noise_multiplier: standard deviation of the noise on the sum, divided by the bound.
        workers: processes of one thread each.
    """

    model: dict[str, Any]
    users: int
    cohort: int
    rounds: int
    passes: int
    batch_size: int
    lr: float
    bound: float | None
    noise_multiplier: float
    workers: int


@dataclass(frozen=True, eq=False)
class Arrays:
    """`inputs` float32 `[users, n, ...]`, `targets` int64 `[users, n]`, `start` `[parameters]`."""

    inputs: np.ndarray
    targets: np.ndarray
    start: np.ndarray


def write(folder: Path, task: Task, arrays: Arrays) -> None:
    (folder / _SETTINGS).write_text(json.dumps(asdict(task)))
    np.savez(folder / _ARRAYS, **vars(arrays))


def read(folder: Path) -> tuple[Task, Arrays]:
    task = Task(**json.loads((folder / _SETTINGS).read_text()))
    with np.load(folder / _ARRAYS) as file:
        return task, Arrays(file["inputs"], file["targets"], file["start"])


def write_end(folder: Path, parameters: Tensor) -> None:
    """Leave the parameters after the last round."""
    np.save(folder / _END, parameters.detach().cpu().numpy())


def read_end(folder: Path) -> np.ndarray:
    return np.load(folder / _END)


def network(task: Task) -> nn.Module:
    """Make the model that all contenders train."""
    module, _, made = task.model["make"].partition(":")
    arguments = {key: value for key, value in task.model.items() if key != "make"}
    return getattr(importlib.import_module(module), made)(**arguments)


def load_start(model: nn.Module, arrays: Arrays) -> None:
    """Copy the start parameters into a model."""
    start = torch.from_numpy(arrays.start)
    nn.utils.vector_to_parameters(start, model.parameters())
