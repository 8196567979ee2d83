"""A config's privacy measured from outside: canaries, real users by coin, and the true round.

The run that is audited is the config's own: its sampling, clipping rule, mechanism, denominators
and server, driven by the true strategy over nodes in this process. Its population is larger by the
canaries, at the same sampling rate. The attacker sees every release as the server's optimizer got
it, and knows the real users' data, but no coin.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from fedpriv.canaries import Canaries, canary_ids
from fedpriv.config import ExperimentConfig
from fedpriv.errors import InputError
from fedpriv.experiment import Experiment, build_server, prepare
from fedpriv.federation.audit_node import AuditNode
from fedpriv.federation.grids.local import LocalGrid
from fedpriv.federation.plan import Plan
from fedpriv.federation.round_record import RoundRecord
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.models.parameters import Layout, load_parameters
from fedpriv.optimizers.server import Server
from fedpriv.privacy.accounts import most_charged
from fedpriv.privacy.auditing import (
    Coins,
    Floats,
    Membership,
    OneShotEstimate,
    allocated_scores,
    along_columns,
    gaussian_bound,
    inclusion_scores,
    membership,
    one_run_bound,
    one_shot_estimate,
)
from fedpriv.privacy.charging import charge
from fedpriv.privacy.ledger import Ledger
from fedpriv.privacy.mechanisms.allocated import AllocatedMechanism
from fedpriv.privacy.mechanisms.correlated import CorrelatedMechanism, group_of
from fedpriv.privacy.options import BudgetConfig
from fedpriv.privacy.randomness import Purpose, Randomness
from fedpriv.privacy.sampling import build_sampling
from fedpriv.reporting.audit import Audit
from fedpriv.training.cohort import CohortTrainer
from fedpriv.training.memory_store import MemorySizes

#: Canaries of an audit that does not say how many.
CANARIES = 500
_FEWEST_CANARIES = 40
# Real users whose membership is guessed, at most.
_MOST_USERS = 2000
_REAL, _CANARIES = 0, 1
# The part of the error probability that goes to either bound: canaries show far more.
_ERRORS = (0.1, 0.9)


class Observer(Protocol):
    """Whoever watches an audit, such as the progress bar."""

    def begin(self, rounds: int) -> None:
        """The audited run is about to start."""

    def finished(self, round_: int) -> None:
        """A round is finished."""


@dataclass(frozen=True)
class AuditSettings:
    """What an audit is asked for.

    Attributes:
        canaries: how many made-up users join the population.
        rounds: how many rounds are run and judged; None for all of the config's.
        confidence: of the lower bounds, from canaries and from real users, together.
    """

    canaries: int = CANARIES
    rounds: int | None = None
    confidence: float = 0.95


def audit(
    config: ExperimentConfig,
    settings: AuditSettings,
    observer: Observer,
    stop: threading.Event,
) -> Audit:
    """Run the config with canaries and return what can be told from its releases.

    Args:
        config: the config; where it has a seed model, one from `with_seed_model`.
        settings: canaries, rounds, confidence.
        observer: is told of each round.
        stop: ends the audit after the round in which it is set.

    Raises:
        InputError: the config promises nothing that could be audited, or settings are impossible.
        Interrupted: the user stopped it; nothing is kept.
    """
    check(config, settings)
    experiment = prepare(config)
    planned = experiment.plan.planned_cost()
    if planned is not None and math.isinf(planned.epsilon):
        raise InputError("privacy.noise_multiplier: so little noise makes ε infinite; write more")
    return _AuditedRun(experiment, settings).judged(observer, stop)


def check(config: ExperimentConfig, settings: AuditSettings) -> None:
    """Raise InputError where there is nothing to audit, or the settings are impossible."""
    if config.privacy is None:
        raise InputError(
            "privacy: null promises nothing, its ε is infinite: there is no claim to audit"
        )
    if config.privacy.noise_multiplier == 0:
        raise InputError(
            "privacy.noise_multiplier: 0 makes ε infinite: there is no claim to audit; write the "
            "noise that the run will have"
        )
    if config.trial:
        raise InputError(
            "trial: this is the config of one trial of a tuning, whose ε is that of the tuning, "
            "and an audit measures one run; write 0"
        )
    if config.runtime.deployment:
        raise InputError(
            "runtime.deployment: true trains real users, among whom no canaries are planted: audit "
            "the same config as a simulation, with --set runtime.deployment=false"
        )
    if config.privacy.unit != "user":
        raise InputError(
            "privacy.unit: example: canaries are users; an audit of silos' examples is not built"
        )
    if config.privacy.noise_by != "server":
        raise InputError(
            f"privacy.noise_by: {config.privacy.noise_by}: an audit measures noise that the server "
            "adds to one sum; an audit of what nodes or users send is not built"
        )
    if config.privacy.mechanism.kind not in ("independent", "correlated"):
        raise InputError(
            f"privacy.mechanism.kind: {config.privacy.mechanism.kind}: an audit knows how noise is "
            "made that is independent or correlated; an audit of your own mechanism is not built"
        )
    if settings.canaries < _FEWEST_CANARIES:
        raise InputError(
            f"--canaries: write at least {_FEWEST_CANARIES}, fewer show nothing, got "
            f"{settings.canaries}"
        )
    if settings.rounds is not None and not 1 <= settings.rounds <= config.rounds:
        raise InputError(
            f"--rounds must lie in 1 to {config.rounds}, the config's rounds, got {settings.rounds}"
        )
    if not 0.5 <= settings.confidence < 1:
        raise InputError(f"--confidence must lie in [0.5, 1), got {settings.confidence:g}")


class _WatchedRun(PrivateFedAvg):
    """A run whose averages the attacker reads, as they move the model and what else is kept."""

    averages: Tensor

    def move(self, averages: list[Tensor], round_: int, noise: tuple[float, ...]) -> Tensor:
        """Keep the averages, `[P·vectors]`, and move the model."""
        self.averages = torch.cat(averages)
        return super().move(averages, round_, noise)


@dataclass
class _Evidence:
    """What the releases say of each canary, round after round: float64 `[m]` each.

    Attributes:
        score: sum of the rounds' log-likelihood ratios.
        cosine: largest cosine of the canary's contribution with a release.
        projection: sum of the projections c'Σ⁻¹R.
        energy: sum of c'Σ⁻¹c.
    """

    score: Floats
    cosine: Floats
    projection: Floats
    energy: Floats


@dataclass
class _AuditedRun:
    """A run with canaries, and what its attacker has gathered."""

    experiment: Experiment
    settings: AuditSettings
    plan: Plan = field(init=False)
    canaries: Canaries = field(init=False)
    present: Coins = field(init=False)
    targets: np.ndarray = field(init=False)
    evidence: _Evidence = field(init=False)

    def __post_init__(self) -> None:
        self.plan = _audited_plan(self.experiment.plan, self.settings)
        self._generator = self.plan.randomness.numpy(Purpose.AUDIT)
        number, real_ids = self.settings.canaries, self.experiment.trainer.dataset.user_ids
        self.canaries = Canaries.drawn(canary_ids(real_ids, number), self.plan, self._generator)
        population = self.experiment.plan.sampling.population
        # Places of the population may be empty.
        there = min(population, self.experiment.trainer.dataset.population)
        size = min(there, _MOST_USERS)
        self.targets = np.sort(self._generator.choice(there, size, replace=False))
        self.present = np.arange(population) < there
        self.present[self.targets] = self._generator.integers(0, 2, size=size).astype(bool)
        zeros = np.zeros(number)
        self.evidence = _Evidence(zeros, np.full(number, -np.inf), zeros, zeros)
        self._bounds: tuple[float, ...] = ()  # of the round where they have adapted
        self._rows: list[tuple[Floats, Floats]] = []  # of rounds that are scored together
        model = self.experiment.trainer.model
        self.server = build_server(self.experiment.config, model, Server)
        # Training overwrites the model that it works in.
        self.trainer = replace(self.experiment.trainer, model=copy.deepcopy(model))
        real = AuditNode(self.trainer, self.present)
        self.nodes = (real, self.canaries.hosted(self.trainer))

    def judged(self, observer: Observer, stop: threading.Event) -> Audit:
        """Run all rounds and return what they show."""
        start = self.server.parameters()
        observer.begin(self.plan.config.rounds)

        def seen(record: RoundRecord) -> None:
            self._gather(strategy.averages)
            self._bounds = record.bounds
            observer.finished(record.round)

        with TemporaryDirectory() as scratch:
            header = replace(self.experiment.header(), population=self.plan.sampling.population)
            ledger = Ledger.create(Path(scratch) / "ledger.jsonl", header)
            self._keep_in(Path(scratch))
            strategy = _WatchedRun(self.plan, self.server, ledger, seen, stop)
            strategy.start(LocalGrid(len(self.nodes), self._node))
        if self._together:
            self._score_together()
        return self._audit(self._epsilons(ledger), self._membership(start))

    def _node(self, partition: int, partitions: int) -> Callable[[Message], Message]:
        return lambda message: self.nodes[partition].answer(message, partition, partitions)

    def _keep_in(self, scratch: Path) -> None:
        """Give users of either node a place for what they keep between rounds, if they do."""
        if (format_ := self.experiment.memory) is None:
            return
        everybody = replace(format_, population=self.plan.sampling.population)
        cohort, rounds = self.plan.sampling.expected_cohort, self.plan.config.rounds
        sizes = MemorySizes.of(everybody, cohort, rounds, ram=0)
        sizes.check_space(scratch, "TMPDIR", "name a folder on a larger disk")
        ram = self.plan.config.kept.ram_mib * 2**20 // len(self.nodes)
        for number, node in enumerate(self.nodes):
            node.keep_in(scratch / f"memories-{number}", format_, ram)

    def _gather(self, averages: Tensor) -> None:
        """Read the `averages` of one release, before nodes do the work of the next."""
        plan, canaries = self.plan, self.canaries
        mechanism = plan.mechanism.gaussian.at(self._bounds)
        released = averages.cpu() * plan.sampling.expected_cohort
        if plan.sampling.kind != "fixed_size":
            # Who of the real users was sampled says nothing of the canaries, and may be known.
            # Where the cohort has a fixed size it says how many canaries were.
            released = released - self.nodes[_REAL].sent
        for node in self.nodes:
            node.sent = 0.0
        slots, blocks = plan.algorithm.slots, len(canaries.sizes)
        # Each slot has the noise of every other.
        deviations = torch.tensor(mechanism.block_stddevs(blocks * slots)[:blocks])
        precision = deviations**-2.0
        scales = mechanism.clipping.scales(canaries.block_norms)
        projections, lengths = np.empty((2, len(canaries.slots)))
        for slot, own in enumerate(released.view(slots, -1)):
            there = canaries.slots == slot if slots > 1 else slice(None)
            along = canaries.along(own, there).double() * scales[there] * precision
            projections[there], lengths[there] = along.sum(1), self._length(own, precision)
        energies = ((scales * canaries.block_norms) ** 2 * precision).sum(1).numpy()
        if self._together:
            self._rows.append((projections, energies))
        else:
            self._add(projections, energies, lengths)

    @property
    def _together(self) -> bool:
        """Whether what a canary did in one round is seen in several, or bears on others."""
        return isinstance(self.plan.mechanism, CorrelatedMechanism | AllocatedMechanism)

    def _score_together(self) -> None:
        """Score rounds that were gathered, each canary by those in which it may take part."""
        projections, energies = (np.stack(each) for each in zip(*self._rows, strict=True))
        mechanism, score = self.plan.mechanism, self.evidence.score.copy()
        rounds = len(projections)
        if isinstance(mechanism, AllocatedMechanism):
            for first in range(0, rounds, mechanism.block):
                block = slice(first, first + mechanism.block)
                run = min(mechanism.block, rounds - first)
                score += allocated_scores(projections[block], energies[block], run, mechanism.block)
            inside = np.ones(projections.shape, dtype=bool)
        else:
            assert isinstance(mechanism, CorrelatedMechanism)
            column = mechanism.matrix.column(rounds)
            projections, energies = along_columns(projections, energies, column)
            groups = mechanism.groups
            own = np.array([group_of(each, groups) for each in self.canaries.ids])
            inside = own == np.arange(rounds)[:, None] % groups
            sampling = mechanism.sampling
            rate = min(1.0, groups * sampling.expected_cohort / sampling.population)
            for there, row, energy in zip(inside, projections, energies, strict=True):
                if there.any():  # a group may have no canary
                    signed = self.canaries.signed
                    score[there] += inclusion_scores(row[there], energy[there], rate, signed)
        self.evidence = _Evidence(
            score, self.evidence.cosine, (projections * inside).sum(0), (energies * inside).sum(0)
        )

    def _length(self, released: Tensor, precision: Tensor) -> float:
        squares = [part.square().sum() for part in released.split(self.canaries.sizes)]
        return math.sqrt(float((torch.stack(squares) * precision).sum()))

    def _add(self, projections: Floats, energies: Floats, lengths: Floats) -> None:
        found, rate = self.evidence, self.plan.sampling.expected_cohort
        rate /= self.plan.sampling.population
        self.evidence = _Evidence(
            found.score + inclusion_scores(projections, energies, rate, self.canaries.signed),
            np.maximum(found.cosine, projections / np.sqrt(energies) / lengths),
            found.projection + projections,
            found.energy + energies,
        )

    def _epsilons(self, ledger: Ledger) -> dict[str, float]:
        """Return ε by each of the config's accountants, of what the audited run was charged."""
        config = self.plan.config
        assert config.privacy is not None
        charged = Counter(release.event() for release in most_charged(list(ledger)))
        accountants, delta = config.privacy.accountants, config.privacy.delta
        cost = charge(charged, ledger.adjacency, [delta], accountants).first
        known = {"rdp": cost.epsilon_rdp, "pld": cost.epsilon_pld}
        return {name: epsilon for name, epsilon in known.items() if epsilon is not None}

    def _audit(self, epsilons: dict[str, float], users: Membership | None) -> Audit:
        plan, settings, canaries = self.plan, self.settings, self.canaries
        return Audit(
            name=plan.config.name,
            fingerprint=self.experiment.plan.fingerprint,
            seed=plan.config.seed,
            rounds=plan.config.rounds,
            planned_rounds=self.experiment.config.rounds,
            population=self.experiment.plan.sampling.population,
            canaries=settings.canaries,
            adjacency=plan.sampling.adjacency.value,
            delta=self._delta,
            confidence=settings.confidence,
            epsilons=epsilons,
            bound=one_run_bound(
                self.evidence.score, canaries.included, self._delta, self._confidence(_CANARIES)
            ),
            estimates=self._estimates(),
            users=users,
            gaussian=self._gaussian(),
        )

    def _gaussian(self) -> float | None:
        """Return the bound that is known of Gaussians alone; None where users are sampled."""
        if self.plan.sampling.kind != "all":
            return None
        scores, sure = self.evidence.score, self.settings.confidence
        return gaussian_bound(scores, self.canaries.included, self._delta, sure)

    def _estimates(self) -> tuple[OneShotEstimate, ...]:
        found, included = self.evidence, self.canaries.included
        statistics = {"sum of the rounds": found.projection / np.sqrt(found.energy)}
        if not (self.canaries.signed or self._together):
            statistics["largest cosine of a round"] = found.cosine
        return tuple(
            one_shot_estimate(
                name,
                values[included],
                values[~included],
                self._delta,
                self.settings.confidence,
                self._generator,
            )
            for name, values in statistics.items()
        )

    def _membership(self, start: Tensor) -> Membership | None:
        """Score real users by how much training lowered the loss on their own data.

        None where hardly any of them have data that can be used.
        """
        before = _losses(self.trainer, start, self.targets.tolist())
        after = _losses(self.trainer, self.server.parameters(), self.targets.tolist())
        scores = before - after
        scores[~np.isfinite(scores)] = np.nan
        if np.count_nonzero(~np.isnan(scores)) < _FEWEST_CANARIES:
            return None
        included, sure = self.present[self.targets], self.settings.confidence
        return membership(scores, included, self._delta, sure, self._confidence(_REAL))

    def _confidence(self, of: int) -> float:
        """Return the confidence of one of two bounds, the larger of which refutes (union bound).

        It is the same where real users cannot be scored, which may depend on how training went.
        """
        return 1 - (1 - self.settings.confidence) * _ERRORS[of]

    @property
    def _delta(self) -> float:
        assert self.plan.delta is not None
        return self.plan.delta


def _audited_plan(plan: Plan, settings: AuditSettings) -> Plan:
    """Return `plan` with canaries in the population, at the same sampling rate.

    Sampling and noise are drawn apart from those of the config's own run: two runs that share
    noise would show the difference of their sums.
    """
    config, sampling = plan.config, plan.sampling
    rounds = _rounds(plan, settings)
    population = sampling.population + settings.canaries
    cohort = sampling.expected_cohort * population / sampling.population
    if sampling.kind == "fixed_size":
        cohort = math.ceil(cohort)
    mechanism, ids = plan.mechanism, dict[str, Any]()
    if isinstance(mechanism, CorrelatedMechanism):
        if rounds < mechanism.groups:
            raise InputError(
                f"--rounds: {rounds} of {mechanism.groups} groups would be drawn from; run at "
                "least as many rounds as there are groups"
            )
        cohort = min(cohort, population / mechanism.groups)
        # Places of the population may be empty.
        real = [*mechanism.user_ids[: sampling.population]]
        real += [f"nobody-{place}" for place in range(len(real), sampling.population)]
        ids = {"user_ids": [*real, *canary_ids(mechanism.user_ids, settings.canaries)]}
    separation = getattr(sampling, "rounds", None)
    assert config.privacy is not None
    audited = config.model_copy(
        update={
            "rounds": rounds,
            "runtime": config.runtime.model_copy(update={"workers": 2}),
            "privacy": config.privacy.model_copy(update={"budget": BudgetConfig()}),
        }
    )
    run = f"audit/{settings.canaries}/{rounds}/{plan.fingerprint}"
    return replace(
        plan,
        config=audited,
        mechanism=replace(
            mechanism,
            sampling=build_sampling(
                sampling.kind, population, cohort, sampling.adjacency, separation
            ),
            **ids,
        ),
        randomness=Randomness.simulation(config.seed, run),
    )


def _rounds(plan: Plan, settings: AuditSettings) -> int:
    """Return how many rounds are run: those of the config's run, which its budget may stop.

    Raises:
        InputError: the budget allows not one.
    """
    affordable = plan.affordable_rounds()
    if affordable == 0:
        raise InputError("privacy.budget.epsilon: allows no round, so there is nothing to audit")
    return min(settings.rounds or plan.config.rounds, affordable)


@torch.no_grad()
def _losses(trainer: CohortTrainer, parameters: Tensor, users: Sequence[int]) -> Floats:
    """Return each user's mean loss at `parameters`: `[n]`; nan where no data can be used."""
    model = trainer.model
    load_parameters(model, Layout.of(model).split(parameters.to(trainer.device)))
    model.eval()
    losses = []
    for user in users:
        try:
            examples = trainer.prepared(user)
        except InputError:
            losses.append(math.nan)
            continue
        usable = len(examples) > 0
        batch = examples.to(trainer.device)
        losses.append(float(trainer.task.losses(model, batch).mean()) if usable else math.nan)
    return np.array(losses)
