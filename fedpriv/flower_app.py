"""The ServerApp: what `flwr run` starts, over nodes that Flower simulates or over real ones.

Whoever starts it again with the same `run_dir` goes on where it stopped: a run that was killed
needs nothing but to be started again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpriv.config_files import load_config
from fedpriv.disk import barred, has_no_room, no_room
from fedpriv.errors import FedprivError, InputError
from fedpriv.experiment import Experiment, create, prepare, reopen, stop_signal, train
from fedpriv.federation.simulated import check_nodes
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.reporting.wording import KNOWN_SEED, missing_text, spent_text
from fedpriv.sections import user_path
from fedpriv.seed_model import with_seed_model
from fedpriv.tasks.quality import WORD_ERROR_RATE

#: What `flwr run --run-config` sets: a config and overrides for it, or a run to continue.
_RUN_CONFIG = ("config", "set", "resume")
_LOG = logging.getLogger("flwr")

app = ServerApp()


@app.main()
def _under_flower(grid: Grid, context: Context) -> None:
    """Train the config, or continue the run, that `flwr run --run-config` names."""
    settings = {name: str(context.run_config.get(name) or "") for name in _RUN_CONFIG}
    try:
        directory, experiment = _to_train(settings, grid)
        train(experiment, directory, LogLines(), lambda strategy: strategy.start(grid))
    except FedprivError as error:
        # Flower shows where it was raised. This is the line that says what to do.
        _LOG.error("fedpriv: %s", error)
        raise
    except OSError as error:
        if has_no_room(error):
            _LOG.error("fedpriv: %s, then start the same run again", no_room(error))
        elif (reason := barred(error)) is not None:
            _LOG.error("fedpriv: %s", reason)
        raise


def _to_train(settings: dict[str, str], grid: Grid) -> tuple[RunDirectory, Experiment]:
    """Return the run that is to go on, or a new one.

    Raises:
        InputError: no config, one that cannot be trained over the nodes of `grid`, or a run
            directory with something else in it.
    """
    if settings["resume"]:
        found = reopen(user_path(Path(settings["resume"])))
        check_nodes(grid, found[1].config)
        return found
    if not settings["config"]:
        raise InputError("write flwr run APP --run-config 'config=\"/path/to/config.yaml\"'")
    config = load_config(user_path(Path(settings["config"])), settings["set"].split())
    check_nodes(grid, config)
    with stop_signal(_LOG.warning) as stop:
        config = with_seed_model(config, PretrainingLog(), stop)
    experiment, path = prepare(config), config.run_dir
    if path is None or not (path / "config.yaml").is_file():
        return create(experiment), experiment
    directory, begun = reopen(path)
    if begun.plan.fingerprint != experiment.plan.fingerprint:
        raise InputError(
            f"run_dir: {path} holds a run of another config; write another run_dir, or continue "
            "that run with its own config"
        )
    _LOG.info("fedpriv: %s goes on after round %d", path, begun.finished_rounds)
    return directory, begun


class LogLines:
    """An observer that writes to Flower's log, where a run has no terminal of its own."""

    def begin(self, experiment: Experiment) -> None:
        """Say what is trained."""
        _LOG.info("fedpriv: %s, %d rounds", experiment.config.name, experiment.config.rounds)
        for sentence in experiment.plan.advice():
            self.say(sentence)

    def finished(self, row: dict[str, Any]) -> None:
        """Say what a round cost."""
        known = f" ({KNOWN_SEED})" if "simulation_only" in row else ""
        missing = missing_text(row)
        beside = f"; {missing}" if missing else ""
        _LOG.info("round %d: %s%s%s", row["round"], spent_text(row), known, beside)

    def say(self, sentence: str) -> None:
        """Pass a sentence on."""
        _LOG.warning(sentence)


class PretrainingLog:
    """A listener to pre-training that writes to Flower's log."""

    def begin(self, steps: int, done: int, what: str) -> None:
        """Say what is trained."""
        _LOG.info("fedpriv: pre-training the seed model, %d steps on %s", steps, what)

    def step(self, step: int, loss: float) -> None:
        """Say nothing."""

    def measured(self, step: int, measures: dict[str, float]) -> None:
        """Say how far it is."""
        _LOG.info("step %d: %s", step, WORD_ERROR_RATE.text(measures))
