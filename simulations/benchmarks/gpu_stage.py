"""What the stages of the GPU benchmark share: their arguments, their records, and how they time."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Stage:
    """A stage that runs: on a device, into a file, until a time.

    Attributes:
        device: where it trains.
        path: its records.
        seconds: how long it may take in all.
        began: when it began, on the monotonic clock.
    """

    device: torch.device
    path: Path
    seconds: float
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def of_arguments(cls) -> Stage:
        """Return the stage that the command line, DEVICE FILE SECONDS, asks for.

        Ends the program where its device is not there.
        """
        device, path, seconds = sys.argv[1:4]
        if device == "cuda" and not torch.cuda.is_available():
            sys.exit("no CUDA device is there: set DEVICE=cpu for a run on the CPU")
        stage = cls(torch.device(device), Path(path), float(seconds))
        what = torch.cuda.get_device_name() if stage.on_gpu else "CPU"
        stage.write(what=f"{what}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
        return stage

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until it must have ended."""
        return self.seconds - (time.monotonic() - self.began)

    def write(self, **record: Any) -> None:
        """Add a record to the stage's file, at once."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def timed(self, work: Callable[[], Any], repeats: int, seconds: float) -> float:
        """Return the median time of `work`, after a warm-up, of `repeats` runs or `seconds`."""
        work()
        times: list[float] = []
        while len(times) < repeats and (not times or sum(times) < seconds):
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def synchronize(self) -> None:
        """Wait for the GPU, where there is one."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def peak(self, work: Callable[[], Any]) -> float | None:
        """Return the most memory that the GPU's tensors took during `work`, GiB; None on a CPU."""
        if not self.on_gpu:
            work()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) / 2**30
