"""Run a command and watch what its processes take: for studies of start-up and memory (Linux)."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_EVERY_SECONDS = 0.25
_MARK = "FEDPRIV_WATCHED"


@dataclass(frozen=True)
class Watched:
    """What was seen of a command.

    Attributes:
        lines: each line of its standard error, with the seconds since the start.
        peak: largest memory of all its processes together, MiB; shared pages count once.
        peaks: largest memory of single processes, MiB, by name, the largest of a name.
        returncode: its exit code.
    """

    lines: list[tuple[float, str]]
    peak: float
    peaks: dict[str, float]
    returncode: int


def watch(command: Sequence[str]) -> Watched:
    """Run `command` to its end; its processes are known by a mark in their environment."""
    mark = f"{_MARK}={uuid.uuid4()}"
    name, value = mark.split("=")
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, name: value},
    )
    peaks: dict[str, float] = {}
    peak = [0.0]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_EVERY_SECONDS):
            now = _memory(mark.encode())
            peak[0] = max(peak[0], sum(mib for _, mib in now))
            for who, mib in now:
                peaks[who] = max(peaks.get(who, 0.0), mib)

    sampler = threading.Thread(target=sample)
    sampler.start()
    assert process.stderr is not None
    lines = [(time.monotonic() - started, line.rstrip()) for line in process.stderr]
    code = process.wait()
    ended.set()
    sampler.join()
    return Watched(lines, peak[0], peaks, code)


def _memory(mark: bytes) -> list[tuple[str, float]]:
    """Return name and proportional set size (MiB) of each marked process."""
    found = []
    for folder in Path("/proc").iterdir():
        # A process may end while it is looked at.
        with suppress(OSError, ValueError, StopIteration):
            if not folder.name.isdigit() or mark not in (folder / "environ").read_bytes():
                continue
            name = (folder / "cmdline").read_text().replace("\0", " ").split()[0]
            rollup = (folder / "smaps_rollup").read_text().splitlines()
            size = next(line for line in rollup if line.startswith("Pss:"))
            found.append((Path(name).name, int(size.split()[1]) / 1024))
    return found
