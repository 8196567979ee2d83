"""Leads the stages of the GPU benchmark: each a process with a time limit, most valuable first.

`gpu.sh` calls this. A stage writes one JSON object a line to its own file as soon as it knows a
number, so that whatever ends it leaves what it has found; a table of each stage is printed and
added to tables.txt when the stage has ended. A stage that fails does not keep the next from
running; the exit code is 1 where one did, or ran out of time before it had found anything.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# What is kept for the end, and the least that a stage is begun with.
_LAST_SECONDS, _LEAST_SECONDS = 5, 10


@dataclass(frozen=True)
class Stage:
    """A stage: its script, and the most seconds that it may take on a GPU and on a CPU."""

    name: str
    script: str
    seconds: dict[str, int]


STAGES = [
    Stage("tests", "gpu_tests.py", {"cuda": 150, "cpu": 110}),
    Stage("speed", "gpu_speed.py", {"cuda": 150, "cpu": 60}),
    Stage("large", "gpu_large.py", {"cuda": 190, "cpu": 60}),
    Stage("study", "gpu_study.py", {"cuda": 300, "cpu": 120}),
]


def main() -> None:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=int, required=True, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="NAME")
    options = parser.parse_args()
    ends = time.monotonic() + options.seconds - _LAST_SECONDS
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tables.txt").write_text("")
    failed = []
    for stage in STAGES:
        if stage.name not in options.stages:
            continue
        left = min(stage.seconds[options.device], int(ends - time.monotonic()))
        record = run(stage, options.device, options.out, left)
        if not record["done"] and not (record["out of time"] and record["numbers"]):
            failed.append(stage.name)
    print("failed: " + ", ".join(failed) if failed else "all stages are done", flush=True)
    sys.exit(bool(failed))


def run(stage: Stage, device: str, out: Path, seconds: int) -> dict[str, Any]:
    """Run a stage for at most so many seconds; return how it ended, which its table says too."""
    path, began = out / f"{stage.name}.jsonl", time.monotonic()
    path.write_text("")
    code: int | None = None
    if seconds >= _LEAST_SECONDS:
        code = _code(stage, device, path, seconds, out / "log.txt")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ended: dict[str, Any] = {
        "stage": stage.name,
        "done": code == 0,
        "out of time": code is None,
        "numbers": len(rows[1:]),  # the first says on what
        "seconds": round(time.monotonic() - began, 1),
    }
    with path.open("a") as file:
        file.write(json.dumps(ended) + "\n")
    shown = "\n".join([f"== {stage.name}: {_ending(ended, code, seconds)}", *map(_line, rows), ""])
    print(shown, flush=True)
    with (out / "tables.txt").open("a") as file:
        file.write(shown + "\n")
    return ended


def _code(stage: Stage, device: str, path: Path, seconds: int, log: Path) -> int | None:
    """Return the exit code of a stage's process; None where its time was over, and it is ended."""
    command = [sys.executable, str(HERE / stage.script), device, str(path), str(seconds)]
    with log.open("a") as said:
        said.write(f"== {stage.name}\n")
        said.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # whatever it has started goes with it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ending(ended: dict[str, Any], code: int | None, seconds: int) -> str:
    if seconds < _LEAST_SECONDS:
        return "not begun, no time was left"
    how = "done" if code == 0 else "out of time" if code is None else f"failed with {code}"
    return f"{how} after {ended['seconds']} s"


def _line(row: dict[str, Any]) -> str:
    """Return a record as a line: what it is about, then its numbers."""
    told = [str(value) for value in row.values() if isinstance(value, str)]
    numbers = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if not isinstance(value, str)
    ]
    return "  " + " | ".join([*told, *numbers])


if __name__ == "__main__":
    main()
