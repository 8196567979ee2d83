"""Small runs over nodes in this process, some of which misbehave."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.app.error import Error

from fedpriv import experiment
from fedpriv.config import ExperimentConfig
from fedpriv.config_files import parse_config
from fedpriv.experiment import Experiment
from fedpriv.federation.grids.base import FIRST_NODE
from fedpriv.federation.grids.local import LocalGrid
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.reporting.run_directory import RunDirectory


class InProcessGrid(LocalGrid):
    """Keeps what is sent; nodes of partitions in `dead` answer train messages with an error."""

    #: As on Flower's own grids, whose dead stay dead.
    replaces_nodes = False

    def __init__(self, nodes: int = 2, dead: Iterable[int] = (), reverse: bool = False) -> None:
        super().__init__(nodes)
        self.dead = set(dead)
        self.reverse = reverse
        self.sent: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        self.sent += messages
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = super().pull_messages(message_ids)
        return replies[::-1] if self.reverse else replies

    def answer(self, message: Message) -> Message:
        partition = message.metadata.dst_node_id - FIRST_NODE
        if partition in self.dead and message.metadata.message_type == "train":
            return Message(Error(code=0, reason="the worker died"), reply_to=message)
        return super().answer(message)


class BreaksIn(InProcessGrid):
    """Fails where the nodes are asked for a round."""

    def __init__(self, round_: int) -> None:
        super().__init__()
        self.round = round_

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        if any(m.content["config"].get("round") == self.round for m in messages):
            raise RuntimeError("crash")
        return super().push_messages(messages)


class Silent:
    """An observer that only remembers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.sentences: list[str] = []

    def begin(self, experiment: Experiment) -> None:
        pass

    def finished(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)


SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 5,
    "rounds": 4,
    "data": {"name": "digits", "users": 60, "partition": {"kind": "iid"}, "examples_per_user": 6},
    "model": {"name": "vit", "dim": 8, "depth": 1, "heads": 2, "patch": 4, "mlp_ratio": 1.0},
    "local": {"epochs": 1, "batch_size": 4, "lr": 0.1},
    "server": {"optimizer": "adam", "lr": 0.02},
    "privacy": {
        "delta": 1e-3,
        "noise_multiplier": 1.0,
        "sampling": {"kind": "poisson", "expected_cohort": 8},
        "clipping": {"kind": "per_layer", "bound": 0.1, "split": "dim"},
        # PLD takes tenths of a second, at every evaluation.
        "accountants": ["rdp"],
    },
    "runtime": {"workers": 2},
    "evaluation": {"every": 2},
}

#: What makes silos of the small config's users, of whom each protects its examples.
SILOS: dict[str, Any] = {
    "rounds": 3,
    "data__name": "synthetic_images",
    "data__users": 6,
    "data__synthetic": {"side": 8},
    "local__steps": 2,
    "server": {"optimizer": "sgd", "lr": 1.0},
    "privacy__unit": "example",
    "privacy__example": {"sampling_rate": 0.5, "silo_size": 6},
    "privacy__sampling": {"kind": "poisson", "expected_cohort": 3},
    "evaluation__every": 3,
}


def small_config(**changes: Any) -> ExperimentConfig:
    """Return a config that trains in a second; `privacy__delta=1` changes a nested key."""
    document = _copied(SMALL)
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = document
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = _copied(value) if isinstance(value, dict) else value
    return parse_config(document)


def _copied(document: dict[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in document.items()}


def train_small(
    folder: Path, grid: InProcessGrid | None = None, **changes: Any
) -> tuple[RunDirectory, Experiment]:
    """Train a small config to its end in `folder`."""
    prepared = experiment.prepare(small_config(run_dir=str(folder), **changes))
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, Silent(), drive_on(grid))
    return directory, prepared


def resume_small(
    folder: Path, grid: InProcessGrid | None = None
) -> tuple[RunDirectory, Experiment]:
    """Resume the run in `folder` to its end."""
    directory, prepared = experiment.reopen(folder)
    experiment.train(prepared, directory, Silent(), drive_on(grid))
    return directory, prepared


def drive_on(grid: InProcessGrid | None) -> Any:
    """Return a drive over `grid`, or over a new one, whose nodes pass for what the config says."""

    def drive(strategy: PrivateFedAvg) -> None:
        used = grid or InProcessGrid()
        used.simulated = not strategy.plan.config.runtime.deployment
        strategy.start(used)

    return drive
