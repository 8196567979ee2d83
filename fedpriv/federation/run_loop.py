"""Rounds one after another, as Flower's `Strategy`: from the next that is left to the last."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedpriv.errors import InputError, Interrupted, WorkerLost
from fedpriv.federation.nodes import RoundLost
from fedpriv.federation.payment import RoundChanged
from fedpriv.federation.plan import Plan
from fedpriv.federation.round_record import RoundRecord
from fedpriv.federation.simulated import check_nodes

#: What to write instead of an argument of Flower's `start`.
_INSTEAD = {
    "num_rounds": "`rounds`",
    "initial_arrays": "`seed_model.path`, or nothing for the model's own start",
    "timeout": "`runtime.round_timeout`",
    "train_config": "`local`",
    "evaluate_config": "`evaluation`",
    "evaluate_fn": "`evaluation`, and read metrics.jsonl",
}


class RunLoop(Strategy):
    """Runs the rounds that are left, and hands on the record of each that is finished."""

    def __init__(
        self,
        plan: Plan,
        on_round: Callable[[RoundRecord], bool | None],
        stop: threading.Event,
        first_round: int,
        say: Callable[[str], None],
    ) -> None:
        self.plan = plan
        self.next_round = first_round
        self._on_round = on_round
        self._stop = stop
        self._say = say
        #: How often the round has been tried: each time but the last too few nodes took part.
        self.tries = 0
        self._record: RoundRecord | None = None
        self._unreported: RoundRecord | None = None
        #: Whether the run is over before its last round, as who got the last record has decided.
        self.over = False

    @abstractmethod
    def run_round(
        self, round_: int, arrays: ArrayRecord, grid: Grid
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Run a round from the parameters in `arrays`; return the new ones and Flower's metrics.

        Raises:
            RoundChanged: it gave another sum than the one that was charged, and must be run again.
            RoundLost: too few nodes took part; nothing was released.
        """

    @abstractmethod
    def broadcast(self) -> ArrayRecord:
        """Return the parameters as they travel to the nodes."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left, from `next_round` to the config's last.

        Whoever gets the records of rounds ends the run earlier by returning True. The config
        decides rounds, start, timeout and evaluation, which the ledger depends on: of Flower's
        other arguments none is taken but a `num_rounds` that is the config's own.

        Raises:
            InputError: an argument that would be ignored, with the key to write instead; nodes
                that are real where the config says simulated, or the other way round; or a node
                found the user's data or config wrong.
            Interrupted: the user asked to stop, between rounds or while nodes were working.
            BudgetError: the next round would exceed the budget.
            WorkerLost: a simulated node died that nobody replaces, or again and again, or too few
                nodes of a deployment took part in a round; finished rounds are kept.
        """
        _refuse_arguments(
            self.plan.config.rounds,
            num_rounds=num_rounds,
            initial_arrays=initial_arrays,
            timeout=timeout,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
        )
        check_nodes(grid, self.plan.config)
        arrays = self.broadcast()
        result = Result(arrays=arrays)
        try:
            for round_ in range(self.next_round, self.plan.config.rounds + 1):
                arrays, metrics = self._finished_round(round_, arrays, grid)
                result.arrays = arrays
                result.train_metrics_clientapp[round_] = metrics
                if self.over:
                    break
                self._check_end(round_, grid)
        finally:
            self._report()
        return result

    def _finished_round(
        self, round_: int, arrays: ArrayRecord, grid: Grid
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Run a round, and run it again where its sum has changed or too few nodes took part."""
        retries, changed, self.tries = self.plan.config.runtime.retries, False, 0
        while True:
            self.tries += 1
            try:
                return self.run_round(round_, arrays, grid)
            except RoundChanged:
                if changed:
                    raise
                changed = True
                self.tries -= 1
            except RoundLost as why:
                if self.tries > retries:
                    raise WorkerLost(
                        f"round {round_} was lost {self.tries} times: {why}; what is finished is "
                        "kept: resume the run when the nodes are back"
                    ) from None
                self._say(f"round {round_} is lost, and nothing of it released: {why}; again")

    @property
    def finished(self) -> bool:
        """Whether no round is left to run."""
        return self.next_round > self.plan.config.rounds

    def _report(self) -> None:
        """Hand on the record of the round that was finished last, once."""
        record, self._unreported = self._unreported, None
        if record is not None:
            self.over = bool(self._on_round(record))

    def _decides(self, round_: int) -> bool:
        """Whether the next round is asked for only after this one's record was handed on."""
        config = self.plan.config
        stops = config.evaluation.stop_after is not None and config.evaluates(round_)
        return config.runtime.deployment or stops

    def _check_end(self, round_: int, grid: Grid) -> None:
        """Stop after `round_` where that was asked for, or nodes died in it whom none replaces."""
        assert self._record is not None
        if self._stop.is_set():
            raise Interrupted(f"stopped after round {round_}")
        if not self._record.nodes_lost or self.plan.config.runtime.deployment or self.finished:
            return
        if not getattr(grid, "replaces_nodes", False):
            raise WorkerLost(f"{self._record.nodes_lost} workers died in round {round_}")

    # ---------------------------------------------------------------- not used

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: the model is measured on held-out examples at the server."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing: users are not asked to evaluate."""
        return None

    def summary(self) -> None:
        """Say nothing: the run directory holds the resolved config and the privacy statement."""


def _refuse_arguments(rounds: int, **given: Any) -> None:
    """Refuse what a caller believes to be obeyed.

    Raises:
        InputError: an argument is given that is not what the config says.
    """
    if given["num_rounds"] == rounds:
        given["num_rounds"] = None
    for name, value in given.items():
        if value is not None:
            raise InputError(
                f"{name}: the config decides it, which the ledger depends on; write "
                f"{_INSTEAD[name]} there"
            )
