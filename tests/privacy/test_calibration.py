import dp_accounting
import pytest

from fedpriv.privacy import (
    FixedSizeSampling,
    FullParticipation,
    GaussianMechanism,
    GlobalClipping,
    PoissonSampling,
    RdpAccountant,
    affordable_rounds,
    noise_multiplier_for,
)


@pytest.mark.parametrize(
    "sampling", [PoissonSampling(750, 370.0), FixedSizeSampling(750, 50), FullParticipation(750)]
)
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_calibrated_noise_meets_the_target_and_wastes_nothing(sampling, epsilon):
    def event_at(z: float) -> dp_accounting.DpEvent:
        return sampling.event(GaussianMechanism(z, GlobalClipping(0.1)))

    def spent(z: float) -> float:
        accountant = RdpAccountant(sampling.adjacency)
        accountant.compose(event_at(z), 60)
        return accountant.epsilon(1e-3)

    z = noise_multiplier_for(epsilon, 1e-3, 60, sampling.adjacency, event_at)
    assert spent(z) <= epsilon
    assert spent(z - 1e-5) > epsilon


def test_affordable_rounds_is_the_last_round_within_the_budget():
    sampling = PoissonSampling(1000, 100.0)
    event = sampling.event(GaussianMechanism(1.0, GlobalClipping(1.0)))
    one_by_one = RdpAccountant(sampling.adjacency)
    count = 0
    while one_by_one.epsilon_after(event, 1e-5) <= 3.0:
        one_by_one.compose(event)
        count += 1
    assert affordable_rounds(event, sampling.adjacency, 3.0, 1e-5, 1000) == count
    assert affordable_rounds(event, sampling.adjacency, 3.0, 1e-5, 2) == 2
    assert affordable_rounds(event, sampling.adjacency, 1e-3, 1e-5, 1000) == 0


def test_a_target_that_no_noise_reaches_is_said():
    sampling = PoissonSampling(100, 10.0)
    with pytest.raises(ValueError, match="no noise multiplier reaches"):
        noise_multiplier_for(
            1.0, 1e-5, 10, sampling.adjacency, lambda z: dp_accounting.NonPrivateDpEvent()
        )
