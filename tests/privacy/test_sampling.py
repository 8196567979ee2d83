import dp_accounting
import numpy as np
import pytest
from scipy import stats

from fedpriv.privacy import (
    Adjacency,
    FixedSizeSampling,
    FullParticipation,
    GaussianMechanism,
    GlobalClipping,
    PoissonSampling,
    Unclipped,
    build_sampling,
)
from fedpriv.privacy.sampling import PROVEN

MECHANISM = GaussianMechanism(1.5, GlobalClipping(0.25))


def test_poisson_takes_each_user_independently_with_probability_q():
    sampling = PoissonSampling(20, 6.0)
    generator = np.random.default_rng(1)
    draws = np.zeros((20_000, 20), dtype=bool)
    for row in draws:
        row[sampling.draw(generator)] = True
    sizes = np.bincount(draws.sum(axis=1), minlength=21)
    expected = stats.binom.pmf(np.arange(21), 20, 0.3) * len(draws)
    keep = expected > 5
    assert (
        stats.chisquare(
            [*sizes[keep], sizes[~keep].sum()], [*expected[keep], expected[~keep].sum()]
        ).pvalue
        > 1e-4
    )
    assert draws.mean(axis=0) == pytest.approx(0.3, abs=0.02)
    # Independence of two users: both are there with probability q^2.
    assert (draws[:, 0] & draws[:, 1]).mean() == pytest.approx(0.09, abs=0.01)


def test_fixed_size_takes_exactly_that_many_distinct_users():
    generator = np.random.default_rng(2)
    sampling = FixedSizeSampling(50, 7)
    for _ in range(200):
        cohort = sampling.draw(generator)
        assert len(np.unique(cohort)) == 7
        assert (np.diff(cohort) > 0).all()


def test_a_fixed_size_takes_each_user_with_the_same_probability():
    generator, drawn = np.random.default_rng(4), np.zeros(50)
    for _ in range(4000):
        drawn[FixedSizeSampling(50, 7).draw(generator)] += 1
    # Five standard deviations; users of one draw are nearly independent.
    assert drawn == pytest.approx(4000 * 7 / 50, abs=5 * np.sqrt(4000 * 0.14 * 0.86))


def test_a_draw_from_a_billion_users_costs_no_memory_of_that_size():
    cohort = PoissonSampling(10**9, 100.0).draw(np.random.default_rng(3))
    assert 40 < len(cohort) < 200
    assert cohort.max() < 10**9


def test_events_and_sensitivities():
    assert PoissonSampling(100, 10.0).event(MECHANISM) == dp_accounting.PoissonSampledDpEvent(
        0.1, dp_accounting.GaussianDpEvent(1.5)
    )
    # Replace-one moves the sum by 2C: the accountant is given z/2.
    assert FixedSizeSampling(100, 10).event(
        MECHANISM
    ) == dp_accounting.SampledWithoutReplacementDpEvent(
        100, 10, dp_accounting.GaussianDpEvent(0.75)
    )
    assert FullParticipation(100).event(MECHANISM) == dp_accounting.GaussianDpEvent(1.5)
    assert FixedSizeSampling(100, 10).sensitivity(0.25) == 0.5
    assert PoissonSampling(100, 10.0).sensitivity(0.25) == 0.25


@pytest.mark.parametrize(
    "mechanism", [GaussianMechanism(0.0, GlobalClipping(1.0)), GaussianMechanism(0.0, Unclipped())]
)
def test_no_noise_is_accounted_as_no_privacy(mechanism):
    for sampling in (PoissonSampling(9, 3.0), FixedSizeSampling(9, 3), FullParticipation(9)):
        assert sampling.event(mechanism) == dp_accounting.NonPrivateDpEvent()


def test_of_a_group_everybody_takes_part_or_a_part_by_coins_that_count_for_nothing():
    whole = build_sampling("min_separation", 100, None, None, 4)
    assert whole.expected_cohort == 25.0
    assert len(whole.draw(np.random.default_rng(1))) == 100
    part = build_sampling("min_separation", 100, 10, Adjacency.REPLACE_ONE, 4)
    drawn = [len(part.draw(np.random.default_rng(seed))) for seed in range(50)]
    assert np.mean(drawn) == pytest.approx(40, abs=5)
    assert part.event(MECHANISM) == dp_accounting.GaussianDpEvent(0.75)
    assert whole.event(MECHANISM) == dp_accounting.GaussianDpEvent(1.5)
    with pytest.raises(ValueError, match="needs a number of rounds"):
        build_sampling("min_separation", 100, 10)


def test_the_denominator_is_public():
    assert PoissonSampling(100, 12.5).expected_cohort == 12.5
    assert FixedSizeSampling(100, 12).expected_cohort == 12
    assert FullParticipation(100).expected_cohort == 100


def test_adjacency_is_a_property_of_the_sampling():
    assert PoissonSampling(9, 3.0).adjacency is Adjacency.ADD_OR_REMOVE_ONE
    assert FixedSizeSampling(9, 3).adjacency is Adjacency.REPLACE_ONE


@pytest.mark.parametrize(
    ("kind", "cohort"), [("poisson", 0), ("poisson", 101), ("fixed_size", 2.5), ("lottery", 3)]
)
def test_impossible_samplings_are_refused(kind, cohort):
    with pytest.raises(ValueError, match=r"cohort|unknown"):
        build_sampling(kind, 100, cohort)


@pytest.mark.parametrize(
    ("kind", "adjacency", "reason"),
    [
        ("poisson", Adjacency.REPLACE_ONE, "come or go"),
        ("fixed_size", Adjacency.ADD_OR_REMOVE_ONE, "every other user's chance"),
        ("fixed_size", Adjacency.ZERO_OUT, "covers zero_out"),
    ],
)
def test_pairs_without_a_proof_are_refused_with_the_reason(kind, adjacency, reason):
    with pytest.raises(ValueError, match=reason):
        build_sampling(kind, 100, 10, adjacency)


def test_what_is_proven_is_built():
    for kind, adjacencies in PROVEN.items():
        for adjacency in adjacencies:
            assert build_sampling(kind, 100, 10, adjacency, 5).adjacency is adjacency


def test_zero_out_has_sensitivity_c_and_full_participation_under_replace_one_2c():
    assert PoissonSampling(100, 10.0, Adjacency.ZERO_OUT).sensitivity(0.25) == 0.25
    everyone = FullParticipation(100, Adjacency.REPLACE_ONE)
    assert everyone.event(MECHANISM) == dp_accounting.GaussianDpEvent(0.75)
