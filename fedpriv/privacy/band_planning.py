"""Which band of correlated noise pays, before anything is trained.

At one ε more bands take back more of the noise. With trusted coins they need more of it, since a
round draws from one group with a larger probability; without, noise is a matter of how many rounds
lie between two of a user. What counts is how far the noise moves the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedpriv.errors import InputError
from fedpriv.privacy.factorizations import Workload, error
from fedpriv.privacy.planning import BudgetQuestion, check_values, noise_for, recipe_of

#: No more bands than this are tried: as many vectors of noise are kept.
MOST_BANDS = 256
# What a search for more buffers than this finds is hardly better, and takes minutes.
_MOST_BUFFERS = 8


@dataclass(frozen=True)
class Choice:
    """What noise with so many bands does, at the question's ε.

    Attributes:
        bands: b of C; 1 is independent noise, unless they are buffers.
        noise_multiplier: z of a row of Z, by RDP.
        error: how far noise has moved the model, over that of independent noise: a root mean
            square over rounds.
        separation: of how many rounds a user is in one at most; None with Poisson sampling.
        factorization: how C is made.
    """

    bands: int
    noise_multiplier: float
    error: float
    separation: int | None = None
    factorization: str = "optimized"

    @property
    def independent(self) -> bool:
        """Whether nothing is taken back of any round's noise."""
        return self.bands == 1 and self.factorization == "optimized"


def choices(question: BudgetQuestion) -> tuple[Choice, ...]:
    """Return what independent noise does, and 1, 2, 4, ... bands, for the question's workload.

    With min_separation, unless the question has a separation, 1, 2, 4, ..., N/cohort are tried, and
    errors are over that of independent noise at the separation where it moves the model least. All
    are compared by RDP, which takes a moment; the plan of the best is made as any other.

    Raises:
        InputError: something is missing, or given that is looked for.
    """
    if question.bands != 1 or question.noise_multiplier is not None:
        raise InputError(
            "--noise correlated finds bands and noise; leave out --bands and --noise-multiplier"
        )
    _check(question)
    assert question.rounds is not None
    workload = question.workload or Workload((1.0,) * question.rounds)
    asked = replace(question, workload=workload)
    tried = [_moved(asked, *each) for each in _asked_for(asked)]
    least = min(each.error for each in tried if each.independent)
    return tuple(replace(each, error=each.error / least) for each in tried)


def best(tried: Sequence[Choice]) -> Choice:
    """Return the one that moves the model least; of equals the one with fewer bands."""
    return min(tried, key=lambda choice: (choice.error, choice.bands))


def chosen(question: BudgetQuestion, tried: Sequence[Choice]) -> BudgetQuestion:
    """Return the question of the best of those that were tried."""
    found = best(tried)
    return replace(
        question,
        bands=found.bands,
        separation=found.separation,
        factorization=found.factorization,
    )


def _check(question: BudgetQuestion) -> None:
    if question.sampling not in ("poisson", "min_separation"):
        raise InputError(
            "--noise: correlated noise is planned with --sampling poisson or min_separation"
        )
    for option in ("epsilon", "rounds"):
        if getattr(question, option) is None:
            raise InputError(f"--{option}: needed to say which band pays")
    if not question.deltas:
        raise InputError("--delta: needed to say which band pays")
    if question.cohort is None and question.separation is None:
        raise InputError("--cohort: needed to say which band pays")
    check_values(question)


def _asked_for(question: BudgetQuestion) -> Iterator[tuple[str, int, int | None]]:
    """Yield factorization, bands and separation of what is tried."""
    assert question.rounds is not None
    separations: list[int | None] = [None]
    if question.sampling == "min_separation":
        most = question.rounds_apart
        separations = [most] if question.separation else [*_doubled(most)]
    for separation in separations:
        yield "optimized", 1, separation
        for bands in _bands(question, separation):
            yield question.factorization, bands, separation


def _bands(question: BudgetQuestion, separation: int | None) -> Iterator[int]:
    """Yield how many bands are tried beside independent noise."""
    assert question.rounds is not None
    if question.factorization == "blt":
        yield from _doubled(_MOST_BUFFERS)
        return
    groups = separation or math.floor(question.population / (question.cohort or 1))
    most = min(MOST_BANDS, question.rounds, MOST_BANDS if question.dense else groups)
    tried = [bands for bands in _doubled(most) if bands > 1]
    # With trusted coins bands have a price, and whole groups are no better than others.
    yield from (b for b in tried if separation is not None or b & (b - 1) == 0)


def _doubled(most: int) -> list[int]:
    """Return 1, 2, 4, ... and `most`."""
    return sorted({*(2**power for power in range(most.bit_length())), most})


def _moved(
    question: BudgetQuestion, factorization: str, bands: int, separation: int | None
) -> Choice:
    """Return a choice whose error is in units of the clip bound; the run's own mechanism has C."""
    asked = replace(question, factorization=factorization, bands=bands, separation=separation)
    z = noise_for(asked, ("rdp",))
    assert asked.rounds is not None
    assert asked.workload is not None
    mechanism = recipe_of(replace(asked, noise_multiplier=z)).mechanism
    column = mechanism.matrix.column(asked.rounds)
    return Choice(bands, z, z * error(column, asked.workload), separation, factorization)
