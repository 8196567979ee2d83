"""Reading a run directory, without ever writing to it: the run may still be going on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedpriv.config import ExperimentConfig
from fedpriv.data.facts import DataFacts
from fedpriv.errors import InputError
from fedpriv.privacy.accounts import most_charged
from fedpriv.privacy.ledger import Header, Release, read_ledger
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.privacy.mechanisms.registry import mechanism_of
from fedpriv.privacy.sampling import Adjacency, Sampling
from fedpriv.reporting.choice import UNTOLD, Choice, read_choice
from fedpriv.reporting.completeness import NO_EVIDENCE, Evidence, read_evidence
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.selection import Selection, ended_early, releases_ahead, selection
from fedpriv.tasks.quality import ACCURACY, Quality, quality_of
from fedpriv.training.checkpoint import checkpoint_files

#: What a checkpoint calls the model's parameters, as against the optimizer's state.
PARAMETER = "parameter/"
# What a line of metrics says of ε, and by whom.
_OF_EPSILON = ("epsilon", "without_pld", "groups")


@dataclass(frozen=True)
class Measured:
    """What the held-out examples say of the released models.

    Attributes:
        quality: the measure of the task.
        rounds: the rounds that were measured.
        values: one value a measured round.
    """

    quality: Quality
    rounds: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def final(self) -> float:
        """The last value; nan where nothing was measured."""
        return self.values[-1] if self.values else math.nan

    @property
    def told(self) -> str:
        """The last value, as people read it; "–" where nothing was measured."""
        return "–" if math.isnan(self.final) else self.quality.number(self.final)


@dataclass(frozen=True)
class Run:
    """A run as it stands in its directory.

    Attributes:
        path: the run directory.
        config: the resolved config.
        environment: what the run was started on.
        header: for which run the ledger is.
        releases: every release that the ledger charges, in order.
        rows: the metrics of the finished rounds, in order; never empty.
        parameters: number of the model's parameters, None where no checkpoint tells it.
        evidence: what lies beside the ledger and shows what was finished.
        missing: what the ledger or the metrics lack by that evidence, a sentence each.
        complete: whether the ledger lacks nothing by it.
        choice: what chose it among the trials of tunings; None for a run that is no trial, and for
            a trial of which nothing says it.
    """

    path: Path
    config: ExperimentConfig
    environment: dict[str, Any]
    header: Header
    releases: tuple[Release, ...]
    rows: tuple[dict[str, Any], ...]
    parameters: int | None
    evidence: Evidence = NO_EVIDENCE
    missing: tuple[str, ...] = ()
    complete: bool = True
    choice: Choice | None = None

    @property
    def trial(self) -> int:
        """Its label among the trials of a tuning; 0 where it is none. The ledger decides."""
        return self.header.trial or self.config.trial

    @property
    def unclaimed(self) -> str | None:
        """Why nothing can be claimed of it, though its releases are noisy; None where it can."""
        if not self.complete:
            return "lines of the ledger are missing"
        return UNTOLD if self.trial and self.choice is None else None

    @property
    def told_rows(self) -> tuple[dict[str, Any], ...]:
        """The metrics as they are handed on: of a trial without ε, which no round of it has."""
        if not self.trial:
            return self.rows
        return tuple({k: v for k, v in row.items() if k not in _OF_EPSILON} for row in self.rows)

    @property
    def private(self) -> bool:
        """Whether every release was bounded and noisy. The ledger decides, not the config."""
        return self.delta is not None and all(
            release.bound is not None and release.stddev > 0 for release in self.releases
        )

    @property
    def delta(self) -> float | None:
        """The δ of the ledger; None without privacy."""
        return self.header.delta

    @property
    def adjacency(self) -> Adjacency:
        """The adjacency of the ledger."""
        return Adjacency(self.header.adjacency)

    @property
    def facts(self) -> DataFacts:
        """What was checked of the data when the run began; a deployment knows nothing of them."""
        where = f"{self.path}/environment.json: data_facts"
        return DataFacts.of(self.environment.get("data_facts", {}), where)

    @property
    def seeded(self) -> bool:
        """Whether whoever knows the seed can draw sampling and noise again: a simulation."""
        return not self.deployed

    @property
    def deployed(self) -> bool:
        """Whether it was a deployment. The ledger decides where it says."""
        if self.header.mode:
            return self.header.mode == "deployment"
        return self.config.runtime.deployment

    @property
    def finished_rounds(self) -> int:
        """The last finished round."""
        return int(self.rows[-1]["round"])

    @property
    def sampling(self) -> Sampling:
        """The sampling of the newest release, of those who pay where these are not all users."""
        return self.mechanism.sampling_of(self.releases[-1])

    @property
    def mechanism(self) -> type[Mechanism]:
        """Who adds which noise, and what may be said of it. The ledger decides."""
        return mechanism_of(self.header)

    @property
    def measured(self) -> Measured:
        """The task's measure in the rounds in which it was taken."""
        measured = [row for row in self.rows if row.get("held_out")]
        quality = quality_of(measured[-1]) if measured else ACCURACY
        points = [(row["round"], _number(row["held_out"].get(quality.key))) for row in measured]
        finite = [(round_, value) for round_, value in points if math.isfinite(value)]
        return Measured(quality, tuple(r for r, _ in finite), tuple(v for _, v in finite))

    @property
    def selection(self) -> Selection | None:
        """The best of the rounds that were measured; None where none was."""
        return selection(self.rows)

    @property
    def ended_early(self) -> bool:
        """Whether `evaluation.stop_after` has ended it before its last round."""
        return ended_early(self.config, self.rows)

    @cached_property
    def ahead(self) -> tuple[Release, ...]:
        """The releases that it answers for and never made, as it ended early."""
        return releases_ahead(self.config, self.rows, self.releases)

    @property
    def seconds(self) -> float:
        """Wall time of the finished rounds."""
        return math.fsum(_number(row.get("seconds")) for row in self.rows)

    def seen(self, key: str) -> list[float]:
        """Return a simulation-only scalar of every round; nan where it is missing.

        A deployment writes none of them.
        """
        return [_number(row.get("simulation_only", {}).get(key)) for row in self.rows]


def read_run(path: Path) -> Run:
    """Read the run at `path`. Nothing is written, not even to mend a torn line of the ledger.

    Raises:
        InputError: no run there, no finished round yet, or a damaged file.
    """
    directory = RunDirectory.open(path)
    evidence = read_evidence(path)  # before the ledger, which may grow meanwhile
    rows = directory.read_metrics()
    if not rows and evidence.finished:
        raise InputError(
            f"{directory.metrics}: missing or cut off, though rounds are finished up to "
            f"{max(evidence.finished.values())}; put it back"
        )
    if not rows:
        raise InputError(f"{path}: no finished round yet; there is nothing to report")
    ledger = read_ledger(directory.ledger)
    if not ledger.releases:
        raise InputError(f"{directory.ledger}: charges nothing, although rounds are finished")
    run = Run(
        path=path,
        config=directory.config(),
        environment=directory.environment(),
        header=ledger.header,
        releases=ledger.releases,
        rows=tuple(rows),
        parameters=_parameters(directory),
        evidence=evidence,
        missing=evidence.missing(ledger.releases, ledger.hashes),
        complete=not evidence.unpaid(ledger.releases, ledger.hashes),
    )
    charged = most_charged((*run.releases, *run.ahead)) if run.trial else ()
    own = Counter(release.event() for release in charged)
    return replace(run, choice=read_choice(path, run.header, run.trial, own))


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Return one name a run: the experiment's, with the directory's where that is not enough.

    Where others than the server add the noise, or it is correlated, it says so.
    """
    labels = [run.mechanism.label for run in runs]
    names = [
        run.config.name + (f" ({label})" if label else "")
        for run, label in zip(runs, labels, strict=True)
    ]
    if len(set(names)) == len(names):
        return names
    return [f"{name} · {run.path.resolve().name}" for name, run in zip(names, runs, strict=True)]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _parameters(directory: RunDirectory) -> int | None:
    """Count the parameters from the shapes in the newest checkpoint, reading no values."""
    files = checkpoint_files(directory.checkpoints)
    if not files:
        return None
    try:
        with safe_open(files[-1], framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(PARAMETER)]  # noqa: SIM118
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in names]
    except (SafetensorError, OSError):
        return None
    return sum(sizes) or None
