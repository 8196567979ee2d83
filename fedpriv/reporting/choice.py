"""How a run was chosen as the best of several trials, as `tuned.json` beside it says.

Its release costs what the tunings cost that chose it, not what its own ledger is charged with
(docs/privacy.md, "Tuning"). What the file says is computed anew and held against the ledger.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dp_accounting

from fedpriv.errors import InputError
from fedpriv.privacy.charging import charge
from fedpriv.privacy.ledger import Header
from fedpriv.privacy.sampling import Adjacency
from fedpriv.privacy.trials import Tuning, price
from fedpriv.reporting.run_directory import TUNED

#: Why nothing can be claimed of a trial alone.
UNTOLD = "it is a trial of a tuning, and what choosing it cost is not recorded beside it"

#: Two computations of one ε may differ in the last digits between machines and NumPy versions.
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Choice:
    """What chose a run.

    Attributes:
        quality: the measure by which it is the best.
        tunings: all that were finished in its folder when it was chosen.
        keys: the keys that each of them tried values of.
    """

    quality: str
    tunings: tuple[Tuning, ...]
    keys: tuple[tuple[str, ...], ...]

    @property
    def laws(self) -> str:
        """How many trials were expected, by which law, and what they tried."""
        return "; ".join(
            f"{tuning.trials.law}, {tuning.trials.mean:g} expected, over {', '.join(keys)}"
            for tuning, keys in zip(self.tunings, self.keys, strict=True)
        )

    def document(self, trial: int, adjacency: Adjacency, delta: float) -> dict[str, Any]:
        """Return what `tuned.json` says: of the trial `trial`, and of no number of trials."""
        return {
            "trial": trial,
            "epsilon": price(self.tunings, adjacency, delta).epsilon,
            "delta": delta,
            "quality": self.quality,
            "tunings": [
                {**tuning.document(), "keys": list(keys)}
                for tuning, keys in zip(self.tunings, self.keys, strict=True)
            ],
        }


def read_choice(
    folder: Path, header: Header, trial: int, own: Counter[dp_accounting.DpEvent]
) -> Choice | None:
    """Return what chose the trial in a folder; None where nothing there says it.

    Args:
        folder: the run directory.
        header: that of its ledger.
        trial: its label; 0 for a run that is no trial.
        own: the events that it was charged with.

    Raises:
        InputError: what is there is damaged, of another run, or says less than that it cost.
    """
    path = folder / TUNED
    if not trial or header.delta is None or not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        parts = [(Tuning.of_document(each), tuple(each["keys"])) for each in told["tunings"]]
        tunings, keys = zip(*parts, strict=True)
        choice = Choice(str(told["quality"]), tunings, keys)
        said, label, delta = float(told["epsilon"]), told["trial"], told["delta"]
    except (OSError, ValueError, KeyError, TypeError, InputError):
        raise InputError(
            f"{path}: not what a tuning writes; put back the file that fedpriv tune wrote there"
        ) from None
    if (label, delta) != (trial, header.delta):
        raise InputError(
            f"{path}: of another trial, or at another δ, than the ledger beside it; put back the "
            "file that fedpriv tune wrote there"
        )
    found = price(tunings, Adjacency(header.adjacency), delta).epsilon
    pays = max(_epsilon(tuning.charged, header) for tuning in tunings)
    paid = _epsilon(own, header) <= pays * (1 + AGREEMENT)
    if not (paid and math.isclose(said, found, rel_tol=AGREEMENT)):
        raise InputError(
            f"{path} CONTRADICTS the ledger beside it, or itself: what it says of the trials is "
            "not what they cost; put back the file that fedpriv tune wrote there"
        )
    return choice


def _epsilon(events: Mapping[dp_accounting.DpEvent, int], header: Header) -> float:
    """Return what `events` of one trial cost."""
    assert header.delta is not None
    return charge(events, Adjacency(header.adjacency), [header.delta], ("rdp",)).first.epsilon
