"""Balanced tasks, after OFVL-MS (Xie et al. 2023, "OFVL-MS: once for visual localization ...").

    user k of task t:  y ← x;  local steps;  send x - y
    server:            g_t ← (sum of the updates of t's users) / (qN), for every task t
                       x ← optimizer(x, m · Σ_t g_t/‖g_t‖),  m = mean of all ‖g_t‖

The paper gives the gradients of all tasks one size in the layers that they share, so that all learn
at one pace; here all share the whole model. A task is a public group of users: a user belongs to
the first of `tasks` that its id fits, and one who fits none to the last. Whoever knows its id knows
its task. A task that nobody belongs to has noise alone, and counts for as much as any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fedpriv.algorithms.base import Algorithm
from fedpriv.algorithms.hierarchical import noise_within

if TYPE_CHECKING:
    from fedpriv.optimizers.server import ServerConfig
    from fedpriv.privacy.options import PrivacyConfig


def _distinct(tasks: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(tasks)) < len(tasks):
        raise ValueError("write each pattern once: a user belongs to the first that its id fits")
    return tasks


_TASKS = Field(
    min_length=2,
    max_length=64,
    description="Patterns of user ids, one a task: a user belongs to the first that its id fits, "
    "and one who fits none to the last",
)


@dataclass(frozen=True)
class OfvlMs(Algorithm):
    """Tasks whose averages have one size in the server's update, whatever their own sizes.

    The sums of all tasks are one release of T·P numbers, to T·P - P of which a user adds nothing:
    its sensitivity is that of one sum.

    Attributes:
        tasks: a pattern of user ids for each of the T tasks.
    """

    tasks: Annotated[tuple[str, ...], _TASKS, AfterValidator(_distinct)]
    cite = "after OFVL-MS (Xie et al. 2023)"
    adds_slots = False

    def refuses_beside(self, server: ServerConfig, privacy: PrivacyConfig | None) -> str | None:
        """Refuse noise that silos or users add, and sizes that the server changes afterwards."""
        if privacy is None:
            return None
        if (reason := noise_within(privacy, "task")) is not None:
            return reason
        if privacy.clipping.undoes:
            return (
                "privacy.clipping.undo: tasks would have one size in what users divide, and others "
                "where the server has multiplied it again; write undo: false"
            )
        return None

    @property
    def slots(self) -> int:
        """Return T."""
        return len(self.tasks)

    def slot(self, user_id: str) -> int:
        """Return the task of a user."""
        fit = (task for task, each in enumerate(self.tasks) if fnmatchcase(user_id, each))
        return next(fit, len(self.tasks) - 1)

    def combined(self, averages: Tensor) -> Tensor:
        """Return m · Σ_t g_t/‖g_t‖; a g_t of zeros adds nothing."""
        norms = torch.linalg.vector_norm(averages.double(), dim=1)
        weights = norms.mean() / torch.where(norms == 0, 1.0, norms)
        return (weights.to(averages)[:, None] * averages).sum(0)
