"""A contender: vanilla Flower, its own FedAvg with one message a user, without privacy.

    python flower_rounds.py FOLDER

Every user is a node of Flower's simulation; `workers` Ray actors serve them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import flower_client
import task
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from gate import pause
from torch import nn


class PausingFedAvg(FedAvg):
    """Flower's FedAvg, which stops before each round and counts the replies that are no errors."""

    trained = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        pause(self.trained)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrived = list(replies)
        self.trained = sum(not reply.has_error() for reply in arrived)
        return super().aggregate_train(server_round, arrived)


def serve(folder: Path, given: task.Task, model: nn.Module) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = PausingFedAvg(
            fraction_train=given.cohort / given.users,
            fraction_evaluate=0.0,
            min_train_nodes=given.cohort,
            min_available_nodes=given.users,
        )
        result = strategy.start(
            grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=given.rounds,
            train_config=ConfigRecord({"folder": str(folder)}),
        )
        pause(strategy.trained)
        model.load_state_dict(result.arrays.to_torch_state_dict())
        task.write_end(folder, nn.utils.parameters_to_vector(model.parameters()))

    return app


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    given, arrays = task.read(folder)
    model = task.network(given)
    task.load_start(model, arrays)
    # Without an address Ray would join any cluster that it finds on this machine.
    ray = {"address": "local", "num_cpus": given.workers, "include_dashboard": False}
    run_simulation(
        server_app=serve(folder, given, model),
        client_app=flower_client.app,
        num_supernodes=given.users,
        backend_config={
            "init_args": ray | {"log_to_driver": False, "logging_level": "ERROR"},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main()
