"""A config becomes a run directory: prepare, train, record, resume."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from fedpriv.components import outside
from fedpriv.config import ExperimentConfig
from fedpriv.data.federated import Batch
from fedpriv.errors import InputError, Interrupted
from fedpriv.failures import told_as
from fedpriv.federation.builders import build_algorithm, build_clipping
from fedpriv.federation.grids import simulated_nodes
from fedpriv.federation.plan import Plan
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.models.parameters import Layout
from fedpriv.optimizers.server import Server
from fedpriv.preparation import plan_for, ready_trainer
from fedpriv.privacy.clipping import undone
from fedpriv.privacy.ledger import Header, Ledger, read_ledger
from fedpriv.privacy.ledger_checks import check_same_run
from fedpriv.recorder import BOUNDS, JOURNALS, News, Recorded, Recorder, keep_best
from fedpriv.reporting.completeness import read_evidence
from fedpriv.reporting.profile import Profile
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.reporting.terminal import in_a_shell
from fedpriv.runtime import RuntimeConfig
from fedpriv.seed_model import origin_of
from fedpriv.selection import ends, not_public, selection
from fedpriv.tasks.base import BY_CLASS
from fedpriv.tasks.quality import Quality
from fedpriv.trackers.base import TrackedRun, Tracking, settings_of
from fedpriv.training.checkpoint import (
    checkpoint_files,
    load_checkpoint,
)
from fedpriv.training.cohort import CohortTrainer
from fedpriv.training.memory_store import Journal, MemoryFormat, MemorySizes, MemoryStore

S = TypeVar("S", bound=Server)


class Observer(News, Protocol):
    """An observer of a run, such as the progress bar."""

    def begin(self, experiment: Experiment) -> None:
        """The run is about to start or go on."""


@dataclass
class Experiment:
    """A run that is prepared: everything is checked and nothing has been released."""

    plan: Plan
    trainer: CohortTrainer
    server: Server
    finished_rounds: int = 0
    over: bool = False  #: whether it was ended before its last round
    bounds: tuple[float, ...] = ()
    profile: Profile = field(default_factory=Profile)
    journals: tuple[Journal, ...] = ()
    held_out: tuple[Batch, ...] = field(init=False)

    def __post_init__(self) -> None:
        trainer = self.trainer
        if not self.config.runtime.deployment:
            trainer.task.require(trainer.dataset)
        self.held_out = tuple(map(self._measurable, trainer.dataset.evaluation()))
        if not any(len(part) for part in self.held_out):
            raise InputError("data: none of the held-out examples can be used")

    def _measurable(self, part: Batch) -> Batch:
        """Return held-out examples as they are measured on.

        Raises:
            InputError: the model could not be.
        """
        prepared = self.trainer.task.prepare(self.trainer.model, part)
        self.trainer.task.require_targets(prepared, self.trainer.dataset.classes)
        return prepared.to(self.trainer.device)

    @property
    def config(self) -> ExperimentConfig:
        """The config."""
        return self.plan.config

    @property
    def finished(self) -> bool:
        """Whether no round is left."""
        return self.over or self.finished_rounds >= self.config.rounds

    @property
    def memory(self) -> MemoryFormat | None:
        """What users keep between rounds; None for nothing."""
        plan = self.plan
        if self.trainer.feedback is None and not self.trainer.algorithm.keeps:
            return None
        return MemoryFormat(
            population=plan.sampling.population,
            parameters=plan.layout.total,
            dtype=self.config.kept.dtype,
            fingerprint=self.plan.fingerprint,
        )

    def memory_sizes(self) -> MemorySizes | None:
        """Return what users' memories will take; None where they keep nothing."""
        if self.memory is None:
            return None
        ram = self.config.kept.ram_mib * 2**20
        cohort = self.plan.sampling.expected_cohort
        return MemorySizes.of(self.memory, cohort, self.config.rounds, ram)

    def measure(self, round_: int) -> tuple[dict[str, Any], Quality]:
        """Return what the held-out examples say of the model, and which measure is the task's.

        Of single classes they say it where they are public: of an accuracy alone next to nothing
        is told of one held-out person; a small class may be that person.
        """
        task, size = self.trainer.task, self.config.evaluation.batch_size
        measures = task.measure(self.trainer.model, self.held_out, size)
        if not_public(self.trainer.dataset.facts) is not None:
            measures.pop(BY_CLASS, None)
        return measures, task.quality

    @property
    def engine(self) -> str | None:
        """Which engine trains users, and why; None where nodes decide, or silos train."""
        config = self.config
        silos = config.privacy is not None and config.privacy.unit == "example"
        elsewhere = config.runtime.deployment or silos
        return None if elsewhere else f"users are trained {self.trainer.told}"

    def header(self) -> Header:
        """Return the header of this run's ledger."""
        return header_of(self.plan)


def header_of(plan: Plan) -> Header:
    """Return the header of the ledger of a run of `plan`."""
    return Header(
        fingerprint=plan.fingerprint,
        data=plan.data,
        mode="deployment" if plan.config.runtime.deployment else "simulation",
        population=plan.sampling.population,
        delta=plan.delta,
        adjacency=plan.adjacency.value,
        trial=plan.config.trial,
        outside=tuple(
            f"{key}: {found.told()}" for key, found in sorted(outside(plan.config).items())
        ),
        **plan.mechanism.header,
    )


def prepare(config: ExperimentConfig, seeded: bool = True) -> Experiment:
    """Build and check everything that a run needs, as `ready_trainer`; writes nothing.

    Raises:
        InputError: data, model, optimizer or privacy settings are impossible.
    """
    config, trainer = ready_trainer(config, seeded)
    return complete(plan_for(config, trainer), trainer)


def complete(plan: Plan, trainer: CohortTrainer) -> Experiment:
    """Return the experiment of a plan and what its nodes train with, with its server.

    Raises:
        InputError: the optimizer's settings are impossible, or no held-out example can be used.
    """
    if not {"server.optimizer", "server.normalize", "algorithm"}.isdisjoint(outside(plan.config)):
        _try_step(plan, trainer.model)
    return Experiment(plan, trainer, build_server(plan.config, trainer.model, Server))


def _try_step(plan: Plan, model: nn.Module) -> None:
    """Let the server of a plan move a copy of the model twice, by random numbers.

    Code from outside would first be called where a round is paid for: what it gets wrong is found
    here.

    Raises:
        InputError: it fails, or no checkpoint can hold what it keeps.
    """
    server = build_server(plan.config, copy.deepcopy(model), Server)
    generator = torch.Generator().manual_seed(0)
    for round_ in range(1, min(2, plan.config.rounds) + 1):
        algorithm = plan.algorithm.of_round(round_, server.lr(round_))
        update = torch.randn(server.layout.total, generator=generator)
        server.step(update, round_, seed=round_, noise=[1.0] * len(server.layout.names))
        server.require_finite(round_)
        averages = [update] * algorithm.vectors
        with told_as("algorithm: its server fails"):
            kept = algorithm.server(averages, server.shared, plan.fraction)
        if not isinstance(kept, torch.Tensor) or kept.shape != server.shared.shape:
            raise InputError(
                "algorithm: its server must return what it keeps, of the shape "
                f"{tuple(server.shared.shape)}"
            )
        server.shared = kept
        server.state()


def build_server(config: ExperimentConfig, model: nn.Module, kind: type[S]) -> S:
    """Return the server, a `kind` of `Server`, that moves `model` as the config says.

    Raises:
        InputError: an unknown optimizer, or options that it does not take.
    """
    algorithm = build_algorithm(config)
    return kind(
        model=model,
        optimizer=config.server.optimizer,
        lr=config.server.lr,
        options=config.server.options,
        schedule=config.server.schedule,
        normalize=config.server.normalize,
        rounds=config.rounds,
        shared=len(algorithm.shared),
        undone=undone(build_clipping(config, Layout.of(model))),
        signs=algorithm.signs,
    )


#: Something that runs a strategy to its end: the simulation, or a grid that Flower handed us.
Drive = Callable[[PrivateFedAvg], Any]


def create(experiment: Experiment) -> RunDirectory:
    """Make the run directory of a prepared experiment.

    Raises:
        InputError: the directory is not empty or cannot be written, or its disk is too small for
            what users will keep.
    """
    if (sizes := experiment.memory_sizes()) is not None:
        sizes.check_space(experiment.config.run_dir or Path("runs"))
    device = str(experiment.trainer.device)
    return RunDirectory.create(experiment.config, device, _about(experiment))


def _about(experiment: Experiment) -> dict[str, Any]:
    """Return what is known, at the start of a run, of its data and of its seed model.

    A deployment's users are at its nodes: what its server knows of a data set is not about them.
    """
    dataset, about = experiment.trainer.dataset, dict[str, Any]()
    if (engine := experiment.engine) is not None:
        about["engine"] = engine
    if not experiment.config.runtime.deployment:
        about |= {"data": dataset.description, "data_facts": dataset.facts.document()}
        if dataset.sizes:
            about["simulation_only"] = {"data": dataset.sizes}
    if found := outside(experiment.config):
        about["outside"] = {
            key: {"name": each.name, **each.origin.document()}
            for key, each in found.items()
            if each.origin
        }
    if experiment.config.seed_model is not None:
        about["seed_model"] = {"origin": origin_of(experiment.config)}
    return about


def reopen(path: Path) -> tuple[RunDirectory, Experiment]:
    """Return a run and its experiment, restored from the newest checkpoint.

    Raises:
        InputError: no run there, or its config or checkpoint is damaged or another run's.
    """
    directory = RunDirectory.open(path)
    files = checkpoint_files(directory.checkpoints)
    experiment = prepare(directory.config_to_continue(), seeded=not files)
    restore(experiment, directory)
    return directory, experiment


#: Which of a run's models: the newest, or the one that `evaluation.keep_best` kept.
Which = Literal["last", "best"]


def reopen_model(path: Path, which: Which | None = None) -> Experiment:
    """Return the experiment of a run with the model that was released last, or that is best.

    `which` is None for the best where it was kept, and the last where not.

    Raises:
        InputError: there is none, or as for `reopen`.
    """
    directory = RunDirectory.open(path)
    if which not in (None, "last", "best"):
        raise InputError(f"--round: write last or best, not {which}")
    if which == "best" and not directory.best.exists():
        raise InputError(f"--round: {path} kept no best model (evaluation.keep_best); write last")
    experiment = prepare(directory.config_to_continue(), seeded=False)
    best = which != "last" and directory.best.exists()
    restore(experiment, directory, directory.best if best else None)
    if not experiment.finished_rounds:
        raise InputError(f"{path}: there is no checkpoint with a model")
    found = selection(directory.read_metrics()) if best else None
    if found is not None and found.round != experiment.finished_rounds:
        raise InputError(
            f"{directory.best} is of round {experiment.finished_rounds}, and round {found.round} "
            f"was better: fedpriv resume {in_a_shell(path)} mends it, or write --round last"
        )
    return experiment


def restore(experiment: Experiment, directory: RunDirectory, file: Path | None = None) -> None:
    """Bring a prepared experiment to where the run in a directory is; see `reopen`.

    `file` is the checkpoint; None for the newest.

    Raises:
        InputError: the run's ledger or checkpoint is damaged or another run's.
    """
    files = checkpoint_files(directory.checkpoints) if file is None else [file]
    if not files:
        return
    # Before the checkpoint: the ledger can say what differs.
    if directory.ledger.exists():
        found = read_ledger(directory.ledger).header
        check_same_run(directory.ledger, found, experiment.header())
    checkpoint = load_checkpoint(files[-1], experiment.plan.fingerprint)
    experiment.server.load_state(checkpoint.tensors)
    experiment.bounds = tuple(checkpoint.tensors[BOUNDS].tolist())
    journals = checkpoint.tensors.get(JOURNALS, torch.empty(0, 4)).tolist()
    experiment.journals = tuple(Journal(*each) for each in journals)
    experiment.finished_rounds = checkpoint.round
    rows = [row for row in directory.read_metrics() if row["round"] <= checkpoint.round]
    experiment.over = ends(experiment.config, rows)


def train(
    experiment: Experiment,
    directory: RunDirectory,
    observer: Observer,
    drive: Drive | None = None,
) -> None:
    """Run the rounds that are left, through `drive` or else over simulated nodes.

    Raises:
        InputError: the ledger is damaged or another run's, or a node finds the user's data wrong.
        BudgetError: the budget stopped the run; what was paid for is kept.
        Interrupted: the user stopped the run, which can be resumed.
    """
    if drive is None and experiment.config.runtime.deployment:
        raise InputError(
            "runtime.deployment: true trains over real nodes: use flwr run simulations/flower_app"
        )
    if drive is None:
        _check_gpus(experiment.config.runtime)
    with opened(experiment, directory, observer) as (ledger, stop):
        keep_best(experiment, directory)
        memory = _restored_memory(experiment, directory, observer)
        tracking = _tracking(experiment, directory, observer)
        recorder = Recorder(experiment, directory, ledger, observer, memory, tracking)
        strategy = PrivateFedAvg(
            experiment.plan,
            experiment.server,
            ledger,
            recorder.record,
            stop,
            first_round=experiment.finished_rounds + 1,
            bounds=experiment.bounds,
            memory=memory,
            say=observer.say,
        )
        observer.begin(experiment)
        if experiment.finished:
            return
        recorder.hold_room()
        try:
            if drive is None:
                with simulated_nodes(experiment.config) as grid:
                    strategy.start(grid)
            else:
                drive(strategy)
        finally:
            tracking.close()
            recorder.release_room()
            if experiment.config.runtime.profile:
                experiment.profile.write_trace(directory.trace)


@contextmanager
def opened(
    run: Recorded, directory: RunDirectory, observer: News
) -> Iterator[tuple[Ledger, threading.Event]]:
    """Take a run's directory for this process; yield its ledger, and what says that it is to stop.

    What the run began with stays in its plan, even where something else would be found here.

    Raises:
        InputError: another process has it, or its ledger is damaged, another run's, or lacks lines.
    """
    with directory.lock(), stop_signal(observer.say) as stop:
        ledger = directory.open_ledger(header_of(run.plan))
        if ledger.dropped_bytes:
            observer.say(
                f"{ledger.path}: dropped a torn last line of {ledger.dropped_bytes} bytes; its "
                f"release was never used, {len(ledger)} are charged"
            )
        _check_state(run, directory, ledger)
        run.plan = run.plan.as_begun(ledger)
        directory.keep_metrics(run.finished_rounds)
        yield ledger, stop


def _tracking(experiment: Experiment, directory: RunDirectory, observer: Observer) -> Tracking:
    """Return what hands finished rounds to the config's tracker, where any are left.

    Raises:
        InputError: the tracker cannot be had.
    """
    config = experiment.config
    run = TrackedRun(
        config.name,
        directory.path,
        settings_of(config.model_dump(mode="json")),
        experiment.finished_rounds,
    )
    return Tracking(None if experiment.finished else config.tracker, run, observer.say)


def _check_gpus(runtime: RuntimeConfig) -> None:
    """Check that a private cluster has the GPUs that its workers take: Ray would wait for them.

    Raises:
        InputError: there are too few for a single worker.
    """
    there = torch.cuda.device_count()
    if runtime.ray_address is None and runtime.gpus_per_worker > there:
        raise InputError(
            f"runtime.gpus_per_worker: a worker takes {runtime.gpus_per_worker:g} and there are "
            f"{there} CUDA devices here; write 0 to train on CPUs"
        )


def _check_state(experiment: Recorded, directory: RunDirectory, ledger: Ledger) -> None:
    """Check, under the lock, that what was restored is still the newest state and is paid for.

    Raises:
        InputError: another process has moved the run on, or the ledger lacks a release that
            checkpoints, metrics or memories know of: the budget would be held against too little.
    """
    files = checkpoint_files(directory.checkpoints)
    newest = int(files[-1].stem.removeprefix("round-")) if files else 0
    if newest != experiment.finished_rounds:
        raise InputError(f"{directory.path}: another process has continued this run; resume again")
    missing = read_evidence(directory.path).unpaid(ledger, ledger.hashes)
    if missing:
        raise InputError(f"{directory.ledger}: {' '.join(missing)}")


def _restored_memory(
    experiment: Experiment, directory: RunDirectory, observer: Observer
) -> MemoryStore | None:
    """Return the store of users' memories as they were after the last finished round."""
    sizes = experiment.memory_sizes()
    if experiment.memory is None or sizes is None:
        return None
    if (warning := sizes.check_space(directory.memory)) is not None:
        observer.say(warning)
    store = MemoryStore(directory.memory.absolute(), experiment.memory)
    store.restore(experiment.finished_rounds, experiment.journals)
    return store


@contextmanager
def stop_signal(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C (or SIGTERM) into a request to stop at the next safe moment.

    The second one ends the process at once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            say("abandoned; nothing that is finished is lost")
            # Flower and Ray would wait for the workers. The run directory is whole at any moment,
            # and Ray's processes end with this one.
            os._exit(Interrupted.exit_code)
        stop.set()
        say("stopping as soon as nothing is lost by it; press Ctrl-C again to abandon it")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
