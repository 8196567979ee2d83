"""Factorisations of correlated noise, against written-out matrices and others' figures."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import toeplitz

from fedpriv.privacy.factorizations import (
    Banded,
    Buffered,
    InverseBanded,
    Workload,
    buffered,
    error,
    inverse_root,
    optimized,
    sensitivity_shares,
    square_root,
    squared_sensitivity,
)

#: Decays and weights of buffers.
BUFFERS = {2: (0.9, 0.5, 0.3, 0.2), 3: (0.97, 0.8, 0.3, 0.1, 0.2, 0.25)}
#: opake-dpftrl 0.16.1: name, bands or buffers, rounds, separation, momentum; the largest squared
#: sensitivity with participations so far apart (`minsep_sensitivity_squared`), and the root of
#: `mean_error` for columns of norm 1.
OPAKE = (
    ("square_root", 4, 20, 4, 0.0, 5, 2.095126431),
    ("bisr", 2, 20, 4, 0.0, 5.520000144, 2.121320344),
    ("bisr", 5, 20, 4, 0.0, 8.629980759, 1.826622357),
    ("blt", 2, 20, 4, 0.0, 9.140199188, 1.820370336),
    ("blt", 3, 20, 4, 0.0, 8.647422224, 1.838089751),
    ("square_root", 4, 20, 4, 0.9, 5, 10.40662967),
    ("bisr", 2, 20, 4, 0.9, 12.16694455, 7.731733372),
    ("bisr", 5, 20, 4, 0.9, 12.14024244, 7.787453199),
    ("blt", 2, 20, 4, 0.9, 9.140199188, 8.278247942),
    ("blt", 3, 20, 4, 0.9, 8.647422224, 8.573129362),
    ("square_root", 4, 33, 8, 0.0, 4.67191601, 2.53181464),
    ("bisr", 2, 33, 8, 0.0, 4.779377163, 2.581988897),
    ("bisr", 5, 33, 8, 0.0, 5.788831616, 2.04431653),
    ("blt", 2, 33, 8, 0.0, 6.546948181, 1.991671354),
    ("blt", 3, 33, 8, 0.0, 6.65112333, 2.017202511),
    ("square_root", 4, 33, 8, 0.9, 4.67191601, 15.92122566),
    ("bisr", 2, 33, 8, 0.9, 8.749257449, 9.482595027),
    ("bisr", 5, 33, 8, 0.9, 8.799519712, 9.549176278),
    ("blt", 2, 33, 8, 0.9, 6.546948181, 11.20803104),
    ("blt", 3, 33, 8, 0.9, 6.65112333, 11.59708635),
    ("square_root", 4, 64, 10, 0.0, 7, 3.351132143),
    ("bisr", 2, 64, 10, 0.0, 7.007814404, 3.43996124),
    ("bisr", 5, 64, 10, 0.0, 8.212654277, 2.483226951),
    ("blt", 2, 64, 10, 0.0, 9.718069387, 2.324666078),
    ("blt", 3, 64, 10, 0.0, 11.01501877, 2.292994575),
    ("square_root", 4, 64, 10, 0.9, 7, 26.08085079),
    ("bisr", 2, 64, 10, 0.9, 16.78529623, 11.82419302),
    ("bisr", 5, 64, 10, 0.9, 17.26428716, 11.81512426),
    ("blt", 2, 64, 10, 0.9, 9.718069387, 16.24904951),
    ("blt", 3, 64, 10, 0.9, 11.01501877, 16.02707906),
)


def made(name: str, number: int, rounds: int, momentum: float):
    workload = Workload((1.0,) * rounds, momentum)
    if name == "blt":
        return Buffered(BUFFERS[number], rounds)
    return inverse_root(number, workload) if name == "bisr" else square_root(number)


def written_out(name: str, number: int, rounds: int, momentum: float) -> np.ndarray:
    """C, entry by entry from the papers' definitions, its first column scaled to norm 1."""
    if name == "bisr":
        half = [math.prod((j - 1.5) / j for j in range(1, k + 1)) for k in range(number)]
        inverse = np.zeros(rounds)
        for k in range(number):
            inverse[k] = sum(half[j] * momentum**j * half[k - j] for j in range(k + 1))
        matrix = np.linalg.inv(toeplitz(inverse, np.zeros(rounds)))
    else:
        matrix = np.eye(rounds)
        for row, column in itertools.product(range(rounds), repeat=2):
            if name == "square_root" and 0 <= row - column < number:
                lag = row - column
                matrix[row, column] = math.comb(2 * lag, lag) / 4**lag
            if name == "blt" and row > column:
                decays, weights = BUFFERS[number][:number], BUFFERS[number][number:]
                matrix[row, column] = sum(
                    w * d ** (row - column - 1) for d, w in zip(decays, weights, strict=True)
                )
    return matrix / np.linalg.norm(matrix[:, 0])


def moved(rates, momentum) -> np.ndarray:
    """A, by running the server's recursion on unit vectors: v = βv + y, x = x + ηv."""
    rounds = len(rates)
    model, velocity, rows = np.zeros(rounds), np.zeros(rounds), []
    for rate, fresh in zip(rates, np.eye(rounds), strict=True):
        velocity = momentum * velocity + fresh
        model = model + rate * velocity
        rows.append(model)
    return np.array(rows)


@pytest.mark.parametrize("setting", OPAKE, ids=lambda setting: "-".join(map(str, setting[:5])))
def test_sensitivity_and_error_are_the_matrixs_and_another_librarys(setting):
    name, number, rounds, separation, momentum, squared, of_the_model = setting
    found, matrix = (
        made(name, number, rounds, momentum),
        written_out(name, number, rounds, momentum),
    )
    np.testing.assert_allclose(found.column(rounds), matrix[:, 0], rtol=1e-12, atol=1e-15)
    shares = sensitivity_shares(found, rounds, separation)
    gram = matrix.T @ matrix
    for group in range(separation):
        times = np.arange(group, rounds, separation)
        assert shares[times].sum() == pytest.approx(gram[np.ix_(times, times)].sum(), rel=1e-9)
    assert squared_sensitivity(found, rounds, separation) == pytest.approx(squared, rel=1e-9)
    rows = moved([1.0] * rounds, momentum) @ np.linalg.inv(matrix)
    expected = math.sqrt((rows**2).sum() / rounds)
    workload = Workload((1.0,) * rounds, momentum)
    assert error(found.column(rounds), workload) == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(of_the_model, rel=1e-9)


@pytest.mark.parametrize(
    "found",
    [square_root(3), inverse_root(3, Workload((1.0,) * 11)), Buffered(BUFFERS[2], 11)],
    ids=lambda found: found.name,
)
def test_nobody_who_stays_away_so_long_moves_more(found):
    """Whoever takes part when: all patterns of 11 rounds, and contributions of any sign."""
    matrix, separation = toeplitz(found.column(11), np.zeros(11)), 3
    most = squared_sensitivity(found, 11, separation)
    for many in range(1, 5):
        for times in itertools.combinations(range(11), many):
            if all(b - a >= separation for a, b in itertools.pairwise(times)):
                for signs in itertools.product((1.0, -1.0), repeat=many):
                    shift = matrix[:, times] @ signs
                    assert shift @ shift <= most * (1 + 1e-12)


def test_contributions_in_any_direction_move_no_more():
    found, generator = Buffered(BUFFERS[3], 20), np.random.default_rng(1)
    matrix = toeplitz(found.column(20), np.zeros(20))[:, ::4]
    for _ in range(200):
        sent = generator.standard_normal((5, 3))
        sent /= np.linalg.norm(sent, axis=1, keepdims=True)
        assert np.linalg.norm(matrix @ sent) ** 2 <= squared_sensitivity(found, 20, 4)


def test_shares_with_entries_of_either_sign_are_no_smaller_than_what_they_stand_for():
    found = Banded((0.8, -0.5, 0.33166247903554))
    matrix = toeplitz(found.column(9), np.zeros(9))
    shares = sensitivity_shares(found, 9, 1)
    for times in ([0, 1], [0, 1, 2], list(range(9))):
        for signs in itertools.product((1.0, -1.0), repeat=len(times)):
            shift = matrix[:, times] @ signs
            assert shift @ shift <= shares[times].sum() + 1e-12


# ---------------------------------------------------------------- rows, one after another

RATES = tuple(np.linspace(1.0, 0.1, 12))
ALL = {
    "square root": square_root(4),
    "optimized": optimized(4, Workload(RATES, 0.9)),
    "bisr": inverse_root(4, Workload(RATES, 0.9)),
    "blt": buffered(2, Workload(RATES, 0.5), 4),
}


@pytest.mark.parametrize("found", ALL.values(), ids=ALL)
def test_rows_are_those_of_the_inverse_times_fresh_noise(found):
    fresh = torch.from_numpy(np.random.default_rng(2).standard_normal((12, 5)))
    inverse = np.linalg.inv(toeplitz(found.column(12), np.zeros(12)))
    stream = found.stream()
    rows = np.array([stream.row(each.clone()).numpy().copy() for each in fresh])
    np.testing.assert_allclose(rows, inverse @ fresh.numpy(), atol=1e-12)
    assert np.linalg.norm(found.column(12)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("found", ALL.values(), ids=ALL)
def test_the_covariance_of_what_was_drawn_is_that_of_the_inverse(found):
    rounds, size = 6, 40_000
    fresh = torch.from_numpy(np.random.default_rng(3).standard_normal((rounds, size)))
    stream = found.stream()
    rows = np.array([stream.row(each.clone()).numpy().copy() for each in fresh])
    inverse = np.linalg.inv(toeplitz(found.column(rounds), np.zeros(rounds)))
    expected, measured = inverse @ inverse.T, rows @ rows.T / size
    spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / size)
    assert np.all(np.abs(measured - expected) < 6 * spread)
    white = toeplitz(found.column(rounds), np.zeros(rounds)) @ rows
    low, high = stats.chi2.interval(1 - 1e-7, size)
    assert all(low < float(row @ row) < high for row in white)


@pytest.mark.parametrize("found", ALL.values(), ids=ALL)
def test_it_is_made_again_from_what_a_ledger_records(found):
    kinds = {"bisr": InverseBanded, "blt": Buffered}
    if found.name in kinds:
        assert kinds[found.name](found.parameters, 12) == found


# ---------------------------------------------------------------- what is optimised


def test_optimised_bands_have_the_least_error_of_all_that_are_near():
    """The figures of opake-dpftrl 0.16.1 (`optimize`), and a search around them."""
    for rounds, bands, momentum, least in (
        (40, 6, 0.0, 2.421377938),
        (40, 6, 0.9, 14.37415846),
        (128, 16, 0.0, 2.872554122),
    ):
        workload = Workload((1.0,) * rounds, momentum)
        found = error(optimized(bands, workload).column(rounds), workload)
        assert found == pytest.approx(least, rel=1e-8)
        assert found < error(square_root(bands).column(rounds), workload)
    workload, generator = Workload(RATES, 0.9), np.random.default_rng(4)
    best = optimized(4, workload)
    for _ in range(50):
        other = np.array(best.parameters) + 0.02 * generator.standard_normal(4)
        other = Banded(tuple(other / np.linalg.norm(other)))
        assert error(other.column(12), workload) >= error(best.column(12), workload) * (1 - 1e-9)


def test_momentum_left_out_of_the_workload_is_a_loss():
    """No fault of privacy: the noise is as large, and moves the model further."""
    whole = Workload((1.0,) * 60, 0.9)
    without = optimized(8, Workload((1.0,) * 60))
    assert error(without.column(60), whole) > 1.05 * error(optimized(8, whole).column(60), whole)
    assert whole.passed_on(np.eye(60)[0])[1] == pytest.approx(0.9)


def test_learning_rates_are_part_of_the_workload():
    falling = Workload(tuple(0.8 ** np.arange(60.0)))
    found = [optimized(30, each).column(60) for each in (falling, Workload((1.0,) * 60))]
    fitted, other = (error(column, falling) for column in found)
    assert fitted < 0.95 * other
    matrix = toeplitz(found[0], np.zeros(60))
    rows = moved(falling.rates, 0.0) @ np.linalg.inv(matrix)
    assert fitted == pytest.approx(math.sqrt((rows**2).sum() / 60), rel=1e-9)


@pytest.mark.parametrize(("rounds", "separation"), [(60, 5), (200, 16)])
def test_buffers_are_nearly_as_good_as_bands_and_better_than_nothing(rounds, separation):
    workload = Workload((1.0,) * rounds)

    def whole(found):
        cost = squared_sensitivity(found, rounds, separation)
        return error(found.column(rounds), workload) * math.sqrt(cost)

    buffers, bands = buffered(2, workload, separation), optimized(separation, workload)
    assert whole(bands) < whole(buffers) < 1.12 * whole(bands)
    assert whole(buffers) < 0.6 * whole(square_root(1))


def test_one_band_is_independent_noise():
    for found in (square_root(1), optimized(1, Workload((1.0,) * 5)), Banded((1.0,))):
        assert found.column(5).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
        assert sensitivity_shares(found, 5, 1).tolist() == [1.0] * 5
