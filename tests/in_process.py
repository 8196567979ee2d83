"""A Flower grid without Flower's runtime: nodes answer in this process, as soon as asked.

It stands in for Ray workers where a test is about the strategy and not about processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity

from fedpriv import experiment
from fedpriv.config import ExperimentConfig, parse_config
from fedpriv.experiment import Experiment
from fedpriv.federation.client_app import app
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.reporting.run_directory import RunDirectory


class InProcessGrid:
    """Nodes 1000, 1001, ... of partitions 0, 1, ...; those in `dead` answer train with an error."""

    def __init__(self, nodes: int = 2, dead: Iterable[int] = (), reverse: bool = False) -> None:
        self.nodes = nodes
        self.dead = set(dead)
        self.reverse = reverse
        self.sent: list[Message] = []
        self._replies: list[Message] = []
        # Flower's runtime sets these before a ServerApp may make messages.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def get_node_ids(self) -> list[int]:
        return [1000 + partition for partition in range(self.nodes)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            self.sent.append(message)
            self._replies.append(self._answer(message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies, self._replies = self._replies, []
        return replies[::-1] if self.reverse else replies

    def _answer(self, message: Message) -> Message:
        partition = message.metadata.dst_node_id - 1000
        if partition in self.dead and message.metadata.message_type == "train":
            return Message(Error(code=0, reason="the worker died"), reply_to=message)
        node_config = {"partition-id": partition, "num-partitions": self.nodes}
        context = Context(1, message.metadata.dst_node_id, node_config, RecordDict(), {})
        return app(message, context)


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
    """Return a drive over `grid`, or over a new one."""

    def drive(strategy: PrivateFedAvg) -> None:
        strategy.start(grid or InProcessGrid())  # type: ignore[arg-type]

    return drive
