import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedpriv.privacy import (
    AdaptiveBounds,
    CountNoise,
    GaussianMechanism,
    GlobalClipping,
    PerLayerClipping,
    Purpose,
    Randomness,
    Unclipped,
    randomness,
)


def test_noise_is_gaussian_with_standard_deviation_z_times_the_bound():
    mechanism = GaussianMechanism(1.5, GlobalClipping(0.2))
    total = torch.full((200_000,), 7.0, dtype=torch.float64)
    noise = (mechanism.release(total, [200_000], np.random.default_rng(0)) - total).numpy()
    assert mechanism.stddev == pytest.approx(0.3)
    assert stats.kstest(noise, "norm", args=(0, 0.3)).pvalue > 1e-3


def test_without_noise_the_sum_is_released_as_it_is():
    total = torch.arange(5, dtype=torch.float64)
    for clipping in (GlobalClipping(1.0), Unclipped()):
        released = GaussianMechanism(0.0, clipping).release(total, [5], np.random.default_rng(0))
        assert released.equal(total)


def test_each_purpose_round_and_attempt_has_noise_of_its_own():
    source = Randomness.simulation(3)
    draws = {
        path: source.numpy(purpose, *path[1:]).standard_normal()
        for purpose in Purpose
        for path in [(purpose, 1, 0), (purpose, 2, 0), (purpose, 1, 1), (purpose, 1)]
    }
    assert len(set(draws.values())) == len(draws)
    again = Randomness.simulation(3).numpy(Purpose.NOISE, 1, 0).standard_normal()
    assert again == draws[(Purpose.NOISE, 1, 0)]


@pytest.mark.parametrize("processors", [None, 1, 3, 64])
def test_noise_in_pieces_is_the_same_on_every_machine(monkeypatch, processors):
    monkeypatch.setattr(randomness.os, "cpu_count", lambda: processors)
    monkeypatch.setattr(randomness, "_PIECE", 1_000)
    found = randomness.standard_normal(2_500, np.random.default_rng(5))
    seed = np.random.SeedSequence(np.random.default_rng(5).integers(2**32, size=8).tolist())
    alone = [np.random.default_rng(own).standard_normal(1_000) for own in seed.spawn(3)]
    np.testing.assert_array_equal(found, np.concatenate(alone)[:2_500])
    few = randomness.standard_normal(1_000, np.random.default_rng(5))
    np.testing.assert_array_equal(few, np.random.default_rng(5).standard_normal(1_000))


def test_no_piece_of_noise_is_what_another_generator_draws():
    source = Randomness.simulation(3)
    pieces = randomness.standard_normal(2**20, source.numpy(Purpose.NOISE, 1, 0)).reshape(2, -1)
    for path in [(1, 0), (1, 0, 0), (1, 0, 1), (1,)]:
        other = source.numpy(Purpose.NOISE, *path).standard_normal(2**19)
        assert np.abs(pieces @ other).max() / math.sqrt(2**19) < 5


def test_pieces_of_noise_and_draws_one_after_another_are_independent():
    generator = np.random.default_rng(0)
    draws = [randomness.standard_normal(3 * 2**19, generator) for _ in range(2)]
    assert all(stats.kstest(drawn, "norm").pvalue > 1e-3 for drawn in draws)
    pieces = np.stack(draws).reshape(6, -1)
    between = np.corrcoef(pieces) - np.eye(6)
    assert np.abs(between).max() * math.sqrt(pieces.shape[1]) < 5


def test_the_root_of_a_deployment_is_fresh_and_never_shown():
    one, two = Randomness.operating_system(), Randomness.operating_system()
    assert one.root != two.root
    assert str(one.root) not in repr(one)


def test_per_block_noise_is_in_proportion_to_each_bound_at_the_same_cost():
    bounds = (0.3, 0.4, 1.2)
    clipping = PerLayerClipping(1.3, bounds)
    mechanism = GaussianMechanism(2.0, clipping, per_block=True)
    stddevs = mechanism.block_stddevs(3)
    multipliers = [s / c for s, c in zip(stddevs, bounds, strict=True)]
    assert multipliers == pytest.approx([2.0 * math.sqrt(3)] * 3)
    # The multiplier of the whole: 1/z^2 is the sum of the blocks' 1/z_h^2.
    assert sum(m**-2 for m in multipliers) ** -0.5 == pytest.approx(2.0)
    sizes = [50_000, 70_000, 60_000]
    noise = mechanism.release(
        torch.zeros(sum(sizes), dtype=torch.float64), sizes, np.random.default_rng(1)
    )
    for block, stddev in zip(noise.split(sizes), stddevs, strict=True):
        assert stats.kstest(block.numpy(), "norm", args=(0, stddev)).pvalue > 1e-3


def test_per_block_noise_needs_a_bound_on_every_block():
    for clipping in (GlobalClipping(1.0), PerLayerClipping(1.0, (0.6, 0.8), normalize=True)):
        with pytest.raises(ValueError, match="per-block noise needs"):
            GaussianMechanism(1.0, clipping, per_block=True)


@pytest.mark.parametrize("counts", [1, 7])
def test_the_noise_of_counts_is_charged_to_the_whole(counts):
    """Andrew et al. 2021, theorem 1: z_Δ = (z^-2 - (2σ_b)^-2)^(-1/2), here for several counts."""
    noise = CountNoise(counts, 5.0)
    mechanism = GaussianMechanism(1.5, GlobalClipping(0.2), noise)
    assert mechanism.update_multiplier == pytest.approx((1.5**-2 - counts / 100) ** -0.5)
    # The joint sensitivity over the joint noise: a user moves the sum by C and each count by 1/2.
    worst = math.hypot(0.2 / mechanism.stddev, *[0.5 / 5.0] * counts)
    assert 1 / worst == pytest.approx(1.5)
    total = torch.zeros(40_000 + counts, dtype=torch.float64)
    draws = torch.stack(
        [mechanism.release(total, [40_000], np.random.default_rng(s))[-counts:] for s in range(300)]
    )
    assert float(draws.std()) == pytest.approx(5.0, rel=0.1)


def test_counts_that_cost_more_than_the_whole_are_refused():
    with pytest.raises(ValueError, match="must be above 1"):
        GaussianMechanism(2.0, GlobalClipping(1.0), CountNoise(1, 1.0))


def test_bounds_move_towards_the_quantile():
    adaptive = AdaptiveBounds(quantile=0.5, lr=0.2)
    assert adaptive.next([1.0, 2.0], [0.5, 0.5]) == (1.0, 2.0)
    up, down = adaptive.next([1.0, 1.0], [0.0, 1.0])
    assert (up, down) == (pytest.approx(math.exp(0.1)), pytest.approx(math.exp(-0.1)))
    bound = 1e-3
    norms = np.random.default_rng(0).lognormal(0.0, 1.0, 10_000)
    for _ in range(200):
        (bound,) = adaptive.next([bound], [float((norms <= bound).mean())])
    assert bound == pytest.approx(float(np.median(norms)), rel=0.02)
    assert adaptive.next([1e-20], [1.0]) == (1e-20,)
    assert adaptive.next([1.0], [-1e9]) == (pytest.approx(math.exp(10)),)
