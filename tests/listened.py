"""A small run of which everything is heard that crosses a border: messages, sums, releases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from in_process import InProcessGrid, Silent, drive_on, small_config
from replies import sum_of

from fedpriv import experiment
from fedpriv.errors import WorkerLost
from fedpriv.experiment import Experiment
from fedpriv.federation.messages import Work, flat_record, work_of
from fedpriv.privacy import Ledger
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.training.cohort import CohortSum


@dataclass(frozen=True)
class Answer:
    """What a node was asked to do, and what it sent."""

    partition: int
    work: Work
    summed: CohortSum


class ListeningGrid(InProcessGrid):
    """Keeps what nodes are asked and what they answer, by round, in the order of asking.

    `change` is done to every sum before the server sees it; nodes are gone after `last` rounds.
    """

    def __init__(
        self,
        nodes: int = 2,
        dead: Iterable[int] = (),
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
        last: int | None = None,
    ) -> None:
        super().__init__(nodes, dead)
        self.heard: defaultdict[int, list[Answer]] = defaultdict(list)
        self.change, self.last = change, last

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        rounds = [m.content["config"].get("round", 0) for m in messages]
        if self.last is not None and max(rounds, default=0) > self.last:
            raise WorkerLost("gone")
        return super().push_messages(messages)

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        if message.metadata.message_type == "train" and not reply.has_error():
            partition, summed = sum_of(reply)
            if self.change is not None:
                summed = replace(summed, total=self.change(summed.total))
                reply.content["sum"] = flat_record(summed.total)
            work = work_of(message)
            self.heard[work.round].append(Answer(partition, work, summed))
        return reply


@dataclass
class Listened:
    """A run that was heard: `averages` are released sums over the denominator, by round."""

    directory: RunDirectory
    prepared: Experiment
    grid: ListeningGrid
    averages: dict[int, torch.Tensor] = field(default_factory=dict)
    seeds: dict[int, int] = field(default_factory=dict)

    @property
    def ledger(self) -> Ledger:
        return Ledger.open(self.directory.ledger)

    def released(self, round_: int) -> torch.Tensor:
        """The noisy sum of a round, as its average says."""
        return self.averages[round_] * self.prepared.plan.sampling.expected_cohort

    def noise(self, round_: int) -> torch.Tensor:
        """What was released beyond the sums that the nodes sent last."""
        answers = {answer.partition: answer for answer in self.grid.heard[round_]}
        return self.released(round_) - sum(answer.summed.total for answer in answers.values())

    def go(self, crash_in: int | None = None) -> Listened:
        """Run to the end, or die in `crash_in` when its release is paid for and not yet used."""
        step = self.prepared.server.step

        def heard(average: torch.Tensor, round_: int, seed: int, *noise: Any) -> None:
            self.averages[round_], self.seeds[round_] = average.clone(), seed
            if round_ == crash_in:
                raise RuntimeError("crash")
            step(average, round_, seed, *noise)

        self.prepared.server.step = heard  # type: ignore[method-assign]
        experiment.train(self.prepared, self.directory, Silent(), drive_on(self.grid))
        return self


def begun(folder: Path, grid: ListeningGrid | None = None, **changes: Any) -> Listened:
    """Return a run of the small config that has yet to go."""
    prepared = experiment.prepare(small_config(run_dir=str(folder), **changes))
    return Listened(experiment.create(prepared), prepared, grid or ListeningGrid())


def resumed(folder: Path, grid: ListeningGrid | None = None) -> Listened:
    """Return the run in `folder`, as it goes on from its newest checkpoint."""
    return Listened(*experiment.reopen(folder), grid or ListeningGrid())
