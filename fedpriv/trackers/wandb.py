"""Weights & Biases, online or offline."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from fedpriv.trackers.base import TrackedRun
from fedpriv.trackers.registry import TrackerOptions


class WandbOptions(TrackerOptions):
    """Which project, and whether it is sent."""

    name: str = Field(default="wandb", description="wandb: a run of Weights & Biases")
    project: str | None = Field(default=None, description="null: the experiment's name")
    entity: str | None = Field(default=None, description="null: your own")
    mode: Literal["online", "offline"] = Field(
        default="offline",
        description="offline writes to the run's directory, for wandb sync; online sends",
    )


class WandbTracker:
    """Writes to a run of Weights & Biases, the same one after a resume: see `Tracker`."""

    def __init__(self, options: WandbOptions, run: TrackedRun) -> None:
        import wandb

        kept = run.folder / "wandb.txt"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = wandb.init(
            project=options.project or run.name,
            entity=options.entity,
            name=run.folder.name,
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
            dir=run.folder,
            config=dict(run.settings),
            mode=options.mode,
            # Neither the machine nor the code is a number of the run.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_machine_info=True,
            ),
        )

    def log(self, numbers: Mapping[str, float], round_: int) -> None:
        """Log all numbers at the round's step."""
        self._run.log(dict(numbers), step=round_)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
