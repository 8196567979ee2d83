import numpy as np
import pytest
import torch
from scipy import stats

from fedpriv.privacy import GaussianMechanism, GlobalClipping, Purpose, Randomness, Unclipped


def test_noise_is_gaussian_with_standard_deviation_z_times_the_bound():
    mechanism = GaussianMechanism(1.5, GlobalClipping(0.2))
    total = torch.full((200_000,), 7.0, dtype=torch.float64)
    noise = (mechanism.release(total, np.random.default_rng(0)) - total).numpy()
    assert mechanism.stddev == pytest.approx(0.3)
    assert stats.kstest(noise, "norm", args=(0, 0.3)).pvalue > 1e-3


def test_without_noise_the_sum_is_released_as_it_is():
    total = torch.arange(5, dtype=torch.float64)
    for clipping in (GlobalClipping(1.0), Unclipped()):
        assert (
            GaussianMechanism(0.0, clipping).release(total, np.random.default_rng(0)).equal(total)
        )


def test_each_purpose_round_and_attempt_has_noise_of_its_own():
    randomness = Randomness.simulation(3)
    draws = {
        path: randomness.numpy(purpose, *path[1:]).standard_normal()
        for purpose in Purpose
        for path in [(purpose, 1, 0), (purpose, 2, 0), (purpose, 1, 1), (purpose, 1)]
    }
    assert len(set(draws.values())) == len(draws)
    again = Randomness.simulation(3).numpy(Purpose.NOISE, 1, 0).standard_normal()
    assert again == draws[(Purpose.NOISE, 1, 0)]


def test_the_root_of_a_deployment_is_fresh_and_never_shown():
    one, two = Randomness.operating_system(), Randomness.operating_system()
    assert one.root != two.root
    assert str(one.root) not in repr(one)
