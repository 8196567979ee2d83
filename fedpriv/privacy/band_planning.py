"""Which band of correlated noise pays, before anything is trained.

At one ε more bands take back more of the noise, and need more of it, since a round draws from one
group with a larger probability. What counts is how far the noise moves the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpriv.errors import InputError
from fedpriv.privacy.calibration import noise_multiplier_for
from fedpriv.privacy.factorizations import Workload, error, optimized
from fedpriv.privacy.planning import BudgetQuestion, check_values
from fedpriv.privacy.sampling import Adjacency, Noise, build_sampling, of_all_groups, paid_rounds

#: No more bands than this are tried: as many vectors of noise are kept.
MOST_BANDS = 256


@dataclass(frozen=True)
class Choice:
    """What noise with so many bands does, at the question's ε.

    Attributes:
        bands: b, optimised for the workload; 1 is independent noise.
        noise_multiplier: z of a row of Z, by RDP.
        error: how far noise has moved the model, over that of independent noise: a root mean
            square over rounds.
    """

    bands: int
    noise_multiplier: float
    error: float


def choices(question: BudgetQuestion, momentum: float = 0.0) -> tuple[Choice, ...]:
    """Return what 1, 2, 4, ... bands do, for a server with `momentum` and constant rates.

    Noise is compared by RDP, which takes a moment; the plan of the best is made as any other.

    Raises:
        InputError: something is missing, or given that is looked for.
    """
    if question.sampling != "poisson":
        raise InputError("--noise: correlated noise is planned with --sampling poisson")
    if question.bands != 1 or question.noise_multiplier is not None:
        raise InputError(
            "--noise correlated finds bands and noise; leave out --bands and --noise-multiplier"
        )
    for option in ("epsilon", "rounds", "cohort"):
        if getattr(question, option) is None:
            raise InputError(f"--{option}: needed to say which band pays")
    if not question.deltas:
        raise InputError("--delta: needed to say which band pays")
    if not 0 <= momentum < 1:
        raise InputError(f"--momentum: write a number from 0 to below 1, got {momentum:g}")
    check_values(question)
    assert question.rounds is not None
    assert question.cohort is not None
    workload = Workload((1.0,) * question.rounds, momentum)
    moved, found, bands = 0.0, [], 1
    while bands <= min(MOST_BANDS, question.rounds, question.population / question.cohort):
        z = _noise(question, bands)
        each = z * error(optimized(bands, workload).column(question.rounds), workload)
        moved = moved or each
        found.append(Choice(bands, z, each / moved))
        bands *= 2
    return tuple(found)


def best(tried: Sequence[Choice]) -> Choice:
    """Return the one that moves the model least; of equals the one with fewer bands."""
    return min(tried, key=lambda choice: (choice.error, choice.bands))


def _noise(question: BudgetQuestion, bands: int) -> float:
    assert question.epsilon is not None
    assert question.rounds is not None
    adjacency = Adjacency(question.adjacency) if question.adjacency else None
    sampling = build_sampling("poisson", question.population, question.cohort, adjacency)
    try:
        return noise_multiplier_for(
            question.epsilon,
            question.deltas[0],
            paid_rounds(question.rounds, bands),
            sampling.adjacency,
            lambda z: of_all_groups(sampling, bands).event(Noise(z)),
            ("rdp",),
        )
    except ValueError as refused:
        raise InputError(f"--epsilon: {refused}") from None
