"""Somebody's own strategy, wrapped: its app's rounds become private ones, with all that is due.

Cohort, clip bound, noise, ledger, budget and report are those of `fedpriv run`, and so is the code.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedpriv.config import ExperimentConfig
from fedpriv.config_files import parse_config
from fedpriv.data.facts import DataFacts
from fedpriv.errors import BudgetError, InputError
from fedpriv.experiment import opened
from fedpriv.federation.app_rounds import AppRounds
from fedpriv.federation.app_strategy import StrategyServer, check_strategy, settings_of
from fedpriv.federation.plan import Plan, build_plan
from fedpriv.federation.simulated import simulates
from fedpriv.flower_app import LogLines
from fedpriv.recorder import Recorder
from fedpriv.reporting.profile import Profile
from fedpriv.reporting.report import write_report
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.reporting.wording import KNOWN_SEED
from fedpriv.sections import user_path
from fedpriv.tasks.quality import ACCURACY, Quality
from fedpriv.training.checkpoint import checkpoint_files, load_checkpoint

_LOG = logging.getLogger("flwr")
#: What Flower's `start` is given to measure a model with.
Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


class PrivateStrategy:
    """A strategy of Flower whose app trains with user-level differential privacy.

    A user is a node. Each round draws nodes as `privacy.sampling` says and adds up their updates,
    which the client's `clipping_mod` has bounded; the sum gets noise once, the ledger is charged
    for it on the disk, and it is divided by the public expected cohort. The wrapped strategy sees
    that mean as its only reply, so that whatever it does is post-processing.

    Nodes are not asked to evaluate: what they would say is private, and no noise covers it. Nor
    does how many examples a node has weigh anything. `evaluate_fn` is the app's own, on data that
    must be public.

    Attributes:
        stopped: why the run ended before its last round, a sentence; "" where it did not.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        population: int,
        privacy: Mapping[str, Any],
        run_dir: str | Path,
        name: str = "flower-app",
        mean_only: bool = False,
        seed: int | None = None,
        data: str = "",
        join_timeout: float = 60.0,
    ) -> None:
        """Wrap `strategy`.

        Args:
            strategy: FedAvg, FedAvgM, FedProx, FedAdam, FedYogi, FedAdagrad, or one of your own.
            population: N, the number of nodes there may be: public, and at least as many as there
                are.
            privacy: as the section `privacy` of a config: δ, z or a target ε, clipping, Poisson
                sampling, accountants, budget.
            run_dir: where ledger, checkpoints and report lie. An app that is started again with
                the same one goes on.
            name: what reports call the run.
            mean_only: of a strategy of your own: that one reply, the noisy mean, is all it needs.
            seed: for studies over simulated nodes alone: draws and noise can then be drawn again
                by whoever knows it. None: the operating system's.
            data: with a seed: what tells the users' data from others, such as a version. Runs on
                other data then share no noise.
            join_timeout: seconds to wait for `population` nodes before the first round; after that
                the strategy's `min_available_nodes` will do.

        Raises:
            InputError: what is asked for has no proof, or would not be obeyed.
        """
        if (seed is None) != (not data):
            raise InputError(
                "seed and data go together: two runs of one seed on other data must not share "
                "noise; write data='...', a version or digest of the users' data, or no seed"
            )
        self._strategy, self._data = strategy, data
        self._path = user_path(Path(run_dir)).absolute()
        self._document: dict[str, Any] = {
            "name": name,
            "seed": seed or 0,
            "rounds": 1,
            "run_dir": str(self._path),
            "app": {"strategy": type(strategy).__name__, "settings": settings_of(strategy)},
            "data": {"users": population},
            "privacy": dict(privacy),
            "evaluation": {"every": 1},
            "runtime": {
                "deployment": seed is None,
                "engine": "sequential",
                "join_timeout": join_timeout,
            },
        }
        config = parse_config(self._document)
        _check_privacy(config)
        cohort = config.privacy.sampling.cohort if config.privacy else None
        fraction = 1.0 if cohort is None else cohort / population
        check_strategy(strategy, fraction, mean_only)
        self.stopped = ""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Run the rounds that are left, as Flower's `Strategy.start`, and write the report.

        The round that would exceed the budget is not run: `stopped` says so, and what was released
        before is returned.

        Raises:
            InputError: an argument that would not be obeyed, or a run directory of another run.
            ClientFault, WorkerLost: the app's client code raised over simulated nodes, or too few
                nodes took part; what is finished is kept.
        """
        if evaluate_config is not None:
            raise InputError(
                "evaluate_config: nodes are not asked to evaluate, since what they measure is "
                "private; leave it out, and measure on public data by evaluate_fn"
            )
        config = self._config(num_rounds, timeout, train_config)
        if not config.runtime.deployment and not simulates(grid):
            raise InputError(
                "seed: these nodes are real, and whoever knows the seed can subtract the noise; "
                "leave seed and data out"
            )
        server = StrategyServer(self._strategy, initial_arrays)
        app = _App(self._plan(config, server), server, evaluate_fn)
        directory = app.restored(self._path)
        log = LogLines()
        with opened(app, directory, log) as (ledger, stop):
            recorder = Recorder(app, directory, ledger, log)
            first = app.finished_rounds + 1
            rounds = AppRounds(app.plan, server, ledger, recorder.record, stop, first, log.say)
            self._say(app)
            recorder.hold_room()
            try:
                rounds.run_left(grid, train_config or ConfigRecord(), app.result)
            except BudgetError as over:
                self.stopped = str(over)
                _LOG.warning("fedpriv: %s", over)
            finally:
                recorder.release_room()
        if directory.read_metrics():
            _LOG.info("fedpriv: report in %s", write_report([directory.path]))
        return app.result

    def _config(
        self, rounds: int, timeout: float, train_config: ConfigRecord | None
    ) -> ExperimentConfig:
        settings = dict(self._document["app"]["settings"])
        if train_config:
            settings["train_config"] = {key: str(value) for key, value in train_config.items()}
        return parse_config(
            {
                **self._document,
                "rounds": rounds,
                "app": {**self._document["app"], "settings": settings},
                "runtime": {**self._document["runtime"], "round_timeout": timeout},
            }
        )

    def _plan(self, config: ExperimentConfig, server: StrategyServer) -> Plan:
        data = "" if config.runtime.deployment else _digest(self._data, server)
        assert config.data.users is not None
        return build_plan(config, config.data.users, server.layout, data)

    def _say(self, app: _App) -> None:
        config = app.config
        _LOG.info(
            "fedpriv: %s over %d nodes, rounds %d to %d, ledger in %s",
            type(self._strategy).__name__,
            app.plan.sampling.population,
            app.finished_rounds + 1,
            config.rounds,
            self._path,
        )
        if not config.runtime.deployment:
            _LOG.warning("fedpriv: %s", KNOWN_SEED)
        if getattr(self._strategy, "fraction_evaluate", 0):
            _LOG.info(
                "fedpriv: nodes are not asked to evaluate, since what they measure is private; "
                "measure on public data by evaluate_fn"
            )
        for sentence in app.plan.advice():
            _LOG.warning("fedpriv: %s", sentence)


@dataclass
class _App:
    """A run of an app, as the recorder knows it."""

    plan: Plan
    server: StrategyServer
    evaluate: Evaluate | None
    finished_rounds: int = 0
    profile: Profile = field(default_factory=Profile)
    result: Result = field(default_factory=Result)

    @property
    def config(self) -> ExperimentConfig:
        """The config."""
        return self.plan.config

    def measure(self, round_: int) -> tuple[dict[str, Any], Quality]:
        """Return what the app's `evaluate_fn` says of the model, and which number is its quality.

        It is called once a round; without one there is nothing to say.
        """
        found = self.evaluate(round_, self.server.arrays) if self.evaluate else None
        if found is None:
            return {}, ACCURACY
        self.result.evaluate_metrics_serverapp[round_] = found
        measures = {
            key: float(value) for key, value in found.items() if isinstance(value, int | float)
        }
        return measures, _quality(measures)

    def restored(self, path: Path) -> RunDirectory:
        """Return the run's directory: a new one, or that of the run that goes on from there.

        Raises:
            InputError: it holds another run.
        """
        self.result.arrays = self.server.arrays
        if not (path / "config.yaml").is_file():
            if self.evaluate is not None:
                self.measure(0)
            facts = {"data_facts": DataFacts(users="node").document()}
            return RunDirectory.create(self.config, "that of the app", facts)
        directory = RunDirectory.open(path)
        if directory.config_to_continue().fingerprint("") != self.config.fingerprint(""):
            raise InputError(
                f"run_dir: {path} holds a run with other settings; write another run_dir, or start "
                "the app with the strategy, privacy and number of rounds that it began with"
            )
        if files := checkpoint_files(directory.checkpoints):
            checkpoint = load_checkpoint(files[-1], self.plan.fingerprint)
            self.server.load_state(checkpoint.tensors)
            self.finished_rounds, self.result.arrays = checkpoint.round, self.server.arrays
            _LOG.info("fedpriv: %s goes on after round %d", path, self.finished_rounds)
        return directory


def _check_privacy(config: ExperimentConfig) -> None:
    """Check that all that is asked for can be done in an app of somebody's own.

    Raises:
        InputError: it cannot.
    """
    privacy = config.privacy
    if privacy is None:
        raise InputError("privacy: write what is to be guaranteed, or leave PrivateStrategy out")
    refused = {
        "unit: example": privacy.unit == "example",
        f"noise_by: {privacy.noise_by}": privacy.noise_by != "server",
        f"mechanism.kind: {privacy.mechanism.kind}": privacy.mechanism.kind != "independent",
        f"sampling.kind: {privacy.sampling.kind}": privacy.sampling.kind not in ("poisson", "all"),
        f"clipping.kind: {privacy.clipping.kind}": privacy.clipping.kind
        not in ("global", "per_layer"),
        "clipping.undo": privacy.clipping.undoes,
        "error_feedback": privacy.error_feedback.kind != "none",
    }
    for written, found in refused.items():
        if found:
            raise InputError(
                f"privacy.{written} is not for an app whose clients have code of their own, and "
                "may keep what they like: write sampling.kind poisson or all, clipping.kind global "
                "or per_layer, and noise that the server adds; fedpriv run has the rest"
            )


def _digest(data: str, server: StrategyServer) -> str:
    digest = hashlib.sha256(data.encode())
    for part in server.digest_parts:
        digest.update(part)
    return digest.hexdigest()


def _quality(measures: Mapping[str, float]) -> Quality:
    """Return which of an app's numbers tells how good its model is, by its name."""
    for key in measures:
        if "acc" in key.lower():
            return Quality(key, "accuracy", "accuracy", higher_is_better=True, percent=True)
    key = next(iter(measures), "accuracy")
    lower = any(part in key.lower() for part in ("loss", "error", "perplexity"))
    return Quality(key, key, key, higher_is_better=not lower)
