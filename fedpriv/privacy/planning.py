"""Planning: what a budget buys, and what a recipe costs, before anything is trained.

The answers rest on the same sampling, calibration and accountants as a run, so that a run of the
planned recipe spends what was planned. Budgets are held against the smallest ε that has a proof,
as in a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import dp_accounting

from fedpriv.errors import InputError
from fedpriv.privacy.accounting import SMALLEST_DELTA, PldAccountant, RdpAccountant
from fedpriv.privacy.advice import delta_advice, epsilon_advice
from fedpriv.privacy.calibration import noise_multiplier_for
from fedpriv.privacy.charging import (
    ALL_ACCOUNTANTS,
    Bill,
    Budget,
    affordable,
    charge,
    fits,
    most_that_fits,
)
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.sampling import (
    PROVEN,
    Adjacency,
    Noise,
    RandomAllocation,
    Sampling,
    build_sampling,
    of_all_groups,
    paid_rounds,
)

#: Beyond these noise multipliers floating point overflows.
_LEAST_NOISE, _MOST_NOISE = 1e-9, 1e9
#: No more rounds than this are looked for: nobody runs them.
MOST_ROUNDS = 10**9
#: After which shares of the rounds a plan says what was spent; the first round is always said.
_MILESTONES = (0.1, 0.25, 0.5, 1.0)
_CURVE_POINTS = 200
# PLD costs up to seconds a point, and its curve is smooth.
_PLD_SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class BudgetQuestion:
    """What is known of a recipe, and which of its quantities is asked for.

    Attributes:
        population: N, the number of users.
        deltas: every δ at which ε is said; what is solved for holds at the first.
        rounds: number of releases; with `solve="rounds"` the most that are considered.
        cohort: expected number of users in a round; with `solve="cohort"` the most that are
            considered; None with `sampling="all"`.
        noise_multiplier: z, standard deviation of the noise divided by the clip bound.
        epsilon: the budget ε.
        sampling: poisson, fixed_size, all, or random_allocation, in blocks of N/cohort rounds.
        adjacency: None for the one that goes with the sampling.
        solve: epsilon, noise, delta, rounds or cohort; None asks for whichever of ε and noise
            is not given.
        bands: of correlated noise; 1 is independent noise.
    """

    population: int
    deltas: tuple[float, ...] = ()
    rounds: int | None = None
    cohort: float | None = None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    sampling: str = "poisson"
    adjacency: str | None = None
    solve: str | None = None
    bands: int = 1


@dataclass(frozen=True)
class Recipe:
    """What a run releases: everything that bears on its ε.

    Attributes:
        sampling: who takes part in a round.
        noise_multiplier: z.
        rounds: number of releases.
        bands: b of correlated noise; 1 is independent noise.
    """

    sampling: Sampling
    noise_multiplier: float
    rounds: int
    bands: int = 1

    def event(self) -> dp_accounting.DpEvent:
        """Return the privacy event of one release, for whoever pays for it."""
        return _event(self.sampling, self.noise_multiplier, self.bands)

    def paid(self, rounds: int) -> int:
        """Return for how many of the first `rounds` anybody pays: the group drawn most often.

        With random allocation it is for how many blocks.
        """
        return paid_rounds(rounds, self.period)

    @property
    def period(self) -> int:
        """Of how many rounds anybody pays for one: the groups, or the rounds of a block."""
        if isinstance(self.sampling, RandomAllocation):
            return self.sampling.rounds
        return self.bands

    def bill(
        self, deltas: Sequence[float], rounds: int, accountants: Sequence[str] = ALL_ACCOUNTANTS
    ) -> Bill:
        """Return what the first `rounds` cost."""
        return charge(
            {self.event(): self.paid(rounds)}, self.sampling.adjacency, deltas, accountants
        )


@dataclass(frozen=True)
class BudgetAnswer:
    """The recipe, complete, and what it costs.

    Attributes:
        question: what was asked, with `solve` filled in.
        recipe: the recipe, with the quantity that was solved for filled in.
        deltas: every δ, the one that was solved for included.
        after: number of rounds and what they cost, for the first and 10, 25, 50, 100%.
        notes: what the reader should know, a sentence each.
        delta_rdp: δ by RDP at the question's ε, where δ was asked for.
        delta_pld: δ by PLD there, where PLD knows it.
    """

    question: BudgetQuestion
    recipe: Recipe
    deltas: tuple[float, ...]
    after: tuple[tuple[int, Bill], ...]
    notes: tuple[str, ...] = ()
    delta_rdp: float | None = None
    delta_pld: float | None = None

    @property
    def total(self) -> Bill:
        """What all rounds cost."""
        return self.after[-1][1]


def answer(question: BudgetQuestion) -> BudgetAnswer:
    """Answer `question`.

    Raises:
        InputError: a value out of bounds, too much or too little is given, or nothing fits the
            budget; the message names the option to mend.
    """
    question = replace(question, solve=_asked_for(question))
    check_values(question)
    _check_completeness(question)
    recipe, deltas = _SOLVERS[str(question.solve)](question)
    after = tuple((rounds, recipe.bill(deltas, rounds)) for rounds in _milestones(recipe.rounds))
    return BudgetAnswer(
        question=question,
        recipe=recipe,
        deltas=deltas,
        after=after,
        notes=_notes(question, recipe, after[-1][1]),
        **_deltas_of(question, recipe),
    )


# -------------------------------------------------------------------- checking the question

_NEEDS = {
    "epsilon": ("noise_multiplier", "rounds", "cohort", "deltas"),
    "noise": ("epsilon", "rounds", "cohort", "deltas"),
    "delta": ("noise_multiplier", "epsilon", "rounds", "cohort"),
    "rounds": ("noise_multiplier", "epsilon", "cohort", "deltas"),
    "cohort": ("noise_multiplier", "epsilon", "rounds", "deltas"),
}
# What is solved for cannot be given too. Rounds and cohort can: as the most to consider.
_REFUSES = {"epsilon": "epsilon", "noise": "noise_multiplier", "delta": "deltas"}


def _asked_for(question: BudgetQuestion) -> str:
    if question.solve is not None:
        _check_choice("--solve", question.solve, tuple(_NEEDS))
        return question.solve
    noise, budget = question.noise_multiplier is not None, question.epsilon is not None
    if noise and budget:
        raise InputError(
            "--noise-multiplier and --epsilon: write one of them, or with both write --solve "
            "rounds, cohort or delta"
        )
    if not noise and not budget:
        raise InputError("write --noise-multiplier to learn its ε, or --epsilon to learn the noise")
    return "epsilon" if noise else "noise"


def check_values(question: BudgetQuestion) -> None:
    """Raise InputError, which names the option, where a value of `question` is out of bounds."""
    if question.sampling == "min_separation":
        raise InputError(
            "--sampling: what min_separation costs depends on its matrix: fedpriv config validate "
            "says it of a config; write poisson, fixed_size or all"
        )
    _check_choice(
        "--sampling", question.sampling, [each for each in PROVEN if each != "min_separation"]
    )
    if question.adjacency is not None:
        _check_choice("--adjacency", question.adjacency, tuple(each.value for each in Adjacency))
    check_count("--population", question.population)
    if question.rounds is not None:
        check_count("--rounds", question.rounds, MOST_ROUNDS)
    if question.noise_multiplier is not None:
        check_noise(question.noise_multiplier)
    if question.epsilon is not None:
        check_positive("--epsilon", question.epsilon)
    for delta in question.deltas:
        check_delta(delta)
    if question.sampling == "all":
        if question.cohort is not None or question.solve == "cohort":
            raise InputError("--cohort: with --sampling all it is the population; leave it out")
    elif question.cohort is not None:
        check_cohort(question.cohort, question.population)
    if question.sampling == "random_allocation" and question.solve == "cohort":
        raise InputError(
            "--solve cohort: with --sampling random_allocation it divides the population; ask for "
            "the ε of those that do"
        )
    check_count("--bands", question.bands, 1024)
    if question.bands > 1 and question.sampling != "poisson":
        raise InputError("--bands: correlated noise has a proof with --sampling poisson alone")
    if question.bands * (question.cohort or 1) > question.population:
        raise InputError(
            f"--bands: {question.bands} times the cohort is more than the population of "
            f"{question.population}, and a round draws from one of so many groups; write fewer"
        )


def _check_completeness(question: BudgetQuestion) -> None:
    solve = str(question.solve)
    for field in _NEEDS[solve]:
        implied = field == "cohort" and question.sampling == "all"
        if not implied and getattr(question, field) in (None, ()):
            raise InputError(f"{_option(field)}: needed to solve for {solve}")
    refused = _REFUSES.get(solve)
    if refused and getattr(question, refused) not in (None, ()):
        raise InputError(f"{_option(refused)}: it is what --solve {solve} looks for; leave it out")


def _option(field: str) -> str:
    return "--delta" if field == "deltas" else "--" + field.replace("_", "-")


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{option}: write {', '.join(choices[:-1])} or {choices[-1]}, not {value}")


def check_count(option: str, value: int, most: int | None = None) -> None:
    """Raise InputError unless `value` is a count, of at most `most`."""
    if value < 1:
        raise InputError(f"{option}: write a whole number of at least 1, got {value}")
    if most is not None and value > most:
        raise InputError(f"{option}: write at most {most:,}, got {value:,}")


def check_positive(option: str, value: float) -> None:
    """Raise InputError unless `value` is a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{option}: write a number above 0, got {value:g}")


def check_noise(noise_multiplier: float) -> None:
    """Raise InputError unless floating point can work with the noise multiplier."""
    check_positive("--noise-multiplier", noise_multiplier)
    if not _LEAST_NOISE <= noise_multiplier <= _MOST_NOISE:
        raise InputError(
            f"--noise-multiplier: write a number from {_LEAST_NOISE:g} to {_MOST_NOISE:g}, "
            f"got {noise_multiplier:g}"
        )


def check_delta(delta: float) -> None:
    """Raise InputError unless `delta` lies in (0, 1)."""
    if not 0 < delta < 1:
        raise InputError(f"--delta: write a number above 0 and below 1, got {delta:g}")
    if delta < SMALLEST_DELTA:
        raise InputError(f"--delta: write at least {SMALLEST_DELTA:g}, got {delta:g}")


def check_cohort(cohort: float, population: int) -> None:
    """Raise InputError unless the cohort is one of the population."""
    if not 0 < cohort <= population:
        raise InputError(
            f"--cohort: write a number above 0 and at most the population of {population}, "
            f"got {cohort:g}"
        )


# -------------------------------------------------------------------- solving


def _solve_epsilon(question: BudgetQuestion) -> tuple[Recipe, tuple[float, ...]]:
    return _given(question), question.deltas


def _solve_delta(question: BudgetQuestion) -> tuple[Recipe, tuple[float, ...]]:
    assert question.epsilon is not None
    recipe = _given(question)
    found = [delta for delta in _deltas_of(question, recipe).values() if delta is not None]
    delta = min(found)
    if not delta < 1:
        raise InputError(f"--epsilon: no δ below 1 is proved at ε = {question.epsilon:g}; raise it")
    return recipe, (delta,)


def _solve_noise(question: BudgetQuestion) -> tuple[Recipe, tuple[float, ...]]:
    assert question.epsilon is not None
    assert question.rounds is not None
    sampling = _sampling(question)
    try:
        noise_multiplier = noise_multiplier_for(
            question.epsilon,
            question.deltas[0],
            Recipe(sampling, 1.0, question.rounds, question.bands).paid(question.rounds),
            sampling.adjacency,
            lambda z: _event(sampling, z, question.bands),
        )
    except ValueError as error:
        raise InputError(f"--epsilon: {error}") from None
    recipe = Recipe(sampling, noise_multiplier, question.rounds, question.bands)
    return recipe, question.deltas


def _solve_rounds(question: BudgetQuestion) -> tuple[Recipe, tuple[float, ...]]:
    assert question.epsilon is not None
    most = question.rounds or MOST_ROUNDS
    recipe = _given(replace(question, rounds=most))
    adjacency, delta = recipe.sampling.adjacency, question.deltas[0]
    budget = Budget(question.epsilon, delta, adjacency)
    rounds = min(most, recipe.period * affordable(recipe.event(), budget, recipe.paid(most)))
    if rounds == 0:
        one = epsilon_text(recipe.bill([delta], 1).first.epsilon)
        raise InputError(
            f"--epsilon: not one round fits, it costs ε = {one}; raise --epsilon or "
            "--noise-multiplier"
        )
    return replace(recipe, rounds=rounds), question.deltas


def _solve_cohort(question: BudgetQuestion) -> tuple[Recipe, tuple[float, ...]]:
    """Find the largest whole cohort within the budget: at a given z, ε grows with the cohort."""
    assert question.epsilon is not None
    budget, delta = question.epsilon, question.deltas[0]

    def at(cohort: int) -> Recipe:
        return _given(replace(question, cohort=cohort))

    def fit(cohort: int, accountants: Sequence[str] = ALL_ACCOUNTANTS) -> bool:
        recipe = at(cohort)
        events = {recipe.event(): recipe.paid(recipe.rounds)}
        return fits(events, recipe.sampling.adjacency, delta, budget, accountants)

    most = math.floor(min(question.cohort or math.inf, question.population / question.bands))
    low = most_that_fits(lambda cohort: fit(cohort, ("rdp",)), 0, most)
    low = most_that_fits(fit, low, most, near=True)
    if low == 0:
        one = epsilon_text(at(1).bill([delta], at(1).rounds).first.epsilon)
        raise InputError(
            f"--epsilon: not even a cohort of one user fits, it costs ε = {one}; raise --epsilon "
            "or --noise-multiplier"
        )
    return at(low), question.deltas


_SOLVERS: dict[str, Callable[[BudgetQuestion], tuple[Recipe, tuple[float, ...]]]] = {
    "epsilon": _solve_epsilon,
    "noise": _solve_noise,
    "delta": _solve_delta,
    "rounds": _solve_rounds,
    "cohort": _solve_cohort,
}


def _given(question: BudgetQuestion) -> Recipe:
    assert question.noise_multiplier is not None
    assert question.rounds is not None
    return Recipe(_sampling(question), question.noise_multiplier, question.rounds, question.bands)


def _sampling(question: BudgetQuestion) -> Sampling:
    adjacency = Adjacency(question.adjacency) if question.adjacency else None
    if adjacency and adjacency not in PROVEN[question.sampling]:
        proven = " or ".join(each.value for each in PROVEN[question.sampling])
        raise InputError(
            f"--adjacency: {adjacency.value} has no proof with --sampling {question.sampling}; "
            f"write {proven}"
        )
    block = None
    if question.sampling == "random_allocation" and question.cohort:
        block = round(question.population / question.cohort)
        if not math.isclose(block * question.cohort, question.population):
            raise InputError(
                f"--cohort: with --sampling random_allocation the population of "
                f"{question.population} is a whole number of cohorts, one for each round of a block"
            )
    try:
        return build_sampling(
            question.sampling, question.population, question.cohort, adjacency, block
        )
    except ValueError as error:
        raise InputError(f"--cohort: {error}") from None


def _event(sampling: Sampling, noise_multiplier: float, bands: int) -> dp_accounting.DpEvent:
    """Return the event at z; what the clip bound is does not bear on it."""
    return of_all_groups(sampling, bands).event(Noise(noise_multiplier))


def _milestones(rounds: int) -> list[int]:
    return sorted({1, *(math.ceil(share * rounds) for share in _MILESTONES)})


def _notes(question: BudgetQuestion, recipe: Recipe, total: Bill) -> tuple[str, ...]:
    said = (delta_advice(cost.delta, question.population) for cost in total.costs if cost.delta)
    notes = [*filter(None, (*said, epsilon_advice(total.first.epsilon)))]
    if question.solve == "rounds" and recipe.rounds == (question.rounds or MOST_ROUNDS):
        notes.append(f"all {recipe.rounds:,} rounds that were considered fit into the budget")
    most = question.cohort or question.population
    if question.solve == "cohort" and recipe.sampling.expected_cohort == math.floor(most):
        notes.append(f"the largest cohort that was considered, {math.floor(most):,}, fits")
    return (*notes, total.without_pld) if total.without_pld else tuple(notes)


def _deltas_of(question: BudgetQuestion, recipe: Recipe) -> dict[str, float | None]:
    """Return δ at the question's ε by each accountant, where it is asked for."""
    if question.solve != "delta" or question.epsilon is None:
        return {}
    rdp = RdpAccountant(recipe.sampling.adjacency)
    rdp.compose(recipe.event(), recipe.paid(recipe.rounds))
    by_rdp = max(rdp.delta(question.epsilon), SMALLEST_DELTA)
    found: dict[str, float | None] = {"delta_rdp": by_rdp, "delta_pld": None}
    # At a δ of no use there is an ε, and so a PLD, that is affordable.
    if by_rdp < 1 and not recipe.bill([by_rdp], recipe.rounds).first.without_pld:
        pld = PldAccountant(recipe.sampling.adjacency)
        pld.compose(recipe.event(), recipe.paid(recipe.rounds))
        found["delta_pld"] = pld.delta(question.epsilon)
    return found


# -------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """ε by round under one accountant.

    Attributes:
        rounds: numbers of rounds, ascending.
        epsilons: ε after each.
    """

    rounds: tuple[int, ...]
    epsilons: tuple[float, ...]


def epsilon_curves(recipe: Recipe, delta: float) -> dict[str, Curve]:
    """Return ε by round at `delta` for `rdp` and, where it is known, for `pld`."""
    event, adjacency = recipe.event(), recipe.sampling.adjacency
    step = max(1, recipe.rounds // _CURVE_POINTS)
    rounds = sorted({*range(1, recipe.rounds, step), recipe.rounds})
    rdp = RdpAccountant(adjacency)
    by_rdp = {count: rdp.epsilon_after(event, delta, recipe.paid(count)) for count in rounds}
    curves = {"rdp": _curve(by_rdp)}
    counts = sorted({1, *(math.ceil(share * recipe.rounds) for share in _PLD_SHARES)})
    tight = {count: recipe.bill([delta], count).first.epsilon_pld for count in counts}
    known = {count: epsilon for count, epsilon in tight.items() if epsilon is not None}
    return curves | ({"pld": _curve(known)} if known else {})


def _curve(points: dict[int, float]) -> Curve:
    return Curve(tuple(points), tuple(points.values()))
