"""Which of a run's models is the best by the held-out measure, and whether it pays to train on.

Both are functions of the metrics of finished rounds alone, so that a resumed run knows them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedpriv.data.facts import DataFacts
from fedpriv.errors import InputError
from fedpriv.federation.builders import build_turns
from fedpriv.tasks.quality import Quality, quality_of

if TYPE_CHECKING:
    from fedpriv.config import ExperimentConfig
    from fedpriv.privacy.ledger import Release


@dataclass(frozen=True)
class Selection:
    """The best model of the rounds that were measured.

    Attributes:
        quality: by which measure.
        round: after which round it was released.
        value: its measure.
        measured: how many rounds were measured.
        waited: how many of them came after the best one.
    """

    quality: Quality
    round: int
    value: float
    measured: int
    waited: int

    @property
    def told(self) -> str:
        """The measure of the best model as people read it."""
        return f"{self.quality.name} {self.quality.number(self.value)}"


def selection(rows: Iterable[Mapping[str, Any]]) -> Selection | None:
    """Return the best of the rounds in `rows`, the first of equals; None where none was measured.

    A measure that is no finite number is worse than any other.
    """
    best: Selection | None = None
    measured = [row for row in rows if row.get("held_out")]
    for count, row in enumerate(measured, start=1):
        quality = quality_of(row)
        found = row["held_out"].get(quality.key)
        value = math.nan if found is None else float(found)
        sign = 1 if quality.higher_is_better else -1
        if math.isfinite(value) and (best is None or sign * value > sign * best.value):
            best = Selection(quality, row["round"], value, count, 0)
    if best is None:
        return None
    waited = sum(row["round"] > best.round for row in measured)
    return Selection(best.quality, best.round, best.value, len(measured), waited)


def ends(config: ExperimentConfig, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether `evaluation.stop_after` ends a run after `rows`."""
    patience = config.evaluation.stop_after
    if patience is None:
        return False
    measured = [row for row in rows if row.get("held_out")]
    best = selection(measured)
    return (len(measured) if best is None else best.waited) >= patience


def ended_early(config: ExperimentConfig, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `evaluation.stop_after` has ended a run, of those `rows`, before its last round."""
    return bool(rows) and rows[-1]["round"] < config.rounds and ends(config, rows)


def releases_ahead(
    config: ExperimentConfig, rows: Sequence[Mapping[str, Any]], releases: Sequence[Release]
) -> tuple[Release, ...]:
    """Return the releases that a run which ended early answers for, and never made.

    When to end depends on what was released, so that no ε was promised but that of all planned
    rounds (docs/privacy.md, "The best model, and when to end").
    """
    if not releases or not ended_early(config, rows):
        return ()
    made = {release.round for release in releases}
    left = [round_ for round_ in range(1, config.rounds + 1) if round_ not in made]
    ahead = [releases[-1].mechanism.in_round(releases[-1], round_) for round_ in left]
    if (turns := build_turns(config, config.rounds)) is not None:
        own = [turns[release.round - 1] for release in ahead]
        ahead = [replace(r, silos=t.silos, turns=t.steps) for r, t in zip(ahead, own, strict=True)]
    return tuple(ahead)


def not_public(facts: DataFacts) -> str | None:
    """Return whose held-out examples are, where a private choice must not look at them."""
    return {
        "same": "of the users themselves: the choice would tell of them what ε does not count",
        "unknown": "of nobody knows whom, since the data set does not say so in its `facts`",
    }.get(facts.held_out)


def require_public(config: ExperimentConfig, facts: DataFacts) -> None:
    """Check that what chooses a model of a private run, or begins it, may be known to all.

    Raises:
        InputError: the held-out examples are of users, or nothing says that they are not.
    """
    evaluation = config.evaluation
    chosen = {"keep_best": evaluation.keep_best, "stop_after": evaluation.stop_after is not None}
    keys = [f"evaluation.{key}" for key, used in chosen.items() if used]
    keys += ["model.lora.variant: eva"] * config.model.reads_data
    why = not_public(facts)
    if config.privacy is not None and keys and why is not None:
        raise InputError(
            f"{keys[0]}: the held-out examples of data.name: {config.data.name} are {why}; hold "
            f"out others' data, or leave {' and '.join(keys)} out"
        )
