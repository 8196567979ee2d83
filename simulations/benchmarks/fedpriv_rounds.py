"""A contender: fedpriv itself, a whole run with privacy, ledger, checkpoints and metrics.

python fedpriv_rounds.py FOLDER CONFIG [key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import task
from flwr.app import Message
from gate import pause

from fedpriv import experiment
from fedpriv.config_files import load_config
from fedpriv.federation.strategy import PrivateFedAvg


class Pausing:
    """An observer that stops the run before its first round and after its last one."""

    def begin(self, experiment: experiment.Experiment) -> None:
        self.last = experiment.config.rounds
        pause(0)

    def finished(self, row: dict[str, Any]) -> None:
        if row["round"] == self.last:
            pause(row["simulation_only"]["cohort"])

    def say(self, sentence: str) -> None:
        print(sentence, file=sys.stderr)


class Led(PrivateFedAvg):
    """A strategy that stops before it asks for the next round, while its workers have no work.

    It hands on a round's record only after that.
    """

    def configure_train(self, server_round: int, *asked: Any) -> Iterable[Message]:
        """Draw the cohort and return one message a node."""
        if self._record is not None:
            pause(sum(summed.users for summed in self._record.sums))
        return super().configure_train(server_round, *asked)


def main() -> None:
    experiment.PrivateFedAvg = Led  # type: ignore[misc]
    folder, config = Path(sys.argv[1]), Path(sys.argv[2])
    overrides = [*sys.argv[3:], f"run_dir={folder / 'run'}"]
    prepared = experiment.prepare(load_config(config, overrides))
    experiment.train(prepared, experiment.create(prepared), Pausing())
    task.write_end(folder, prepared.server.parameters())


if __name__ == "__main__":
    main()
