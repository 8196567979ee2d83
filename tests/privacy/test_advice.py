"""Every command warns of the same δ and the same ε."""

import pytest

from fedpriv.privacy.advice import delta_advice, epsilon_advice


@pytest.mark.parametrize("delta", [1e-3, 1 / 750, 0.5])
def test_a_delta_near_one_over_the_population_is_warned_of(delta: float) -> None:
    said = delta_advice(delta, 750)
    assert said is not None
    assert ("a run refuses it" in said) == (delta >= 1 / 750)


def test_a_delta_well_below_it_is_not() -> None:
    assert delta_advice(1e-4, 750) is None
    assert delta_advice(0.1 / 750, 750) is None
    assert "write at most 0.0001" in (delta_advice(0.11 / 750, 750) or "")


def test_an_epsilon_above_ten_is_warned_of() -> None:
    assert [epsilon_advice(value) for value in (0.1, 10.0, float("inf"))] == [None] * 3
    assert "ε = 118.001 is above 10" in (epsilon_advice(118.0001) or "")
