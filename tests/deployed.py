"""Nodes of a deployment in this process, without Flower's runtime: one that is asked, or a grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from in_process import InProcessGrid, Silent, drive_on, small_config
from torch import Tensor
from writers import by_writers, write_writers

from fedpriv import experiment
from fedpriv.config import ExperimentConfig
from fedpriv.federation import client_app
from fedpriv.federation.builders import build_trainer
from fedpriv.federation.client_app import app
from fedpriv.federation.grids.base import give_id, identify
from fedpriv.federation.messages import OwnNoise, flat_record, query_message, train_message, work_of
from fedpriv.federation.policy import NodeTerms
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.training.cohort import CohortTrainer

#: Places of the population; the nodes have fewer users.
PLACES = 100

#: Twelve writers, with four images each.
COUNTS = {100 + number: 4 for number in range(12)}


def deployed_config(folder: Path, **changes: Any) -> ExperimentConfig:
    """A config whose nodes host writers; `folder` is the server's."""
    settings = {
        **by_writers(folder, **{"users": PLACES, **changes.pop("data", {})}),
        "local": {"epochs": 2, "batch_size": 2, "lr": 0.5},
        "privacy__clipping": {"kind": "global", "bound": 1.0},
        "privacy__sampling": {"kind": "poisson", "expected_cohort": 50},
        "runtime": {"workers": 1, "deployment": True, "device": "cpu"},
    }
    return small_config(**{**settings, **changes})


def context_of(folder: Path, partition: int = 0, partitions: int = 1) -> Context:
    """The node's own settings: which it is, and where its users' data lie."""
    node = {"partition-id": partition, "num-partitions": partitions, "data-path": str(folder)}
    return Context(1, 1000 + partition, node, RecordDict(), {})


def asked(message: Message, context: Context) -> Message:
    """The node's answer to a message, as if that had come over a network."""
    give_id(message)
    return app(message, context)


def hosting_answer(config: ExperimentConfig, folder: Path) -> Message:
    """What the node says of the users that it hosts."""
    identify()
    return asked(query_message(1000, config), context_of(folder))


def train_answer(
    config: ExperimentConfig, folder: Path, users: range, own_noise: OwnNoise | None = None
) -> Message:
    """What the node sends after training users, numbered as it numbers them, in round 1."""
    identify()
    arrays = flat_record(start_of(config))
    asks = train_message(1000, config, arrays, 1, np.array(users), (), own_noise=own_noise)
    return asked(asks, context_of(folder))


def trainer_of(config: ExperimentConfig, folder: Path) -> CohortTrainer:
    """What the node trains with."""
    context = context_of(folder)
    return client_app._trainer(config, context, NodeTerms.of(context), "")


def start_of(config: ExperimentConfig) -> Tensor:
    """The parameters that the model of a config starts from."""
    model = build_trainer(config).model
    return Layout.of(model).join(parameters_of(model))


class Deployed(InProcessGrid):
    """Nodes with folders of their own; those in `away` are not there."""

    simulated = False

    def __init__(self, folders: list[Path]) -> None:
        super().__init__(len(folders))
        self.folders = folders
        self.away: set[int] = set()
        self.messages: Counter[tuple[int, int]] = Counter()

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node - 1000 not in self.away]

    def context(self, number: int) -> Context:
        """What a node's own settings are."""
        return context_of(self.folders[number], number, len(self.folders))

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "train":
            self.messages.update((node - 1000, user) for user in work_of(message).users)
        try:
            return app(message, self.context(node - 1000))
        except Exception as error:
            return Message(Error(code=2, reason=repr(error)), reply_to=message)


class AfterRound(Silent):
    """Calls something when a round is finished."""

    def __init__(self, round_: int, then: Callable[[], Any]) -> None:
        super().__init__()
        self.round, self.then = round_, then

    def finished(self, row: dict[str, Any]) -> None:
        super().finished(row)
        if row["round"] == self.round:
            self.then()


def three_nodes(tmp_path: Path) -> list[Path]:
    """The folders of three nodes, each with every third of the twelve writers."""
    parts = [dict(list(COUNTS.items())[number::3]) for number in range(3)]
    return [write_writers(tmp_path / f"node{p}", part) for p, part in enumerate(parts)]


def trained(config: ExperimentConfig, grid: Deployed, observer: Silent) -> RunDirectory:
    """Train a config over a grid to its end."""
    prepared = experiment.prepare(config)
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, observer, drive_on(grid))
    return directory
