"""The run directory: everything that a run leaves behind, and all that resuming needs.

config.yaml        the resolved config
environment.json   versions, platform, git state, device
ledger.jsonl       every release, durably, before its use
metrics.jsonl      one line a finished round
checkpoints/       the newest states
memory/            what users keep between rounds, where they do: a part of the newest state
report.html        the report
plot.png           quality and ε by round
trace.json         where the time went, with runtime.profile
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from fedpriv.config import ExperimentConfig, load_config
from fedpriv.errors import InputError
from fedpriv.privacy.ledger import Header, Ledger

_LIBRARIES = ("fedpriv", "torch", "flwr", "ray", "dp-accounting", "numpy", "pytorch_optimizer")


def write_whole(path: Path, text: str, what: str) -> None:
    """Write a file whole or not at all; `what` it is stands in the error.

    Raises:
        InputError: it cannot be written; what was there before still is.
    """
    scratch = path.with_name(path.name + ".partial")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write the {what} ({error.strerror})") from None


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run, and how they are written and read."""

    path: Path

    @property
    def ledger(self) -> Path:
        """The ledger's path."""
        return self.path / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        """The path of the metrics by round."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def memory(self) -> Path:
        """The folder of users' memories."""
        return self.path / "memory"

    @property
    def report(self) -> Path:
        """The path of the HTML report."""
        return self.path / "report.html"

    @property
    def trace(self) -> Path:
        """The path of the trace."""
        return self.path / "trace.json"

    @classmethod
    def create(
        cls, config: ExperimentConfig, device: str, about: Mapping[str, Any] | None = None
    ) -> RunDirectory:
        """Make a new run directory with config and environment; nothing is ever overwritten.

        `about` is what else `environment.json` says, such as what is known of the data.

        Raises:
            InputError: the folder is not empty or cannot be written.
        """
        now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        path = config.run_dir or Path("runs") / config.name / now
        try:
            path.mkdir(parents=True, exist_ok=True)
            require_empty(path)
            run = cls(path)
            run.checkpoints.mkdir()
            (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            environment = json.dumps({**_environment(config, device), **(about or {})}, indent=2)
            (path / "environment.json").write_text(environment + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"run_dir: cannot write {path} ({error.strerror})") from None
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Return an existing run directory.

        Raises:
            InputError: there is no run at `path`.
        """
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path}: not a run directory (it has no config.yaml)")
        return cls(path)

    def config(self) -> ExperimentConfig:
        """Return the run's resolved config."""
        return load_config(self.path / "config.yaml")

    def environment(self) -> dict[str, Any]:
        """Return what the run was started on."""
        try:
            return dict(json.loads((self.path / "environment.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            raise InputError(f"{self.path}/environment.json: missing or not JSON") from None

    def lock(self) -> IO[bytes]:
        """Take the run for this process; the lock is held until the file is closed.

        Raises:
            InputError: another process is running it.
        """
        self.checkpoints.mkdir(exist_ok=True)
        file = (self.path / ".lock").open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InputError(f"{self.path}: another process is running this run") from None
        return file

    def open_ledger(self, header: Header) -> Ledger:
        """Open the run's ledger, or start it where nothing can have been released yet.

        Raises:
            InputError: the ledger is damaged, another config's, or missing beside results.
        """
        begun = self.metrics.exists() or any(self.checkpoints.glob("*"))
        if self.ledger.exists() and (begun or b"\n" in self.ledger.read_bytes()):
            return Ledger.open(self.ledger, header)
        if begun:
            raise InputError(f"{self.ledger} is missing: without it the run's ε is unknown")
        # At most a torn header is there: the process died before anything could be charged.
        self.ledger.unlink(missing_ok=True)
        return Ledger.create(self.ledger, header)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add the line of a finished round."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of all finished rounds; a torn last line is left out.

        Raises:
            InputError: a line other than the last is not a round's metrics.
        """
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().split(b"\n")
        return [self._row(number, line) for number, line in enumerate(lines[:-1], start=1)]

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("round"), int):
                return row
        except ValueError:
            pass
        raise InputError(f"{self.metrics}, line {number}: not the metrics of a round")

    def keep_metrics(self, up_to_round: int) -> None:
        """Drop the lines of rounds after `up_to_round`, which will be run again."""
        rows = [row for row in self.read_metrics() if row["round"] <= up_to_round]
        _replace(self.metrics, (json.dumps(row) + "\n" for row in rows))


def require_empty(path: Path) -> None:
    """Refuse a folder that holds anything for a new run; one that is not there yet will do.

    Raises:
        InputError: the folder is not empty or cannot be read.
    """
    try:
        used = path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise InputError(f"run_dir: cannot read {path} ({error.strerror})") from None
    if used:
        raise InputError(
            f"run_dir: {path} is not empty; choose another, or continue it with "
            f"'fedpriv resume {path}'"
        )


def _replace(path: Path, lines: Iterable[str]) -> None:
    scratch = path.with_suffix(".partial")
    scratch.write_text("".join(lines), encoding="utf-8")
    scratch.replace(path)


def _environment(config: ExperimentConfig, device: str) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": None if config.runtime.deployment else config.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in _LIBRARIES},
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Return commit and cleanliness of the source tree that fedpriv runs from, if it is one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--", ".")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
