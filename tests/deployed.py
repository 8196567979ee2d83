"""One node of a deployment, asked in this process, without Flower's runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from in_process import small_config
from torch import Tensor
from writers import by_writers

from fedpriv.config import ExperimentConfig
from fedpriv.federation.builders import build_trainer
from fedpriv.federation.client_app import app
from fedpriv.federation.grids.base import give_id, identify
from fedpriv.federation.messages import OwnNoise, flat_record, query_message, train_message
from fedpriv.models.parameters import Layout, parameters_of

#: Places of the population; the nodes have fewer users.
PLACES = 100


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


def start_of(config: ExperimentConfig) -> Tensor:
    """The parameters that the model of a config starts from."""
    model = build_trainer(config).model
    return Layout.of(model).join(parameters_of(model))
