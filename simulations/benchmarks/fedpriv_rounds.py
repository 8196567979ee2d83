"""A contender: fedpriv itself, a whole run with privacy, ledger, checkpoints and metrics.

python fedpriv_rounds.py FOLDER CONFIG [key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import task
from gate import pause

from fedpriv import experiment
from fedpriv.config import load_config


class Pausing:
    """An observer that stops the run between rounds."""

    def begin(self, experiment: experiment.Experiment) -> None:
        pause(0)

    def finished(self, row: dict[str, Any]) -> None:
        pause(row["simulation_only"]["cohort"])

    def say(self, sentence: str) -> None:
        print(sentence, file=sys.stderr)


def main() -> None:
    folder, config = Path(sys.argv[1]), Path(sys.argv[2])
    overrides = [*sys.argv[3:], f"run_dir={folder / 'run'}"]
    prepared = experiment.prepare(load_config(config, overrides))
    experiment.train(prepared, experiment.create(prepared), Pausing())
    task.write_end(folder, prepared.server.parameters())


if __name__ == "__main__":
    main()
