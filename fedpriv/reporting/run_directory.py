"""The run directory: everything that a run leaves behind, and all that resuming needs.

config.yaml        the resolved config
environment.json   versions, platform, git state, device
ledger.jsonl       every release, durably, before its use
metrics.jsonl      one line a finished round
checkpoints/       the newest states, and the best one, best.safetensors, with keep_best
memory/            what users keep between rounds, where they do: a part of the newest state
report.html        the report
plot.png           quality and ε by round
trace.json         where the time went, with runtime.profile
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from typing import IO, Any

import torch

from fedpriv import __version__, disk
from fedpriv.config import ExperimentConfig
from fedpriv.config_files import load_config
from fedpriv.errors import InputError
from fedpriv.privacy.ledger import Header, Ledger, read_ledger
from fedpriv.privacy.ledger_checks import check_version
from fedpriv.reporting.terminal import in_a_shell

#: What the best trial of a tuning knows of its price.
TUNED = "tuned.json"
_RECORDS = ("config.yaml", "environment.json", "ledger.jsonl", "metrics.jsonl", "audit.json", TUNED)
_LIBRARIES = ("torch", "flwr", "ray", "dp-accounting", "numpy", "pytorch_optimizer")
# Extras that may decide numbers: what begins a model or adapters, reads data, or makes tokens.
_EXTRAS = (
    "PLD_accounting",
    "datasets",
    "flwr-datasets",
    "opacus",
    "pandas",
    "peft",
    "pillow",
    "pyarrow",
    "scipy",
    "timm",
    "tokenizers",
    "torchaudio",
    "torchvision",
    "transformers",
)


def write_whole(path: Path, contents: str | bytes, what: str) -> None:
    """Write a file whole or not at all; `what` it is stands in the error.

    Raises:
        InputError: it cannot be written; what was there before still is.
        OSError: there is no room for it.
    """
    try:
        disk.write_whole(path, contents)
    except OSError as error:
        if disk.has_no_room(error):
            raise
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
    def best(self) -> Path:
        """The path of the best checkpoint, where it is kept."""
        return self.checkpoints / "best.safetensors"

    @property
    def memory(self) -> Path:
        """The folder of users' memories."""
        return self.path / "memory"

    @property
    def report(self) -> Path:
        """The path of the HTML report."""
        return self.path / "report.html"

    @property
    def held(self) -> Path:
        """The path of a file that holds room for the next round; who dies leaves it torn."""
        return self.path / "room.partial"

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
        environment = {**_environment(config, device), **(about or {})}
        files = {
            "config.yaml": config.to_yaml(),
            "environment.json": json.dumps(environment, indent=2) + "\n",
        }
        run, new = cls(path), not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            require_empty(path)
            run.checkpoints.mkdir()  # one of two processes fails here
        except OSError as error:
            raise InputError(f"run_dir: cannot write {path} ({error.strerror})") from None
        try:
            run._locked().close()
            for name, text in files.items():
                disk.write_whole(path / name, text)
        except (OSError, InputError) as error:
            run._abandon(new)
            if isinstance(error, InputError):
                raise
            raise InputError(f"run_dir: cannot write {path} ({error.strerror})") from None
        return run

    def _abandon(self, new: bool) -> None:
        """Remove what `create` has made, with the folder where it is `new`, for another try."""
        for name in ("config.yaml", "environment.json", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.checkpoints, self.path) if new else (self.checkpoints,):
            with suppress(OSError):
                folder.rmdir()

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Return an existing run directory.

        Raises:
            InputError: there is no run at `path`.
        """
        if (path / "config.yaml").is_file():
            return cls(path)
        raise InputError(f"{path}: not a run directory (it has no config.yaml){newest_below(path)}")

    def config(self) -> ExperimentConfig:
        """Return the run's resolved config, which is only read."""
        return load_config(self.path / "config.yaml", reading=True)

    def config_to_continue(self) -> ExperimentConfig:
        """Return the run's resolved config, with all the code that it names.

        Raises:
            InputError: some of it is not there, or another version of fedpriv wrote the run.
        """
        # A process may have died while it wrote the header.
        if self.ledger.exists() and b"\n" in self.ledger.read_bytes():
            check_version(self.ledger, read_ledger(self.ledger).header)
        return load_config(self.path / "config.yaml")

    def environment(self) -> dict[str, Any]:
        """Return what the run was started on."""
        try:
            return dict(json.loads((self.path / "environment.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            raise InputError(f"{self.path}/environment.json: missing or not JSON") from None

    def lock(self) -> IO[bytes]:
        """Take the run for this process; the lock is held until the file is closed.

        What an earlier process has not finished writing is removed.

        Raises:
            InputError: another process is running it, or nobody can tell.
        """
        self.checkpoints.mkdir(exist_ok=True)
        file = self._locked()
        for folder in (self.path, self.checkpoints):
            for torn in folder.glob("*.partial"):
                torn.unlink(missing_ok=True)
        return file

    def _locked(self) -> IO[bytes]:
        return take(self.path, "another process is already running this run")

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
        try:
            lines = self.metrics.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(f"{self.metrics}: cannot be read ({error.strerror})") from None
        return [self._row(number, line) for number, line in enumerate(lines[:-1], start=1)]

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("round"), int):
                return row
        except (ValueError, RecursionError):
            pass
        raise InputError(f"{self.metrics}, line {number}: not the metrics of a round")

    def keep_metrics(self, up_to_round: int) -> None:
        """Drop the lines of rounds after `up_to_round`, which will be run again."""
        rows = [row for row in self.read_metrics() if row["round"] <= up_to_round]
        disk.write_whole(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))


def take(folder: Path, busy: str) -> IO[bytes]:
    """Take a folder for this process; the lock is held until the file is closed.

    Raises:
        InputError: another process has it, which is what `busy` says, or nobody can tell.
        OSError: the folder cannot be written.
    """
    file = (folder / ".lock").open("wb")
    try:
        disk.lock(file)
    except BlockingIOError:
        file.close()
        raise InputError(f"{folder}: {busy}") from None
    except OSError as error:
        file.close()
        raise InputError(
            f"run_dir: {folder} lies on a file system without locks ({error.strerror}): two "
            "processes could run it at once; write a run_dir on another disk"
        ) from None
    return file


def require_no_record(path: Path, option: str) -> None:
    """Raise InputError where a file to be written is no file's name, or a record of a run."""
    folders = [path.resolve().parent, path.resolve().parent.parent]
    runs = [each for each in folders if (each / "checkpoints").is_dir()]
    inner = runs and path.resolve().parent.name in ("checkpoints", "memory")
    if not path.name or path.is_dir():
        raise InputError(f"{option}: {path} is a folder; name a file in it")
    if runs and (inner or path.resolve().name in _RECORDS):
        raise InputError(f"{option}: {path} is a record of the run {runs[0]}; name another file")


def newest_below(path: Path) -> str:
    """Return the end of a sentence that names the newest run in `runs` or `runs/<name>`.

    It is empty where there is no run in the folder, or one below.
    """
    configs = [*path.glob("*/config.yaml"), *path.glob("*/*/config.yaml")]
    runs = [config for config in configs if (config.parent / "checkpoints").is_dir()]
    if not runs:
        return ""
    newest = max(runs, key=lambda config: (config.stat().st_mtime, config.parent.name))
    return f"; the newest run in it is {in_a_shell(newest.parent)}"


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
            f"run_dir: {path} is not empty; choose another, or continue it with: "
            f"fedpriv resume {in_a_shell(path)}"
        )


def _environment(config: ExperimentConfig, device: str) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": None if config.runtime.deployment else config.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"fedpriv": __version__}
        | {name: version(name) for name in _LIBRARIES}
        | {name: version(name) for name in _EXTRAS if _installed(name)},
        "git": _git_state(),
    }


def _installed(name: str) -> bool:
    return next(iter(distributions(name=name)), None) is not None


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
