"""Correlated noise: its covariance, its groups, and its cost against exact densities."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant as Reference
from scipy import stats
from scipy.linalg import toeplitz

from fedpriv.errors import InputError
from fedpriv.privacy import (
    Adjacency,
    Budget,
    CentralMechanism,
    CorrelatedMechanism,
    CountNoise,
    FixedSizeSampling,
    FullParticipation,
    GaussianMechanism,
    GlobalClipping,
    Header,
    Ledger,
    LocalMechanism,
    MinSeparationSampling,
    PayerAccounts,
    PerLayerClipping,
    PldAccountant,
    PoissonSampling,
    Purpose,
    Randomness,
    Release,
    Workload,
    charge,
    most_charged,
    read_ledger,
)
from fedpriv.privacy.auditing import one_run_bound
from fedpriv.privacy.factorizations import Buffered, inverse_of, square_root
from fedpriv.privacy.ledger import _fields
from fedpriv.privacy.mechanisms.correlated import group_of
from fedpriv.privacy.mechanisms.registry import mechanism_of

Z, BOUND, DELTA = 1.5, 0.2, 1e-5
GAUSSIAN = GaussianMechanism(Z, GlobalClipping(BOUND))
SOURCE = Randomness.simulation(3, "run")


def matrix(bands: int, rounds: int) -> np.ndarray:
    """C, from the binomial coefficients of (1 - x)^(-1/2)."""
    series = np.array([math.comb(2 * j, j) / 4**j for j in range(bands)])
    series /= np.linalg.norm(series)
    column = np.zeros(rounds)
    column[: min(bands, rounds)] = series[:rounds]
    return toeplitz(column, np.zeros(rounds))


def correlated(bands: int, ids=(), population=1000, cohort=50.0, gaussian=GAUSSIAN, **changes):
    sampling = PoissonSampling(population, cohort, **changes)
    return CorrelatedMechanism(sampling, gaussian, bands, ids)


def rows(bands: int, sizes, rounds: int, attempts=None, gaussian=GAUSSIAN) -> torch.Tensor:
    """The noise of each round, `attempts` of which were drawn afresh."""
    last = attempts or {}
    source = correlated(bands).noise(sizes, SOURCE, lambda r: last.get(r, 0))
    return torch.stack([source.draw(r, last.get(r, 0), gaussian) for r in range(1, rounds + 1)])


# ---------------------------------------------------------------- the noise


@pytest.mark.parametrize("bands", [1, 2, 5, 40])
def test_the_columns_have_norm_one_and_fall(bands):
    found = square_root(bands).parameters
    np.testing.assert_allclose(found, matrix(bands, bands)[:, 0], rtol=1e-13)
    assert math.fsum(c * c for c in found) == pytest.approx(1, abs=1e-15)
    assert all(a > b > 0 for a, b in itertools.pairwise(found))


def test_all_bands_are_the_square_root_of_the_prefix_sums():
    root = matrix(7, 7) / matrix(7, 7)[0, 0]
    np.testing.assert_allclose(root @ root, np.tril(np.ones((7, 7))), atol=1e-12)


@pytest.mark.parametrize(("bands", "rounds"), [(1, 4), (3, 9), (6, 4)])
def test_what_rounds_take_back_is_the_inverse(bands, rounds):
    inverse = np.linalg.inv(matrix(bands, rounds))
    np.testing.assert_allclose(
        inverse_of(square_root(bands).column(rounds)), inverse[:, 0], atol=1e-12
    )


@pytest.mark.parametrize("bands", [2, 4])
def test_the_covariance_is_that_of_the_inverse(bands):
    rounds, size = 7, 40_000
    noise = rows(bands, [size], rounds).numpy()
    inverse = np.linalg.inv(matrix(bands, rounds))
    expected = (Z * BOUND) ** 2 * inverse @ inverse.T
    found = noise @ noise.T / size
    # The variance of a mean of products of Gaussians; 6 deviations, for 28 numbers.
    spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / size)
    assert np.all(np.abs(found - expected) < 6 * spread)
    # Each row of CN/σ is standard and has nothing of another one.
    white = matrix(bands, rounds) @ noise / (Z * BOUND)
    low, high = stats.chi2.interval(1 - 1e-7, size)
    assert all(low < float(row @ row) < high for row in white)
    assert np.abs(np.corrcoef(white) - np.eye(rounds)).max() < 6 / math.sqrt(size)


def test_with_one_band_the_noise_is_the_servers_to_the_bit():
    source = CentralMechanism(PoissonSampling(1000, 50.0), GAUSSIAN).noise([30, 70], SOURCE, len)
    for attempts in ({}, {2: 1}):
        found = rows(1, [30, 70], 4, attempts)
        for round_ in range(1, 5):
            drawn = source.draw(round_, attempts.get(round_, 0), GAUSSIAN)
            assert found[round_ - 1].equal(drawn)


def test_noise_per_block_is_correlated_within_each_block():
    gaussian = GaussianMechanism(Z, PerLayerClipping(0.5, (0.3, 0.4)), per_block=True)
    noise = rows(3, [20_000, 20_000], 5, gaussian=gaussian).numpy()
    for part, bound in zip(np.split(noise, 2, axis=1), (0.3, 0.4), strict=True):
        white = matrix(3, 5) @ part / (Z * math.sqrt(2) * bound)
        low, high = stats.chi2.interval(1 - 1e-7, part.size)
        assert low < float((white**2).sum()) < high


def test_a_process_that_starts_anew_makes_the_same_noise_again():
    whole = rows(3, [50], 9)
    for round_ in (1, 2, 5, 9):
        source = correlated(3).noise([50], SOURCE, lambda _: 0)
        assert source.draw(round_, 0, GAUSSIAN).equal(whole[round_ - 1])
        # Whoever adds noise to a sum uses it up.
        source.draw(round_, 0, GAUSSIAN).zero_()
        assert source.draw(round_, 0, GAUSSIAN).equal(whole[round_ - 1])


def test_a_round_that_is_drawn_afresh_begins_anew():
    """Noise of before it would make an earlier contribution be in more than b rows."""
    standard = [
        SOURCE.numpy(Purpose.NOISE, r, int(r == 4)).standard_normal(50) for r in range(1, 8)
    ]
    later = np.linalg.inv(matrix(3, 4)) @ np.array(standard[3:]) * (Z * BOUND)
    whole = rows(3, [50], 7, {4: 1})
    np.testing.assert_allclose(whole[3:].numpy(), later, atol=1e-12)
    assert whole[:3].equal(rows(3, [50], 3))
    for round_ in (4, 5, 7):
        source = correlated(3).noise([50], SOURCE, lambda r: int(r == 4))
        assert source.draw(round_, int(round_ == 4), GAUSSIAN).equal(whole[round_ - 1])


def test_drawn_afresh_in_the_same_process_it_begins_anew_too():
    last = dict.fromkeys(range(1, 8), 0)
    source = correlated(3).noise([50], SOURCE, last.__getitem__)
    for round_ in range(1, 5):
        source.draw(round_, 0, GAUSSIAN)
    last[4] = 1
    found = [source.draw(round_, last[round_], GAUSSIAN) for round_ in range(4, 8)]
    assert torch.stack(found).equal(rows(3, [50], 7, {4: 1})[3:])


# ---------------------------------------------------------------- who is drawn


def test_a_round_draws_from_its_group_alone_each_user_with_b_times_q():
    ids = [f"somebody {number}" for number in range(900)]
    mechanism = correlated(4, ids, population=1000, cohort=100.0)
    groups, times = np.array([group_of(user, 4) for user in ids]), np.zeros(900)
    generator = np.random.default_rng(1)
    for round_ in range(1, 401):
        cohort = mechanism.cohort(round_, generator)
        assert set(groups[cohort]) <= {(round_ - 1) % 4}
        assert mechanism.payers(round_, cohort) == ((round_ - 1) % 4,)
        times[cohort] += 1
    # 100 rounds of each group, every user with probability 0.4 in each.
    low, high = stats.binom.interval(1 - 1e-9, 100, 0.4)
    assert low <= times.min() < times.max() <= high
    assert abs(times.sum() - 900 * 40) < 6 * math.sqrt(900 * 100 * 0.4 * 0.6)
    assert min(np.bincount(groups)) > 900 / 4 - 6 * math.sqrt(900 / 4)


def test_with_one_band_the_cohorts_are_those_of_poisson_sampling():
    mechanism = correlated(1, [str(number) for number in range(1000)])
    for seed in range(5):
        drawn = mechanism.sampling.draw(np.random.default_rng(seed))
        np.testing.assert_array_equal(mechanism.cohort(7, np.random.default_rng(seed)), drawn)


# ---------------------------------------------------------------- what it costs


def test_rounds_cost_each_group_its_own_rounds_of_the_sampled_gaussian(tmp_path):
    mechanism = correlated(3)
    header = Header("print", 1000, DELTA, "add_or_remove_one", **mechanism.header)
    ledger = Ledger.create(tmp_path / "ledger.jsonl", header)
    for round_ in range(1, 8):
        payers = mechanism.payers(round_, np.zeros(0))
        ledger.append(Release.of(round_, 0, mechanism, "digest", payers))
    read = read_ledger(tmp_path / "ledger.jsonl")
    assert mechanism_of(read.header) is CorrelatedMechanism
    assert read.releases == tuple(ledger)
    assert (mechanism.paid(7), mechanism.most_rounds(3)) == (3, 9)
    event = dp_accounting.PoissonSampledDpEvent(0.15, dp_accounting.GaussianDpEvent(Z))
    assert mechanism.event() == event
    charged = most_charged(read.releases)
    assert [release.round for release in charged] == [1, 4, 7]
    accounts = PayerAccounts(Adjacency.ADD_OR_REMOVE_ONE, mechanism.accounts)
    accounts.charge_all(read.releases)
    expected = [Reference().compose(event, times).get_epsilon(DELTA) for times in (3, 2, 2)]
    np.testing.assert_allclose(accounts.epsilons(DELTA), expected, rtol=1e-6)


def test_a_group_pays_again_for_a_round_that_is_drawn_afresh():
    mechanism = correlated(3)
    drawn = [(1, 0), (2, 0), (2, 1), (3, 0), (4, 0), (5, 0)]
    releases = [
        Release.of(round_, attempt, mechanism, "digest", mechanism.payers(round_, np.zeros(0)))
        for round_, attempt in drawn
    ]
    assert [(each.round, each.attempt) for each in most_charged(releases)] == [
        (2, 0),
        (2, 1),
        (5, 0),
    ]


# ---------------------------------------------------------------- without trusted coins

SEPARATED = MinSeparationSampling(1000, 50.0, 5)
PLANNED = Workload((1.0,) * 17, 0.5)


def separated(factorization: str, bands: int, sampling=SEPARATED, z=Z) -> CorrelatedMechanism:
    gaussian = GaussianMechanism(z, GlobalClipping(BOUND))
    return CorrelatedMechanism(sampling, gaussian, bands, (), factorization, PLANNED)


def recorded(mechanism: CorrelatedMechanism, folder, rounds: int = 17, again=()):
    """What a ledger says of a run, each round of `again` charged twice."""
    adjacency = mechanism.adjacency.value
    header = Header("print", 1000, DELTA, adjacency, **mechanism.header)
    ledger = Ledger.create(folder / "ledger.jsonl", header)
    for round_ in range(1, rounds + 1):
        for attempt in range(1 + (round_ in again)):
            payers = mechanism.payers(round_, np.zeros(0))
            ledger.append(Release.of(round_, attempt, mechanism, "digest", payers))
    return read_ledger(folder / "ledger.jsonl").releases


@pytest.mark.parametrize(
    ("factorization", "bands"),
    [("square_root", 1), ("square_root", 5), ("optimized", 3), ("bisr", 4), ("blt", 2)],
)
@pytest.mark.parametrize("adjacency", Adjacency)
def test_each_group_pays_what_its_columns_of_the_matrix_say(
    factorization, bands, adjacency, tmp_path
):
    sampling = MinSeparationSampling(1000, 50.0, 5, adjacency)
    mechanism = separated(factorization, bands, sampling)
    releases = recorded(mechanism, tmp_path)
    assert {release.mechanism for release in releases} == {CorrelatedMechanism}
    c = toeplitz(mechanism.matrix.column(17), np.zeros(17))
    accounts = PayerAccounts(adjacency, mechanism.accounts)
    accounts.charge_all(releases)
    moves = 2 if adjacency is Adjacency.REPLACE_ONE else 1
    for group, found in enumerate(accounts.epsilons(DELTA)):
        times = np.arange(group, 17, 5)
        squared = (c[:, times].sum(1) ** 2).sum()
        if bands <= 5 and factorization in ("square_root", "optimized"):
            squared = len(times)  # columns that end with the run are counted whole
        event = dp_accounting.GaussianDpEvent(Z / moves / math.sqrt(squared))
        assert found == pytest.approx(Reference().compose(event).get_epsilon(DELTA), rel=1e-6)
    # Who is replaced by a person of another group is gone from one group and appears in another.
    of_groups = PayerAccounts(adjacency, mechanism.accounts, mechanism.payer)
    of_groups.charge_all(releases)
    costs = of_groups.costs(DELTA)
    epsilons = accounts.epsilons(DELTA)
    assert costs.worst == epsilons.max()
    exchanged = adjacency is Adjacency.REPLACE_ONE
    assert costs.median == (epsilons.max() if exchanged else np.median(epsilons))
    charged = most_charged(releases)
    assert {release.group for release in charged} == {0}
    planned = charge({mechanism.event(): mechanism.paid(17)}, adjacency, [DELTA]).first
    spent = charge(Counter(each.event() for each in charged), adjacency, [DELTA]).first
    assert spent.epsilon_rdp == pytest.approx(planned.epsilon_rdp, rel=1e-6)
    # The grid of losses alone is between one Gaussian and several.
    assert spent.epsilon_pld == pytest.approx(planned.epsilon_pld, rel=1e-4)
    one = dp_accounting.get_epsilon_gaussian(
        Z / moves / math.sqrt(sum((Z / moves / e.event().noise_multiplier) ** 2 for e in charged)),
        DELTA,
    )
    assert one <= spent.epsilon_pld <= 1.001 * one


def test_a_round_that_is_drawn_afresh_is_paid_for_in_full_where_columns_are_dense(tmp_path):
    """What was released before counts as one run, what follows as another: both are paid for."""
    mechanism = separated("blt", 2)
    releases = recorded(mechanism, tmp_path, again=(8,))
    c = toeplitz(mechanism.matrix.column(17), np.zeros(17))
    for group in range(5):
        paid = sum(
            (Z / each.event().noise_multiplier) ** 2 for each in releases if each.group == group
        )
        before = list(range(group, 8, 5))
        after = [t for t in range(group, 17, 5) if t >= 7]
        owed = (c[:8, before].sum(1) ** 2).sum() + (c[:, after].sum(1) ** 2).sum()
        assert paid >= owed * (1 - 1e-9)


def test_of_a_run_that_a_budget_cuts_short_those_rounds_fit_that_cost_less():
    mechanism = separated("blt", 2, z=3.0)
    adjacency = Adjacency.ADD_OR_REMOVE_ONE
    c = toeplitz(mechanism.matrix.column(17), np.zeros(17))
    shares = np.diag(c.T @ c) + 2 * np.array(
        [sum(c[:, t] @ c[:, t - lag] for lag in range(5, t + 1, 5)) for t in range(17)]
    )
    for rounds in (1, 5, 6, 11, 16):
        squared = shares[:rounds:5].sum()
        epsilon = dp_accounting.get_epsilon_gaussian(3.0 / math.sqrt(squared), DELTA)
        budget = Budget(1.01 * epsilon, DELTA, adjacency)
        # Rounds of other groups cost the first nothing.
        assert mechanism.affordable(budget, 17) == min(17, -(-rounds // 5) * 5)


def test_a_record_with_more_bands_than_rounds_between_claims_nothing():
    mechanism = separated("square_root", 5)
    release = Release.of(1, 0, mechanism, "digest", (0,))
    assert isinstance(replace(release, bands=6).event(), dp_accounting.NonPrivateDpEvent)
    dense = Release.of(17, 0, separated("blt", 2), "digest", (1,))
    assert not isinstance(dense.event(), dp_accounting.NonPrivateDpEvent)
    assert isinstance(replace(dense, round=18).event(), dp_accounting.NonPrivateDpEvent)
    # Without its numbers C would be the identity, which is the cheapest of all.
    blt = replace(dense, factorization="blt", parameters=None)
    assert isinstance(blt.event(), dp_accounting.NonPrivateDpEvent)


def forged(folder, mechanism: CorrelatedMechanism, changed: dict, start: int = 1):
    """A ledger whose hashes fit, and whose lines from round `start` on say something else."""
    releases = recorded(mechanism, folder)
    header = Header("print", 1000, DELTA, mechanism.adjacency.value, **mechanism.header)
    ledger = Ledger.create(folder / "forged.jsonl", header)
    for release in releases:
        told = {name: said(release) if callable(said) else said for name, said in changed.items()}
        line = replace(release, **told) if release.round >= start else release
        ledger._write({"kind": "release", **_fields(line)})  # as nobody who appends can
    return folder / "forged.jsonl"


BLT, BISR, BANDS_OF_5 = ("blt", 2), ("bisr", 4), ("optimized", 3)
FORGED = {
    "amplified": (BLT, {"sampling": "poisson", "separation": None}, "no proof with poisson"),
    "amplified apart": (BANDS_OF_5, {"sampling": "poisson"}, "no groups of users that fit"),
    "fixed": (BANDS_OF_5, {"sampling": "fixed_size"}, "no proof with fixed_size"),
    "apart": (BANDS_OF_5, {"separation": None}, "no groups of users that fit"),
    "groups of their own": (BLT, {"group": lambda release: release.round}, "the groups in turn"),
    "no group": (BLT, {"group": None}, "the groups in turn"),
    "round 0": (BANDS_OF_5, {"round": 0, "group": 4}, "the groups in turn"),
    "too many groups": (
        BLT,
        {"separation": 30, "group": lambda r: (r.round - 1) % 30},
        "one of 30",
    ),
    "counted": (BLT, {"counts": 1, "count_stddev": 1.0}, "says that others pay"),
    "no numbers": (BLT, {"parameters": None}, "no matrix"),
    "no horizon": (BISR, {"horizon": None}, "no matrix"),
    "too few": (BISR, {"parameters": (1.0, -0.5)}, "no matrix"),
    "not finite": (BLT, {"parameters": (math.nan, 0.5, 0.1, 0.1)}, "no matrix"),
    "singular": (BISR, {"parameters": (0.0, 1.0, 1.0, 1.0)}, "no matrix"),
    "growing": (BLT, {"parameters": (1e200, 0.5, 0.1, 0.1)}, "no matrix"),
    "long": (BANDS_OF_5, {"parameters": (0.9, 0.5, 0.2)}, "no matrix"),
    "many": (BANDS_OF_5, {"parameters": (0.5,) * 4}, "no matrix"),
}
#: What none of the lines may say that come later.
CHANGED = {
    "parameters": (BLT, {"parameters": (0.5, 0.5, 1.0, 1.0)}),
    "bands' parameters": (BANDS_OF_5, {"parameters": (0.8, 0.6)}),
    "horizon": (BLT, {"horizon": 600}),
    "factorization": (BANDS_OF_5, {"factorization": None, "parameters": None}),
    "bands": (BANDS_OF_5, {"bands": 4}),
    "groups": (BISR, {"separation": 6, "group": lambda release: (release.round - 1) % 6}),
    "sampling": (("square_root", 5), {"sampling": "poisson", "separation": None}),
    "noise": (BLT, {"stddev": 2 * Z * BOUND, "noise_multiplier": 2 * Z}),
    "bound": (BLT, {"bound": BOUND / 2, "sensitivity": BOUND / 2, "noise_multiplier": 2 * Z}),
}


@pytest.mark.parametrize(("made", "changed", "reason"), FORGED.values(), ids=FORGED)
def test_a_ledger_of_correlated_noise_that_no_proof_covers_is_refused(
    made, changed, reason, tmp_path
):
    with pytest.raises(InputError, match=reason) as told:
        read_ledger(forged(tmp_path, separated(*made), changed))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("made", "changed"), CHANGED.values(), ids=CHANGED)
def test_a_ledger_whose_noise_is_made_in_two_ways_is_refused(made, changed, tmp_path):
    with pytest.raises(InputError, match=r"round 6 has other .* than the run began with"):
        read_ledger(forged(tmp_path, separated(*made), changed, start=6))


def test_a_run_cannot_go_on_with_another_matrix(tmp_path):
    mechanism = separated(*BLT)
    recorded(mechanism, tmp_path, rounds=5)
    ledger = Ledger.open(tmp_path / "ledger.jsonl")
    other = replace(mechanism, begun_with=Buffered((0.9, 0.5, 0.3, 0.2), 17))
    with pytest.raises(InputError, match=r"round 6 has other .* the kind of machine"):
        ledger.append(Release.of(6, 0, other, "digest", (0,)))
    ledger.append(Release.of(6, 0, mechanism, "digest", (0,)))


def test_last_bits_and_bands_that_nobody_wrote_down_are_no_reason_to_refuse_a_ledger(tmp_path):
    """Other machines' logarithms, and ledgers of versions that recorded dense matrices alone."""

    def nudged(release):
        return tuple(math.nextafter(number, 2) for number in release.parameters)

    (tmp_path / "dense").mkdir()
    path = forged(tmp_path / "dense", separated(*BLT), {"parameters": nudged}, start=6)
    assert len(read_ledger(path).releases) == 17
    path = forged(tmp_path, separated(*BANDS_OF_5), {"parameters": None})
    assert len(read_ledger(path).releases) == 17


def test_a_ledger_whose_header_is_of_another_mechanism_is_refused(tmp_path):
    """Groups pay for correlated noise, and all users for independent noise, by the header alone."""
    independent = CentralMechanism(PoissonSampling(1000, 50.0), GAUSSIAN)
    for name, mechanism, said in (
        ("groups", independent, CorrelatedMechanism),
        ("all", correlated(3), CentralMechanism),
    ):
        header = Header("print", 1000, DELTA, "add_or_remove_one", **said.header)
        ledger = Ledger.create(tmp_path / f"{name}.jsonl", header)
        payers = mechanism.payers(1, np.zeros(0))
        ledger.append(Release.of(1, 0, mechanism, "digest", payers))
        with pytest.raises(
            InputError, match=r"round 1 is of mechanism .*the header says mechanism"
        ):
            read_ledger(tmp_path / f"{name}.jsonl")


def test_a_group_pays_for_nothing_but_correlated_noise(tmp_path):
    header = Header("print", 1000, DELTA, "add_or_remove_one")
    ledger = Ledger.create(tmp_path / "ledger.jsonl", header)
    release = Release.of(1, 0, CentralMechanism(PoissonSampling(1000, 50.0), GAUSSIAN), "digest")
    for round_ in (1, 2):
        line = _fields(replace(release, round=round_)) | {"group": round_}
        ledger._write({"kind": "release", **line})
    with pytest.raises(InputError, match="round 1 has a group that pays"):
        read_ledger(tmp_path / "ledger.jsonl")

    header = replace(header, **LocalMechanism.header)
    ledger = Ledger.create(tmp_path / "users.jsonl", header)
    line = _fields(Release.of(1, 0, correlated(3), "digest", (0,))) | {"users": (3,)}
    ledger._write({"kind": "release", **line})
    with pytest.raises(InputError, match="says that others pay"):
        read_ledger(tmp_path / "users.jsonl")


def test_buffers_and_bands_that_have_no_proof_are_refused():
    with pytest.raises(ValueError, match="6 bands are more than the 5 rounds"):
        separated("optimized", 6)
    for dense in ("bisr", "blt"):
        with pytest.raises(ValueError, match="no proof with poisson sampling"):
            CorrelatedMechanism(PoissonSampling(100, 5.0), GAUSSIAN, 2, (), dense, PLANNED)


@pytest.mark.parametrize(("factorization", "bands"), [("bisr", 3), ("blt", 2), ("optimized", 4)])
def test_noise_is_made_again_whatever_the_factorisation(factorization, bands):
    mechanism = separated(factorization, bands)
    source = mechanism.noise([50], SOURCE, lambda r: int(r == 4))
    whole = [source.draw(r, int(r == 4), GAUSSIAN) for r in range(1, 10)]
    for round_ in (1, 3, 4, 5, 9):
        anew = mechanism.noise([50], SOURCE, lambda r: int(r == 4))
        assert anew.draw(round_, int(round_ == 4), GAUSSIAN).equal(whole[round_ - 1])
    inverse = np.linalg.inv(toeplitz(mechanism.matrix.column(6), np.zeros(6)))
    fresh = np.array(
        [SOURCE.numpy(Purpose.NOISE, r, int(r == 4)).standard_normal(50) for r in range(4, 10)]
    )
    np.testing.assert_allclose(torch.stack(whole[3:]), inverse @ fresh * Z * BOUND, atol=1e-12)


ROUNDS, BANDS, RATE, SIGMA = 4, 2, 0.4, 1.3
#: What the user who is compared sends in a round if drawn, by what was released before.
USERS = {
    "always the same": lambda past: 1.0,
    "turns around": lambda past: (-1.0) ** len(past),
    "follows": lambda past: np.tanh(2 * past[-1]) if past else 1.0,
    "flees": lambda past: -np.tanh(2 * past[-1]) if past else 1.0,
    "remembers": lambda past: np.tanh(sum(past)) if past else 1.0,
}
#: What all others send.
OTHERS = {
    "nothing": lambda past: 0.0,
    "follow": lambda past: 1.5 * np.tanh(past[-1]) if past else 0.3,
    "flee": lambda past: -1.5 * np.tanh(sum(past)) if past else -0.3,
}


def densities(user, others, size=1.0, step=0.95):
    """Of y_1..y_4 with the user, in rounds 1 and 3, and without: on a grid, and the cell's size.

    Straight from the covariance: nothing here knows of Cy, of blocks or of groups.
    """
    axis = np.arange(-12, 13) * step
    past = list(np.meshgrid(*[axis] * ROUNDS, indexing="ij", sparse=True))
    inverse = np.linalg.inv(matrix(BANDS, ROUNDS))
    precision = np.linalg.inv(SIGMA**2 * inverse @ inverse.T)
    scale = math.sqrt(np.linalg.det(precision) / (2 * math.pi) ** ROUNDS)

    def density(bits):
        left = [past[t] - others(past[:t]) - bits[t] * size * user(past[:t]) for t in range(ROUNDS)]
        form = sum(
            precision[i, j] * left[i] * left[j] for i in range(ROUNDS) for j in range(ROUNDS)
        )
        return scale * np.exp(-form / 2)

    drawn = [(a, 0, b, 0) for a in (0, 1) for b in (0, 1)]
    weights = [RATE ** sum(bits) * (1 - RATE) ** (2 - sum(bits)) for bits in drawn]
    mixed = sum(weight * density(bits) for weight, bits in zip(weights, drawn, strict=True))
    return mixed, density((0, 0, 0, 0)), step**ROUNDS


def renyi(one, other, cell, order):
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        terms = np.where(one > 0, one * (one / other) ** (order - 1), 0.0)
    return math.log(np.nansum(terms) * cell) / (order - 1)


EVENT = dp_accounting.PoissonSampledDpEvent(RATE, dp_accounting.GaussianDpEvent(SIGMA))


def charged_renyi(order):
    accountant = Reference(orders=[order])
    return float(accountant.compose(EVENT, 2).rdp[0])


@pytest.mark.parametrize("others", OTHERS)
def test_nobody_leaks_more_than_is_charged_by_exact_densities(others):
    pld = PldAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    pld.compose(EVENT, 2)
    worst = 0.0
    for user in USERS.values():
        present, absent, cell = densities(user, OTHERS[others])
        assert present.sum() * cell == pytest.approx(1, abs=1e-6)
        for order in (2, 3):
            for one, other in ((present, absent), (absent, present)):
                leaked = renyi(one, other, cell, order) / charged_renyi(order)
                assert leaked < 1 + 1e-4
                worst = max(worst, leaked)
        for epsilon in (0.3, 1.0):
            for one, other in ((present, absent), (absent, present)):
                leaked = np.maximum(one - math.exp(epsilon) * other, 0).sum() * cell
                assert leaked < 1.02 * pld.delta(epsilon) + 1e-6
    assert worst > 0.999


def test_a_contribution_that_is_too_large_leaks_more():
    present, absent, cell = densities(USERS["always the same"], OTHERS["follow"], size=1.1)
    assert renyi(present, absent, cell, 2) > 1.1 * charged_renyi(2)


# ---------------------------------------------------------------- measured from outside


def bound_from_canaries(mechanism: CorrelatedMechanism, seed: int, noise: float = 1.0) -> float:
    """Of 600 canaries, each in a coordinate of its own and in or out by coin, all rounds seen.

    The attacker whitens what is released, and adds up what a canary would have left there.
    """
    canaries, rounds = 600, 17
    generator = np.random.default_rng(seed)
    included = generator.integers(0, 2, canaries).astype(bool)
    groups = np.array([group_of(f"canary {k}", mechanism.groups) for k in range(canaries)])
    source = mechanism.noise([canaries], Randomness.simulation(seed, "audit"), lambda _: 0)
    released = np.array([source.draw(r, 0, mechanism.gaussian).numpy() for r in range(1, 18)])
    released *= noise
    takes_part = (np.arange(rounds)[:, None] % mechanism.groups) == groups
    released += BOUND * takes_part * included
    c = toeplitz(mechanism.matrix.column(rounds), np.zeros(rounds))
    scores = ((c @ takes_part) * (c @ released)).sum(0)
    return one_run_bound(scores, included, 1e-5).epsilon


@pytest.mark.parametrize(("factorization", "bands"), [("optimized", 5), ("bisr", 3), ("blt", 2)])
def test_canaries_show_less_than_is_charged_in_20_of_20_seeds(factorization, bands):
    mechanism = separated(factorization, bands, z=4.0)
    spent = mechanism._squared_sensitivity(17)
    epsilon = dp_accounting.get_epsilon_gaussian(4.0 / math.sqrt(spent), 1e-5)
    found = [bound_from_canaries(mechanism, seed) for seed in range(20)]
    assert max(found) < epsilon
    assert np.mean(found) > 0.15 * epsilon  # they show something
    # A tenth of the noise is refuted.
    assert bound_from_canaries(mechanism, 1, noise=0.1) > epsilon


# ---------------------------------------------------------------- what has no proof


@pytest.mark.parametrize(
    "sampling", [FixedSizeSampling(100, 10), FullParticipation(100)], ids=["fixed size", "all"]
)
def test_other_samplings_are_refused(sampling):
    with pytest.raises(ValueError, match="no proof with"):
        CorrelatedMechanism(sampling, GAUSSIAN, 2, ())


def test_groups_that_are_too_small_and_counts_are_refused():
    with pytest.raises(ValueError, match="at most the population of 100"):
        correlated(3, population=100, cohort=40.0)
    counted = GaussianMechanism(Z, GlobalClipping(BOUND), CountNoise(1, 5.0))
    with pytest.raises(ValueError, match="where bounds adapt"):
        correlated(2, gaussian=counted)
