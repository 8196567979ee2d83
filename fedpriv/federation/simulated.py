"""Whether nodes are simulated or real: told by what they are, not by what a config says of them.

A simulation's noise comes from a seed that its config names, which protects nobody. So both ends
look. A server asks Flower which task the run is, and a node looks at its own process, which no
message changes: Flower's simulation and RayGrid have nodes in Ray's actors, LocalGrid in the
process of the run, and a SuperNode starts a process of its own, which is none of these. What is
not known to be simulated is real.
"""

from __future__ import annotations

import sys

from flwr.app import Context
from flwr.serverapp import Grid

from fedpriv.config import ExperimentConfig
from fedpriv.errors import InputError

# What Flower calls the task of a run whose nodes it simulates.
_SIMULATION = "flwr-simulation"


class SimulatedContext(Context):
    """What a node of our own grids knows of itself. None comes over a network as one."""


def simulated_node(context: Context) -> bool:
    """Say whether the node that `context` is about, and that runs in this process, is simulated."""
    return isinstance(context, SimulatedContext) or _in_an_actor()


def _in_an_actor() -> bool:
    ray = sys.modules.get("ray")  # which has long been imported in an actor of it
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().get_actor_id())


def simulates(grid: Grid) -> bool:
    """Say whether the nodes of `grid` are simulated: our own, or those of Flower's simulation."""
    ours: bool | None = getattr(grid, "simulated", None)
    if ours is not None:
        return ours
    return getattr(grid.run, "primary_task_type", None) == _SIMULATION


def check_nodes(grid: Grid, config: ExperimentConfig) -> None:
    """Check that the nodes of `grid` are what `runtime.deployment` says.

    Raises:
        InputError: they are real and would be treated as simulated, or the other way round.
    """
    deployment, simulated = config.runtime.deployment, simulates(grid)
    if not deployment and not simulated:
        raise InputError(
            "runtime.deployment: false draws sampling and noise from a seed that is no secret, and "
            "these nodes are real; write runtime.deployment: true, and data.users, the total of "
            "all nodes"
        )
    if deployment and simulated:
        raise InputError(
            "runtime.deployment: true trains over real nodes, and these are simulated; write "
            "runtime.deployment: false, or flwr run over a SuperLink that has SuperNodes"
        )
