import math
from dataclasses import replace
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, pld, rdp

from fedpriv.errors import InputError
from fedpriv.privacy.band_planning import best, choices
from fedpriv.privacy.extrapolation import Extrapolation, extrapolate
from fedpriv.privacy.factorizations import MADE, Workload, optimized
from fedpriv.privacy.planning import (
    MOST_ROUNDS,
    BudgetAnswer,
    BudgetQuestion,
    answer,
    epsilon_curves,
)

SMALL: dict[str, Any] = {"population": 1000, "rounds": 50, "cohort": 20.0, "deltas": (1e-5,)}


def ask(**changes: Any) -> BudgetAnswer:
    return answer(BudgetQuestion(**{**SMALL, **changes}))


def by_rdp(noise: float, rounds: int, cohort: float = 20.0) -> rdp.RdpAccountant:
    accountant = rdp.RdpAccountant()
    event = PoissonSampledDpEvent(cohort / 1000, GaussianDpEvent(noise))
    accountant.compose(event, rounds)
    return accountant


def by_pld(noise: float, rounds: int, cohort: float = 20.0) -> pld.PLDAccountant:
    accountant = pld.PLDAccountant()
    accountant.compose(PoissonSampledDpEvent(cohort / 1000, GaussianDpEvent(noise)), rounds)
    return accountant


def test_epsilon_of_a_noise_is_dp_accountings():
    found = ask(noise_multiplier=1.0, deltas=(1e-5, 1e-8))
    tight = pld.PLDAccountant()
    tight.compose(PoissonSampledDpEvent(0.02, GaussianDpEvent(1.0)), 50)
    for cost in found.total.costs:
        epsilon, order = by_rdp(1.0, 50).get_epsilon_and_optimal_order(cost.delta)
        assert (cost.epsilon_rdp, cost.best_order) == (pytest.approx(epsilon, rel=1e-9), order)
        assert (cost.epsilon, cost.accountant) == (cost.epsilon_pld, "pld")
        assert cost.epsilon_pld == pytest.approx(tight.get_epsilon(cost.delta), rel=1e-5)
    assert [rounds for rounds, _ in found.after] == [1, 5, 13, 25, 50]
    for rounds, bill in found.after:
        expected = by_rdp(1.0, rounds).get_epsilon(1e-5)
        assert bill.first.epsilon_rdp == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("noise", "published"), [(0.01024, 1.1e7), (0.003072, 1.2e8)])
def test_published_points_of_speech_training(noise, published):
    """Pelikan et al. 2025: 1,024 of 34,753 users, about 2,000 rounds, δ = 1e-9."""
    question = BudgetQuestion(34_753, (1e-9,), 2000, 1024.0, noise_multiplier=noise)
    assert answer(question).total.first.epsilon == pytest.approx(published, rel=0.08)


@pytest.mark.parametrize("sampling", ["poisson", "fixed_size", "all"])
def test_noise_for_a_budget_keeps_it_and_wastes_nothing(sampling):
    changes: dict[str, Any] = {"sampling": sampling} | (
        {"cohort": None} if sampling == "all" else {}
    )
    found = ask(epsilon=2.0, **changes)
    assert 2.0 - 1e-3 < found.total.first.epsilon <= 2.0
    less = ask(noise_multiplier=found.recipe.noise_multiplier - 1e-4, **changes)
    assert less.total.first.epsilon > 2.0


def test_rounds_for_a_budget_are_the_most():
    found = ask(epsilon=2.0, noise_multiplier=1.0, solve="rounds", rounds=None)
    rounds = found.recipe.rounds
    assert by_pld(1.0, rounds).get_epsilon(1e-5) <= 2.0 < by_pld(1.0, rounds + 1).get_epsilon(1e-5)
    assert by_rdp(1.0, rounds).get_epsilon(1e-5) > 2.0
    capped = ask(epsilon=2.0, noise_multiplier=1.0, solve="rounds", rounds=7)
    assert capped.recipe.rounds == 7
    assert "all 7 rounds" in capped.notes[0]
    with pytest.raises(InputError, match="not one round fits"):
        ask(epsilon=0.1, noise_multiplier=1.0, solve="rounds", rounds=None)


def test_the_cohort_for_a_budget_is_the_largest():
    found = ask(epsilon=2.0, noise_multiplier=1.0, solve="cohort", cohort=None)
    largest = found.recipe.sampling.expected_cohort
    cohorts = [1.0, 10.0, largest, largest + 1, 200.0, 1000.0]
    spent = [by_pld(1.0, 50, cohort).get_epsilon(1e-5) for cohort in cohorts]
    assert spent == sorted(spent)
    assert spent[2] <= 2.0 < spent[3]
    capped = ask(epsilon=2.0, noise_multiplier=1.0, solve="cohort", cohort=5.5)
    assert capped.recipe.sampling.expected_cohort == 5
    assert "5, fits" in capped.notes[0]
    with pytest.raises(InputError, match="not even a cohort of one"):
        ask(epsilon=0.1, noise_multiplier=0.3, solve="cohort", cohort=None)


@pytest.mark.parametrize("solve", ["noise", "rounds", "cohort"])
def test_what_is_solved_for_holds_at_the_first_delta(solve):
    """Which is the smaller one here: at the last, a budget would buy more."""
    # Of samples of a fixed size PLD knows nothing, which saves its time.
    changes: dict[str, Any] = {
        "noise": {"epsilon": 4.0, "sampling": "all", "cohort": None, "rounds": 1},
        "rounds": {"epsilon": 4.0, "noise_multiplier": 2.0, "rounds": None},
        "cohort": {"epsilon": 1.0, "noise_multiplier": 4.0, "cohort": 31.0},
    }[solve]
    changes = {"sampling": "fixed_size", **changes}
    alone = ask(**changes, solve=solve, deltas=(1e-8,))
    both = ask(**changes, solve=solve, deltas=(1e-8, 1e-4))
    assert both.recipe == alone.recipe
    at = [cost.epsilon for cost in both.total.costs]
    assert at[1] < at[0] <= changes["epsilon"]
    assert both.recipe != ask(**changes, solve=solve, deltas=(1e-4,)).recipe


def test_delta_for_an_epsilon():
    found = ask(epsilon=2.0, noise_multiplier=1.0, solve="delta", deltas=())
    assert found.delta_rdp == pytest.approx(by_rdp(1.0, 50).get_delta(2.0), rel=1e-9)
    assert found.delta_pld == pytest.approx(by_pld(1.0, 50).get_delta(2.0), rel=1e-4)
    assert found.deltas == (found.delta_pld,)
    assert found.delta_pld < found.delta_rdp
    assert found.total.first.epsilon == pytest.approx(2.0, rel=1e-6)
    with pytest.raises(InputError, match="no δ below 1"):
        ask(epsilon=1e-3, noise_multiplier=0.1, solve="delta", deltas=())


def test_what_rounding_would_make_free_is_not():
    """With extreme noise dp-accounting's RDP answers zero, which the first round disproves."""
    noise, delta = 1e8, 1e-10
    event = PoissonSampledDpEvent(0.03, GaussianDpEvent(noise))
    accountant = rdp.RdpAccountant()
    accountant.compose(event, 2000)
    assert accountant.get_epsilon(delta) == 0
    assert 0.03 * math.erf(1 / (noise * math.sqrt(8))) > delta
    found = ask(noise_multiplier=noise, rounds=2000, cohort=30.0, deltas=(delta,))
    assert found.total.first.epsilon > 0
    with pytest.raises(InputError, match="--epsilon: no noise multiplier reaches"):
        ask(epsilon=1e-3, deltas=(delta,))


def test_an_epsilon_that_is_truly_zero_is_answered():
    found = ask(noise_multiplier=10.0, rounds=1, cohort=1e-4, deltas=(1e-4,))
    assert found.total.first.epsilon == 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nobody": ({"population": 0, "noise_multiplier": 1.0}, "--population"),
    "no rounds": ({"rounds": 0, "noise_multiplier": 1.0}, "--rounds"),
    "too many rounds": ({"rounds": MOST_ROUNDS + 1, "noise_multiplier": 1.0}, "--rounds"),
    "rounds missing": ({"rounds": None, "noise_multiplier": 1.0}, "--rounds: needed"),
    "delta missing": ({"deltas": (), "noise_multiplier": 1.0}, "--delta: needed"),
    "delta of one": ({"deltas": (1e-5, 1.0), "noise_multiplier": 1.0}, "--delta"),
    "delta not a number": ({"deltas": (math.nan,), "noise_multiplier": 1.0}, "--delta"),
    "cohort missing": ({"cohort": None, "noise_multiplier": 1.0}, "--cohort: needed"),
    "cohort too large": ({"cohort": 1001.0, "noise_multiplier": 1.0}, "--cohort"),
    "half a user": (
        {"cohort": 2.5, "sampling": "fixed_size", "noise_multiplier": 1.0},
        "whole number",
    ),
    "a cohort of all": ({"sampling": "all", "noise_multiplier": 1.0}, "leave it out"),
    "no noise": ({"noise_multiplier": 0.0}, "--noise-multiplier"),
    "infinite noise": ({"noise_multiplier": math.inf}, "--noise-multiplier"),
    "noise beyond floats": ({"noise_multiplier": 1e200}, "--noise-multiplier"),
    "no budget": ({"epsilon": 0.0}, "--epsilon"),
    "neither": ({}, "--noise-multiplier to learn"),
    "both": ({"noise_multiplier": 1.0, "epsilon": 1.0}, "--solve"),
    "noise twice": ({"noise_multiplier": 1.0, "epsilon": 1.0, "solve": "noise"}, "leave it out"),
    "an unknown quantity": ({"noise_multiplier": 1.0, "solve": "users"}, "--solve"),
    "an unknown sampling": ({"noise_multiplier": 1.0, "sampling": "shuffled"}, "--sampling"),
    "an unknown adjacency": ({"noise_multiplier": 1.0, "adjacency": "swap"}, "--adjacency"),
    "no proof": ({"noise_multiplier": 1.0, "adjacency": "replace_one"}, "has no proof"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_questions_name_the_option(case):
    changes, words = BAD[case]
    with pytest.raises(InputError, match=words):
        ask(**changes)


def test_notes_say_what_a_run_would_refuse():
    for refused in (0.01, 1 / 1000):
        assert "1/population" in ask(noise_multiplier=0.05, deltas=(refused,)).notes[0]
    fine = ask(noise_multiplier=0.05, deltas=(0.999 / 1000,))
    assert not any("refuses" in note for note in fine.notes)


def test_curves_end_at_the_plan():
    found = ask(noise_multiplier=1.0, rounds=450)
    curves = epsilon_curves(found.recipe, 1e-5)
    total = found.total.first
    assert (curves["rdp"].rounds[-1], curves["rdp"].epsilons[-1]) == (450, total.epsilon_rdp)
    assert (curves["pld"].rounds[-1], curves["pld"].epsilons[-1]) == (450, total.epsilon_pld)
    for curve in curves.values():
        assert list(curve.epsilons) == sorted(curve.epsilons)
    fixed = ask(noise_multiplier=1.0, sampling="fixed_size")
    assert set(epsilon_curves(fixed.recipe, 1e-5)) == {"rdp"}


SPEECH: dict[str, Any] = {
    "population": 34_753,
    "cohort": 1024.0,
    "noise_multiplier": 0.003072,
    "rounds": 2000,
    "delta": 1e-9,
    "population_factors": (1000.0, 1.0),
    "cohort_factors": (1.0, 300.0),
}


def test_extrapolation_holds_the_noise_on_the_mean():
    grid = extrapolate(Extrapolation(**SPEECH, accountants=("rdp",)))
    assert [(cell.population, cell.cohort) for cell in grid.cells] == [
        (34_753, 1024.0),
        (34_753_000, 1024.0),
        (34_753_000, 307_200.0),
    ]
    assert grid.left_out == ((34_753, 307_200.0),)
    assert "307,200 of 34,753" in grid.notes[0]
    on_the_mean = [cell.noise_multiplier / cell.cohort for cell in grid.cells]
    assert on_the_mean == pytest.approx([3e-6] * 3, rel=1e-12)
    assert grid.cells[-1].epsilon == pytest.approx(4.65, abs=0.005)
    assert grid.cells[0].epsilon == pytest.approx(1.2e8, rel=0.08)
    assert all(cell.epsilon_pld is None for cell in grid.cells)


def test_every_population_is_held_against_delta_and_every_epsilon_against_ten():
    near = {**SPEECH, "delta": 10 / 34_753, "accountants": ("rdp",)}
    notes = " ".join(extrapolate(Extrapolation(**near)).notes)
    assert "is not below 1/population = 2.88e-05" in notes
    assert "a run refuses it" in notes
    assert "weak to none" in notes
    planned = ask(noise_multiplier=0.3, population=750, cohort=370.0, deltas=(1e-3,))
    assert "is 0.75 times 1/population" in planned.notes[0]
    assert "weak to none" in planned.notes[1]


def test_extrapolation_by_pld_is_tighter_where_it_is_affordable():
    grid = extrapolate(Extrapolation(**SPEECH))
    assert grid.cells[0].epsilon_pld is None
    assert any("above 100" in note for note in grid.notes)
    assert (grid.cells[-1].epsilon, grid.cells[-1].accountant) == (
        grid.cells[-1].epsilon_pld,
        "pld",
    )
    assert grid.cells[-1].epsilon_pld == pytest.approx(4.208, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"population": 0}, "--population"),
        ({"cohort": 40_000.0}, "--cohort"),
        ({"noise_multiplier": -1.0}, "--noise-multiplier"),
        ({"rounds": 0}, "--rounds"),
        ({"delta": 2.0}, "--delta"),
        ({"population_factors": (0.0,)}, "--scale-population"),
        ({"population_factors": (1e-6,)}, "--scale-population"),
        ({"cohort_factors": (math.nan,)}, "--scale-cohort"),
        ({"population_factors": (1.0,), "cohort_factors": (300.0,)}, "every cohort exceeds"),
    ],
)
def test_bad_extrapolations_name_the_option(changes, words):
    with pytest.raises(InputError, match=words):
        extrapolate(Extrapolation(**SPEECH | changes))


@pytest.mark.parametrize("bands", [1, 3, 8])
def test_a_plan_with_bands_costs_what_correlated_noise_costs(bands):
    """⌈T/b⌉ rounds of the sampled Gaussian with b times the cohort, by dp-accounting itself."""
    question = BudgetQuestion(
        population=800, deltas=(1e-4,), rounds=20, cohort=16, noise_multiplier=1.2, bands=bands
    )
    accountant = rdp.RdpAccountant()
    sampled = PoissonSampledDpEvent(bands * 16 / 800, GaussianDpEvent(1.2))
    accountant.compose(sampled, -(-20 // bands))
    found = answer(question)
    assert found.total.first.epsilon_rdp == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-6)
    back = answer(replace(question, noise_multiplier=None, epsilon=found.total.first.epsilon))
    assert back.recipe.noise_multiplier == pytest.approx(1.2, rel=1e-3)
    most = answer(replace(question, epsilon=found.total.first.epsilon, rounds=40, solve="rounds"))
    assert most.recipe.rounds == -(-20 // bands) * bands


def test_bands_without_a_proof_are_refused():
    question = BudgetQuestion(
        population=100, deltas=(1e-4,), rounds=20, cohort=16, noise_multiplier=1.2, bands=8
    )
    with pytest.raises(InputError, match="--bands: 8 times the cohort"):
        answer(question)
    with pytest.raises(InputError, match="--sampling poisson or min_separation alone"):
        answer(replace(question, sampling="fixed_size", bands=2))


@pytest.mark.parametrize(
    ("question", "momentum", "bands", "saved"),
    [
        # 64 of 2,048 users, and 256 of them; with momentum more is taken back.
        ({"population": 2048, "cohort": 64, "epsilon": 8.0}, 0.0, 8, (0.25, 0.3)),
        ({"population": 2048, "cohort": 256, "epsilon": 8.0}, 0.0, 4, (0.02, 0.06)),
        ({"population": 2048, "cohort": 256, "epsilon": 8.0}, 0.9, 8, (0.08, 0.11)),
        ({"population": 2048, "cohort": 256, "epsilon": 2.0}, 0.0, 1, (0.0, 0.0)),
    ],
)
def test_which_band_pays(question, momentum, bands, saved):
    """By the covariance of C⁻¹Z alone: what is summed up of independent noise, and of it."""
    asked = BudgetQuestion(deltas=(1e-6,), rounds=400, **question)
    tried = choices(replace(asked, workload=Workload((1.0,) * 400, momentum)))
    assert [each.bands for each in tried] == [2**i for i in range(len(tried))]
    assert tried[-1].bands <= question["population"] / question["cohort"]
    assert best(tried).bands == bands
    assert saved[0] <= 1 - best(tried).error <= saved[1]


def test_a_choice_of_bands_is_what_the_matrices_say():
    asked = BudgetQuestion(population=300, deltas=(1e-5,), rounds=24, cohort=20, epsilon=4.0)
    one, two, *_ = choices(replace(asked, workload=Workload((1.0,) * 24, 0.5)))
    workload = np.array(
        [
            [sum(0.5**k for k in range(t - s + 1)) if t >= s else 0 for s in range(24)]
            for t in range(24)
        ]
    )
    column = optimized(2, Workload((1.0,) * 24, 0.5)).column(24)
    matrix = sum(np.diag(np.full(24 - lag, column[lag]), -lag) for lag in range(2))
    moved = two.noise_multiplier * np.linalg.norm(workload @ np.linalg.inv(matrix))
    assert two.error == pytest.approx(moved / (one.noise_multiplier * np.linalg.norm(workload)))
    for bands, choice in ((1, one), (2, two)):
        event = PoissonSampledDpEvent(bands * 20 / 300, GaussianDpEvent(choice.noise_multiplier))
        epsilon = rdp.RdpAccountant().compose(event, 24 // bands).get_epsilon(1e-5)
        assert epsilon == pytest.approx(4.0, rel=1e-3)


# ---------------------------------------------------------------- without trusted coins

#: A server with warm-up, decay and momentum.
FALLING = Workload((0.5, *np.linspace(1.0, 0.1, 22)), 0.8)
SEPARATED = BudgetQuestion(
    population=300,
    deltas=(1e-5,),
    rounds=23,
    cohort=40,
    epsilon=4.0,
    sampling="min_separation",
    workload=FALLING,
)


def written_out(column: np.ndarray, separation: int, banded: bool) -> tuple[float, float]:
    """The squared sensitivity of a user of the first group, and the error in the model."""
    rounds = len(column)
    c = np.array([[column[t - s] if t >= s else 0.0 for s in range(rounds)] for t in range(rounds)])
    squared = float((np.abs(c.T @ c)[::separation, ::separation]).sum())
    if banded:  # columns that end with the run are charged whole
        squared = float(len(range(0, rounds, separation)))
    workload = np.array(
        [
            [
                sum(FALLING.rates[u] * FALLING.momentum ** (u - s) for u in range(s, t + 1))
                for s in range(rounds)
            ]
            for t in range(rounds)
        ]
    )
    return squared, float(np.linalg.norm(workload @ np.linalg.inv(c)))


@pytest.mark.parametrize("factorization", ["optimized", "square_root", "bisr", "blt"])
def test_bands_and_separations_are_what_the_matrices_say(factorization):
    asked = replace(SEPARATED, factorization=factorization)
    tried = choices(asked)
    assert {each.separation for each in tried} == {1, 2, 4, 7}  # 40 of 300 are a seventh at most
    independent = {}
    for each in tried:
        bands, separation = each.bands, each.separation
        made = MADE[each.factorization](bands, FALLING, separation).column(23)
        squared, moved = written_out(made, separation, each.factorization not in ("bisr", "blt"))
        # Nothing is amplified: all is one Gaussian.
        multiplier = each.noise_multiplier / math.sqrt(squared)
        assert rdp_of(multiplier) == pytest.approx(4.0, rel=1e-4)
        independent.setdefault(separation, each.noise_multiplier * moved)
        found = each.noise_multiplier * moved
        assert found / each.error == pytest.approx(
            tried[0].noise_multiplier * written_out(np.eye(23)[0], 1, True)[1] / tried[0].error
        )
    least = min(independent.values())
    assert min(each.error for each in tried if each.independent) == 1.0
    assert best(tried).error < 1
    assert independent[best(tried).separation] == least  # those who stay away longest pay least


def rdp_of(multiplier: float) -> float:
    return rdp.RdpAccountant().compose(GaussianDpEvent(multiplier)).get_epsilon(1e-5)


@pytest.mark.parametrize(("factorization", "bands"), [("optimized", 5), ("bisr", 3), ("blt", 2)])
def test_a_plan_without_trusted_coins_is_one_gaussian(factorization, bands):
    asked = replace(
        SEPARATED,
        epsilon=None,
        noise_multiplier=1.5,
        separation=5,
        bands=bands,
        factorization=factorization,
    )
    found = answer(asked)
    column = MADE[factorization](bands, FALLING, 5).column(23)
    for rounds, bill in found.after:
        times = np.arange(0, rounds, 5)
        c = np.tril(np.array([np.roll(column, s) for s in range(23)]).T)
        gram = np.abs(c.T @ c)[np.ix_(times, times)]
        squared = len(times) if factorization == "optimized" else gram.sum()
        exact = dp_accounting.get_epsilon_gaussian(1.5 / math.sqrt(squared), 1e-5)
        assert bill.first.epsilon == pytest.approx(exact, rel=1e-3)
    curve = epsilon_curves(found.recipe, 1e-5)["rdp"]
    assert curve.epsilons[-1] == pytest.approx(found.total.first.epsilon_rdp, rel=1e-9)

    budget = replace(asked, epsilon=found.total.first.epsilon * 0.8, solve="rounds")
    fewer = answer(budget).recipe.rounds
    assert fewer % 5 == 0  # until the first group's next turn nobody's ε grows
    assert answer(replace(asked, rounds=23)).recipe.bill([1e-5], fewer).first.epsilon <= (
        budget.epsilon
    )
    back = answer(replace(asked, noise_multiplier=None, epsilon=found.total.first.epsilon))
    assert back.recipe.noise_multiplier == pytest.approx(1.5, rel=1e-4)


def test_a_group_is_the_cohort_where_only_the_separation_is_given():
    found = answer(
        replace(SEPARATED, cohort=None, separation=5, noise_multiplier=1.0, epsilon=None)
    )
    assert found.recipe.sampling.expected_cohort == 60
    with pytest.raises(InputError, match="--separation: write of how many rounds"):
        answer(replace(SEPARATED, cohort=None))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epsilon": None}, "--epsilon: needed"),
        ({"bands": 2}, "leave out --bands"),
        ({"sampling": "all", "cohort": None}, "--sampling poisson or min_separation"),
        ({"deltas": ()}, "--delta: needed"),
        ({"sampling": "min_separation", "cohort": None}, "--cohort: needed"),
        ({"separation": 4}, "--separation: goes with --sampling min_separation"),
        ({"sampling": "min_separation", "separation": 16}, "one group of so many, at most 18.75"),
        ({"sampling": "min_separation", "solve": "cohort"}, "--separation that costs"),
        ({"factorization": "bisr"}, "has a proof with --sampling min_separation alone"),
        ({"factorization": "dense"}, "--factorization: write"),
    ],
)
def test_what_is_needed_to_choose_bands_is_said(changes, reason):
    asked = BudgetQuestion(population=300, deltas=(1e-5,), rounds=24, cohort=20, epsilon=4.0)
    with pytest.raises(InputError, match=reason):
        choices(replace(asked, **changes))
