"""Planning: what a budget buys, and what a recipe costs, before anything is trained.

The answers rest on the same sampling, calibration and accountants as a run, so that a run of the
planned recipe spends what was planned. Budgets are held against the smallest ε that has a proof,
as in a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
from fedpriv.privacy.factorizations import DENSE, MADE, Workload
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.sampling import (
    PROVEN,
    Adjacency,
    MinSeparationSampling,
    Noise,
    RandomAllocation,
    Sampling,
    build_sampling,
    paid_rounds,
)

if TYPE_CHECKING:  # it imports torch, which plans of independent noise do without
    from fedpriv.privacy.mechanisms.correlated import CorrelatedMechanism

#: Beyond these noise multipliers floating point overflows.
_LEAST_NOISE, _MOST_NOISE = 1e-9, 1e9
#: No more rounds than this are looked for: nobody runs them.
MOST_ROUNDS = 10**9
#: Nor is a dense matrix made for more.
_MOST_ROWS = 100_000
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
        sampling: poisson, fixed_size, all, random_allocation, in blocks of N/cohort rounds, or
            min_separation.
        adjacency: None for the one that goes with the sampling.
        solve: epsilon, noise, delta, rounds or cohort; None asks for whichever of ε and noise
            is not given.
        bands: of correlated noise; 1 is independent noise.
        separation: with `sampling="min_separation"` the rounds of which a user is in one at most;
            None for the most with which a group still has a cohort, N/cohort. Without a `cohort`
            everybody of a group takes part.
        factorization: how the matrix of correlated noise is made: see `CorrelatedMechanism`.
        workload: what the server makes of the noise; None for the prefix sums.
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
    separation: int | None = None
    factorization: str = "optimized"
    workload: Workload | None = None

    @property
    def dense(self) -> bool:
        """Whether what a user contributes stays in all later rows of the matrix."""
        return self.factorization in DENSE

    @property
    def rounds_apart(self) -> int:
        """Of how many rounds a user is in one at most, with min_separation."""
        if self.separation is not None:
            return self.separation
        return min(math.floor(self.population / (self.cohort or 1)), self.rounds or MOST_ROUNDS)


@dataclass(frozen=True)
class Recipe:
    """What a run releases: everything that bears on its ε.

    Attributes:
        sampling: who takes part in a round.
        noise_multiplier: z.
        rounds: number of releases.
        bands: b of correlated noise; 1 is independent noise.
        factorization: how the matrix of correlated noise is made.
        workload: what the server makes of the noise; None where the cost does not depend on it.
    """

    sampling: Sampling
    noise_multiplier: float
    rounds: int
    bands: int = 1
    factorization: str = "optimized"
    workload: Workload | None = None

    @property
    def correlated(self) -> bool:
        """Whether a run of it has the mechanism of correlated noise."""
        return self.bands > 1 or isinstance(self.sampling, MinSeparationSampling)

    @property
    def mechanism(self) -> CorrelatedMechanism:
        """The mechanism of a run of it whose `privacy.mechanism.kind` is correlated.

        Raises:
            InputError: it has no proof, or a round draws from one of too many groups.
        """
        from fedpriv.privacy.clipping import GlobalClipping
        from fedpriv.privacy.mechanisms.correlated import CorrelatedMechanism
        from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism

        gaussian = GaussianMechanism(self.noise_multiplier, GlobalClipping(1.0))
        made: Any = self.bands, (), self.factorization, self.workload
        try:
            return CorrelatedMechanism(self.sampling, gaussian, *made)
        except ValueError as error:
            raise InputError(f"--bands: {error}") from None

    def charged(self, rounds: int) -> tuple[dp_accounting.DpEvent, int]:
        """Return the event of a release, and for how many of the first `rounds` anybody pays.

        It is the group drawn from most often that pays, with random allocation for blocks, and
        where the matrix is dense for all of them as one release.
        """
        if self.correlated:
            return self.mechanism.charged(rounds)
        event = self.sampling.event(Noise(self.noise_multiplier))
        return event, paid_rounds(rounds, self._block)

    def affordable(self, budget: Budget) -> int:
        """Return how many of the rounds fit into `budget`."""
        if self.correlated:
            return self.mechanism.affordable(budget, self.rounds)
        event, paid = self.charged(self.rounds)
        return min(self.rounds, self._block * affordable(event, budget, paid))

    def bill(
        self, deltas: Sequence[float], rounds: int, accountants: Sequence[str] = ALL_ACCOUNTANTS
    ) -> Bill:
        """Return what the first `rounds` cost."""
        event, paid = self.charged(rounds)
        return charge({event: paid}, self.sampling.adjacency, deltas, accountants)

    @property
    def _block(self) -> int:
        return self.sampling.rounds if isinstance(self.sampling, RandomAllocation) else 1


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
    _check_choice("--sampling", question.sampling, tuple(PROVEN))
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
    _check_matrix(question)


def _check_matrix(question: BudgetQuestion) -> None:
    """Raise InputError where correlated noise is asked for that has no proof, or no groups."""
    separated = question.sampling == "min_separation"
    check_count("--bands", question.bands, 1024)
    _check_choice("--factorization", question.factorization, tuple(MADE))
    if question.dense and not separated:
        raise InputError(
            f"--factorization: {question.factorization} has a proof with --sampling "
            "min_separation alone; write optimized or square_root"
        )
    if question.dense and not 1 <= (question.rounds or 0) <= _MOST_ROWS:
        raise InputError(
            f"--rounds: the matrix of {question.factorization} is made for those of the run; "
            f"write at most {_MOST_ROWS:,}"
        )
    if not separated:
        _check_groups(question)
        return
    if question.solve == "cohort":
        raise InputError(
            "--solve cohort: with --sampling min_separation it is --separation that costs, and the "
            "cohort is at most N over it; ask for the ε of one"
        )
    if question.separation is None and question.cohort is None:
        raise InputError(
            "--separation: write of how many rounds a user is in one at most, or --cohort"
        )
    check_count("--separation", question.rounds_apart, question.population)
    if question.rounds_apart * (question.cohort or 0) > question.population:
        raise InputError(
            f"--cohort: with --separation {question.separation} it is one group of so many, at "
            f"most {question.population / question.rounds_apart:g} users"
        )


def _check_groups(question: BudgetQuestion) -> None:
    """Raise InputError where independent coins do not go with the bands or a separation."""
    if question.separation is not None:
        raise InputError("--separation: goes with --sampling min_separation")
    if question.bands > 1 and question.sampling != "poisson":
        raise InputError(
            "--bands: correlated noise has a proof with --sampling poisson or min_separation alone"
        )
    if question.bands * (question.cohort or 1) > question.population:
        raise InputError(
            f"--bands: {question.bands} times the cohort is more than the population of "
            f"{question.population}, and a round draws from one of so many groups; write fewer"
        )


def _check_completeness(question: BudgetQuestion) -> None:
    solve = str(question.solve)
    for field in _NEEDS[solve]:
        implied = field == "cohort" and question.sampling in ("all", "min_separation")
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
    return recipe_of(question), question.deltas


def _solve_delta(question: BudgetQuestion) -> tuple[Recipe, tuple[float, ...]]:
    assert question.epsilon is not None
    recipe = recipe_of(question)
    found = [delta for delta in _deltas_of(question, recipe).values() if delta is not None]
    delta = min(found)
    if not delta < 1:
        raise InputError(f"--epsilon: no δ below 1 is proved at ε = {question.epsilon:g}; raise it")
    return recipe, (delta,)


def _solve_noise(question: BudgetQuestion) -> tuple[Recipe, tuple[float, ...]]:
    z = noise_for(question)
    return recipe_of(replace(question, noise_multiplier=z)), question.deltas


def noise_for(question: BudgetQuestion, accountants: Sequence[str] = ALL_ACCOUNTANTS) -> float:
    """Return the smallest z with which all rounds of `question` keep its budget.

    Raises:
        InputError: no noise does.
    """
    assert question.epsilon is not None
    recipe = recipe_of(replace(question, noise_multiplier=1.0))

    def event(z: float) -> dp_accounting.DpEvent:
        return replace(recipe, noise_multiplier=z).charged(recipe.rounds)[0]

    _, paid = recipe.charged(recipe.rounds)
    asked = question.epsilon, question.deltas[0], paid, recipe.sampling.adjacency
    try:
        return noise_multiplier_for(*asked, event, accountants)
    except ValueError as error:
        raise InputError(f"--epsilon: {error}") from None


def _solve_rounds(question: BudgetQuestion) -> tuple[Recipe, tuple[float, ...]]:
    assert question.epsilon is not None
    most = question.rounds or MOST_ROUNDS
    recipe = recipe_of(replace(question, rounds=most))
    adjacency, delta = recipe.sampling.adjacency, question.deltas[0]
    budget = Budget(question.epsilon, delta, adjacency)
    rounds = recipe.affordable(budget)
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
        return recipe_of(replace(question, cohort=cohort))

    def fit(cohort: int, accountants: Sequence[str] = ALL_ACCOUNTANTS) -> bool:
        recipe = at(cohort)
        event, paid = recipe.charged(recipe.rounds)
        return fits({event: paid}, recipe.sampling.adjacency, delta, budget, accountants)

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


def recipe_of(question: BudgetQuestion) -> Recipe:
    """Return the recipe of a question that gives noise and rounds."""
    assert question.noise_multiplier is not None
    assert question.rounds is not None
    workload = question.workload
    if question.dense and workload is None:
        workload = Workload((1.0,) * question.rounds)
    return Recipe(
        _sampling(question),
        question.noise_multiplier,
        question.rounds,
        question.bands,
        question.factorization,
        workload,
    )


def _sampling(question: BudgetQuestion) -> Sampling:
    adjacency = Adjacency(question.adjacency) if question.adjacency else None
    if adjacency and adjacency not in PROVEN[question.sampling]:
        proven = " or ".join(each.value for each in PROVEN[question.sampling])
        raise InputError(
            f"--adjacency: {adjacency.value} has no proof with --sampling {question.sampling}; "
            f"write {proven}"
        )
    block = question.rounds_apart if question.sampling == "min_separation" else None
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
    rdp.compose(*recipe.charged(recipe.rounds))
    by_rdp = max(rdp.delta(question.epsilon), SMALLEST_DELTA)
    found: dict[str, float | None] = {"delta_rdp": by_rdp, "delta_pld": None}
    # At a δ of no use there is an ε, and so a PLD, that is affordable.
    if by_rdp < 1 and not recipe.bill([by_rdp], recipe.rounds).first.without_pld:
        pld = PldAccountant(recipe.sampling.adjacency)
        pld.compose(*recipe.charged(recipe.rounds))
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
    step = max(1, recipe.rounds // _CURVE_POINTS)
    rounds = sorted({*range(1, recipe.rounds, step), recipe.rounds})
    rdp = RdpAccountant(recipe.sampling.adjacency)
    owed = {count: recipe.charged(count) for count in rounds}
    by_rdp = {count: rdp.epsilon_after(event, delta, paid) for count, (event, paid) in owed.items()}
    curves = {"rdp": _curve(by_rdp)}
    counts = sorted({1, *(math.ceil(share * recipe.rounds) for share in _PLD_SHARES)})
    tight = {count: recipe.bill([delta], count).first.epsilon_pld for count in counts}
    known = {count: epsilon for count, epsilon in tight.items() if epsilon is not None}
    return curves | ({"pld": _curve(known)} if known else {})


def _curve(points: dict[int, float]) -> Curve:
    return Curve(tuple(points), tuple(points.values()))
