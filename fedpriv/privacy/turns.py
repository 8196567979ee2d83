"""Who takes part when, where a public schedule says it and no coin is thrown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

#: What a ledger says in place of a sampling.
SCHEDULE = "schedule"


@dataclass(frozen=True)
class Turn:
    """A round of a schedule: a function of public numbers, made before the run.

    Attributes:
        silos: who takes part: places in the population, in order, each once.
        steps: how many steps each of them takes.
        seconds: when they have taken them, in virtual time.
    """

    silos: tuple[int, ...]
    steps: tuple[int, ...]
    seconds: float

    def __post_init__(self) -> None:
        if list(self.silos) != sorted(set(self.silos)) or len(self.silos) != len(self.steps):
            raise ValueError("a turn names each silo once, in order, and the steps of each")


def most_so_far(turns: Iterable[Turn]) -> Iterator[int]:
    """Yield, after each of `turns`, how many steps the silo has taken that has taken most."""
    taken: Counter[int] = Counter()
    most = 0
    for turn in turns:
        taken.update(dict(zip(turn.silos, turn.steps, strict=True)))
        most = max([most, *(taken[silo] for silo in turn.silos)])
        yield most
