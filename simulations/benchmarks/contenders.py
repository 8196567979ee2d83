"""The contenders of a workload: who they are, and a process of each that is led round by round."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import task
import torch
from gate import IDLE

from fedpriv.config import ExperimentConfig
from fedpriv.config_files import load_config
from fedpriv.experiment import prepare
from fedpriv.federation.builders import build_trainer
from fedpriv.models.options import ModelOptions

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

FEDPRIV, FLOWER, PFL = "fedpriv", "Flower FedAvg", "pfl-research"
STACKED, SEQUENTIAL = "fedpriv, stacked", "fedpriv, sequential"

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class ContenderError(Exception):
    """A contender ended before its rounds did, or did not do its work."""


@dataclass(frozen=True)
class Contender:
    """One who takes part.

    Attributes:
        name: as it is called in tables.
        folder: its own folder, with what it is given and what it leaves.
        command: starts it.
    """

    name: str
    folder: Path
    command: tuple[str, ...]


class Running:
    """The process of a contender, from its start to its end; a context manager."""

    def __init__(self, contender: Contender, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is what a contender has otherwise than all others."""
        self.contender = contender
        self._errors = contender.folder / "stderr"
        path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": path, "FLWR_HOME": str(contender.folder / "flwr")}
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                contender.command,
                env=os.environ | ENVIRONMENT | own | dict(environment or {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._tell_all(signal.SIGKILL)
            self._process.wait()

    def stand_ready(self) -> None:
        """Wait for a contender to be ready for its first turn."""
        self._wait_until_idle()
        self._tell_all(signal.SIGSTOP)

    def _wait_until_idle(self) -> int:
        """Wait for the contender to do all its work so far; return how many users it trained."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(IDLE):
                return int(line.removeprefix(IDLE))
        raise self._failure()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let a contender run rounds in the body; before and after that its processes are stopped.

        Those of Ray would take up to a tenth of a core from whoever's turn it is.
        """
        self._tell_all(signal.SIGCONT)
        yield
        self._tell_all(signal.SIGSTOP)

    def round(self, users: int) -> float:
        """Let an idle contender run one round of `users` and return its wall time (seconds).

        The time goes from the word to go on until the contender is idle again, so it holds all
        that lies between two rounds: sampling, messages, training, noise, the server's step,
        and in fedpriv the ledger, the checkpoint and the metrics.

        Raises ContenderError where other than `users` were trained: a worker that died leaves
        users out, and a round without them is quick.
        """
        started = time.perf_counter()
        self._go_on()
        trained = self._wait_until_idle()
        seconds = time.perf_counter() - started
        if trained != users:
            raise ContenderError(
                f"{self.contender.name} trained {trained} of {users} users in a round: a worker "
                "died; is memory short?"
            )
        return seconds

    def end(self) -> None:
        """Let a contender that has run its last round end."""
        self._tell_all(signal.SIGCONT)
        self._go_on()
        self._process.communicate()
        if self._process.returncode:
            raise self._failure()

    def _tell_all(self, what: signal.Signals) -> None:
        for number in _family(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(number, what)

    def _failure(self) -> ContenderError:
        said = self._errors.read_text().strip().splitlines()
        return ContenderError("\n".join([f"{self.contender.name} failed:", *said[-15:]]))

    def _go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go on\n")
        self._process.stdin.flush()


def _family(number: int) -> list[int]:
    """Return a process and all its descendants: torchrun's are in process groups of their own."""
    found = [number]
    for listed in Path(f"/proc/{number}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # threads end
            for child in listed.read_text().split():
                found += _family(int(child))
    return found


@dataclass(frozen=True)
class Peers:
    """Who competes with fedpriv: `pfl_python` is an interpreter with pfl, or None for no pfl."""

    pfl_python: str | None


def against_peers(
    config: Path, overrides: list[str], folder: Path, peers: Peers
) -> list[Contender]:
    """Return fedpriv, vanilla Flower and pfl-research on the same task, fedpriv first."""
    resolved = load_config(config, overrides)
    given, arrays = task_of(resolved), arrays_of(resolved)
    names = {"fedpriv": FEDPRIV, "flower": FLOWER, "pfl": PFL}
    for place in names:
        (folder / place).mkdir(parents=True)
        task.write(folder / place, given, arrays)
    torchrun = "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.workers}"
    commands: dict[str, list[str]] = {
        "fedpriv": [sys.executable, str(HERE / "fedpriv_rounds.py"), str(folder / "fedpriv")],
        "flower": [sys.executable, str(HERE / "flower_rounds.py"), str(folder / "flower")],
    }
    commands["fedpriv"] += [str(config), *overrides]
    if peers.pfl_python is not None:
        script = str(HERE / "pfl_rounds.py")
        commands["pfl"] = [peers.pfl_python, *torchrun, script, str(folder / "pfl")]
    return [Contender(names[at], folder / at, tuple(line)) for at, line in commands.items()]


def against_itself(config: Path, overrides: list[str], folder: Path) -> list[Contender]:
    """Return fedpriv with its two engines, stacked first."""
    settings = {
        STACKED: ["runtime.engine=stacked"],
        SEQUENTIAL: ["runtime.engine=sequential"],
    }
    contenders = []
    for number, (name, own) in enumerate(settings.items()):
        place = folder / str(number)
        place.mkdir(parents=True)
        script = str(HERE / "fedpriv_rounds.py")
        line = (sys.executable, script, str(place), str(config), *overrides, *own)
        contenders.append(Contender(name, place, line))
    return contenders


def cohort_of(config: ExperimentConfig) -> int:
    """Return how many users each round trains; it must be a fixed number, not one in expectation.

    Raises ValueError where rounds differ.
    """
    assert config.data.users is not None
    if config.privacy is None:
        if config.cohort is not None:
            raise ValueError("cohort is an expectation: write null, for all users")
        return config.data.users
    sampling = config.privacy.sampling
    if sampling.kind == "poisson":
        raise ValueError("privacy.sampling.kind: poisson has rounds of different sizes")
    return config.data.users if sampling.kind == "all" else int(sampling.cohort or 0)


def task_of(config: ExperimentConfig) -> task.Task:
    """Return what the peers are to do, which is what `config` lets fedpriv do.

    Raises ValueError where the peers could not do the same.
    """
    local, privacy, examples = config.local, config.privacy, config.data.examples_per_user
    if examples is None or local.steps is None or local.steps * local.batch_size % examples:
        raise ValueError("peers take whole passes over examples_per_user: mend local.steps")
    plain = local.optimizer.name == "sgd" and local.schedule.kind == "constant"
    if local.momentum or local.proximal_mu or local.max_grad_norm is not None or not plain:
        raise ValueError("peers take plain SGD steps")
    if config.server.optimizer != "sgd" or config.server.lr != 1.0:
        raise ValueError("Flower's FedAvg is server.optimizer: sgd with server.lr: 1.0")
    side = config.data.synthetic.side
    if config.model.train != "all" or config.model.convert is not None:
        raise ValueError("peers train all of the model: mend model.train or model.convert")
    shape = config.model.model_dump(exclude=set(ModelOptions.model_fields))
    make = config.model.name if ":" in config.model.name else "fedpriv.models:ViT"
    return task.Task(
        model={"make": make, "input_shape": (1, side, side), "classes": 10, **shape},
        users=config.data.users or 0,
        cohort=cohort_of(config),
        rounds=config.rounds,
        passes=local.steps * local.batch_size // examples,
        batch_size=local.batch_size,
        lr=local.lr,
        bound=None if privacy is None else privacy.clipping.bound,
        noise_multiplier=0.0 if privacy is None else privacy.noise_multiplier or 0.0,
        workers=config.runtime.workers,
    )


def arrays_of(config: ExperimentConfig) -> task.Arrays:
    """Return all users' examples and the start parameters, as fedpriv has them."""
    dataset = build_trainer(config).dataset
    users = [dataset.user(index) for index in range(dataset.population)]
    return task.Arrays(
        inputs=torch.stack([user.inputs for user in users]).numpy(),
        targets=torch.stack([user.targets for user in users]).numpy(),
        start=start_of(config),
    )


def start_of(config: ExperimentConfig) -> np.ndarray:
    """Return the parameters `[total]` that a run starts from."""
    return prepare(config).server.parameters().numpy()


def updates(contenders: list[Contender], start: np.ndarray, users: int) -> dict[str, np.ndarray]:
    """Let each contender run one round of `users`, its only one; return start minus end of each."""
    found = {}
    for contender in contenders:
        with Running(contender) as running:
            running.stand_ready()
            with running.turn():
                running.round(users)
            running.end()
        found[contender.name] = start - task.read_end(contender.folder)
    return found


def difference(update: np.ndarray, reference: np.ndarray) -> float:
    """Return the largest difference of two updates, in units of the reference's largest number.

    Infinite where a number is not finite, or where the reference moved nothing.
    """
    largest = np.abs(reference).max()
    if not (np.isfinite(update).all() and np.isfinite(largest) and largest > 0):
        return float("inf")
    return float(np.abs(update - reference).max() / largest)
