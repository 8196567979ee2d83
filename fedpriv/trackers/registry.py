"""The trackers by name: a new one is a file with options, and one line in `TRACKERS`."""

from __future__ import annotations

from pydantic import Field

from fedpriv.components import Kind, Options


class TrackerOptions(Options):
    """Where the numbers of a run go; each tracker adds its own."""

    name: str = Field(description="name of the tracker, or package.module:object for your own")
    simulation_only: bool = Field(
        default=False,
        description="also send what no mechanism released, such as users' losses and norms, under "
        "simulation_only/; of a deployment there is none",
    )


TRACKERS = Kind(
    key="tracker",
    noun="tracker",
    registered={
        "mlflow": "fedpriv.trackers.mlflow:MlflowTracker",
        "tensorboard": "fedpriv.trackers.tensorboard:TensorBoardTracker",
        "wandb": "fedpriv.trackers.wandb:WandbTracker",
    },
    base="fedpriv.trackers.registry:TrackerOptions",
    facts=("run",),
    group="fedpriv.trackers",
)
