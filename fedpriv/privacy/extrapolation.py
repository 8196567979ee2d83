"""Extrapolation: what a recipe that trains well would cost with more users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpriv.errors import InputError
from fedpriv.privacy.advice import delta_advice, epsilon_advice
from fedpriv.privacy.charging import ALL_ACCOUNTANTS
from fedpriv.privacy.planning import (
    MOST_ROUNDS,
    Recipe,
    check_cohort,
    check_count,
    check_delta,
    check_noise,
    check_positive,
)
from fedpriv.privacy.sampling import build_sampling


@dataclass(frozen=True)
class Extrapolation:
    """A trained recipe, and by what its population and cohort are scaled (Poisson sampling).

    The noise standard deviation on the *mean*, z·C/S for a cohort S, is held fixed, so that the
    model learns as it did: z grows with the cohort, and q = S/N (Pelikan et al. 2025).

    Attributes:
        population: N of the trained recipe.
        cohort: S of the trained recipe.
        noise_multiplier: z of the trained recipe.
        rounds: number of releases, unscaled.
        delta: δ, unscaled.
        population_factors: by what N is multiplied, one row each.
        cohort_factors: by what S is multiplied, one column each.
        accountants: which may be asked, by name.
    """

    population: int
    cohort: float
    noise_multiplier: float
    rounds: int
    delta: float
    population_factors: tuple[float, ...]
    cohort_factors: tuple[float, ...]
    accountants: tuple[str, ...] = ALL_ACCOUNTANTS


@dataclass(frozen=True)
class Cell:
    """One scaled recipe and its ε; the fields are those of the trained recipe, scaled."""

    population: int
    cohort: float
    noise_multiplier: float
    rounds: int
    delta: float
    epsilon: float
    accountant: str
    epsilon_rdp: float
    epsilon_pld: float | None
    without_pld: str | None


@dataclass(frozen=True)
class Grid:
    """The scaled recipes.

    Attributes:
        cells: those that are possible, by population and then cohort, ascending.
        left_out: (population, cohort) of those whose cohort exceeds the population.
        notes: what the reader should know, a sentence each.
    """

    cells: tuple[Cell, ...]
    left_out: tuple[tuple[int, float], ...]
    notes: tuple[str, ...]


def extrapolate(recipe: Extrapolation) -> Grid:
    """Return ε of every scaled recipe.

    Raises:
        InputError: a value out of bounds, or no cohort fits its population.
    """
    _check_extrapolation(recipe)
    pairs = [
        (round(recipe.population * many), recipe.cohort * larger, recipe.noise_multiplier * larger)
        for many in sorted(set(recipe.population_factors))
        for larger in sorted(set(recipe.cohort_factors))
    ]
    cells = tuple(_cell(recipe, *pair) for pair in pairs if pair[1] <= pair[0])
    left_out = tuple((population, cohort) for population, cohort, _ in pairs if cohort > population)
    if not cells:
        raise InputError("--scale-cohort: every cohort exceeds its population; write smaller ones")
    return Grid(cells, left_out, _grid_notes(recipe, cells, left_out))


def _check_extrapolation(recipe: Extrapolation) -> None:
    check_count("--population", recipe.population)
    check_cohort(recipe.cohort, recipe.population)
    check_noise(recipe.noise_multiplier)
    check_count("--rounds", recipe.rounds, MOST_ROUNDS)
    check_delta(recipe.delta)
    for factor in recipe.population_factors:
        check_positive("--scale-population", factor)
        check_count("--scale-population", round(recipe.population * factor))
    for factor in recipe.cohort_factors:
        check_positive("--scale-cohort", factor)
        check_noise(recipe.noise_multiplier * factor)


def _cell(recipe: Extrapolation, population: int, cohort: float, noise_multiplier: float) -> Cell:
    sampling = build_sampling("poisson", population, cohort)
    scaled = Recipe(sampling, noise_multiplier, recipe.rounds)
    cost = scaled.bill([recipe.delta], recipe.rounds, recipe.accountants).first
    return Cell(
        population=population,
        cohort=cohort,
        noise_multiplier=noise_multiplier,
        rounds=recipe.rounds,
        delta=recipe.delta,
        epsilon=cost.epsilon,
        accountant=cost.accountant,
        epsilon_rdp=cost.epsilon_rdp,
        epsilon_pld=cost.epsilon_pld,
        without_pld=cost.without_pld,
    )


def _grid_notes(
    recipe: Extrapolation, cells: Sequence[Cell], left_out: Sequence[tuple[int, float]]
) -> tuple[str, ...]:
    notes = []
    if left_out:
        pairs = ", ".join(f"{cohort:,.15g} of {population:,}" for population, cohort in left_out)
        notes.append(f"left out, the cohort exceeds the population: {pairs}")
    if "pld" in recipe.accountants:
        reasons = sorted({cell.without_pld for cell in cells if cell.without_pld})
        notes += [f"{reason} (cells by RDP)" for reason in reasons]
    populations = sorted({cell.population for cell in cells})
    notes += filter(None, (delta_advice(recipe.delta, each) for each in populations))
    weakest = epsilon_advice(max(cell.epsilon for cell in cells))
    return (*notes, weakest) if weakest else tuple(notes)
