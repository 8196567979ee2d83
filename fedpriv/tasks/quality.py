"""The one number of a task that tells how good a model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Quality:
    """Which measure it is, and how people read it.

    Attributes:
        key: its key among the measures.
        name: its name in a sentence, such as word error rate.
        short: what stands beside a value, such as WER.
        higher_is_better: its direction.
        percent: a fraction that is read in per cent.
    """

    key: str
    name: str
    short: str
    higher_is_better: bool
    percent: bool = False

    def number(self, value: float) -> str:
        """Return a value as people read it."""
        return f"{value:.1%}" if self.percent else f"{value:.4g}"

    def text(self, measures: Mapping[str, float]) -> str:
        """Return the measure in a few words."""
        return f"{self.short} {self.number(measures[self.key])}"

    def record(self) -> dict[str, Any]:
        """Return it as JSON keeps it."""
        return asdict(self)


ACCURACY = Quality("accuracy", "accuracy", "accuracy", higher_is_better=True, percent=True)
WORD_ERROR_RATE = Quality("wer", "word error rate", "WER", higher_is_better=False, percent=True)


def quality_of(row: Mapping[str, Any]) -> Quality:
    """Return the quality that the metrics of a measured round name."""
    if "quality" in row:
        return Quality(**row["quality"])
    # Rows of runs that began before rows named it.
    return WORD_ERROR_RATE if "wer" in row["held_out"] else ACCURACY
