"""Where the time of a round goes: named spans on a clock that a machine's processes share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Span:
    """Something that was done from `start` to `end`, seconds since the epoch."""

    name: str
    start: float
    end: float


@dataclass
class Stopwatch:
    """Records spans where `on`; otherwise it does nothing.

    A span on a GPU lasts until the GPU has done what it was asked for, not until it was asked.
    """

    on: bool
    spans: list[Span] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Record what is done inside as a span called `name`; an error leaves it out."""
        start = time.time()
        yield
        if self.on:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.spans.append(Span(name, start, time.time()))
