"""TensorBoard: event files in the run's directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from fedpriv.sections import KeptPath
from fedpriv.trackers.base import TrackedRun
from fedpriv.trackers.registry import TrackerOptions


class TensorBoardOptions(TrackerOptions):
    """Where event files lie."""

    name: str = Field(
        default="tensorboard", description="tensorboard: event files that TensorBoard shows"
    )
    folder: KeptPath | None = Field(default=None, description="null: tensorboard in the run's")


class TensorBoardTracker:
    """Writes scalars: see `Tracker`."""

    def __init__(self, options: TensorBoardOptions, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder: Path = options.folder or run.folder / "tensorboard"
        # What an interrupted run wrote of later rounds is not shown.
        self._writer = SummaryWriter(str(folder), purge_step=run.finished_rounds + 1)

    def log(self, numbers: Mapping[str, float], round_: int) -> None:
        """Write a scalar for each number, and see that it is on the disk."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, round_)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
