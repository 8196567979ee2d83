"""Numbers in words."""

import pytest

from fedpriv.privacy.figures import epsilon_text, percent_up, rounded_up, significant_up
from fedpriv.reporting.wording import duration, round_ranges, spent_text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (7.0, "7.000"),
        (0.1, "0.100"),
        (6.954000000001, "6.955"),
        (7.0000004, "7.001"),
        (7.9999997, "8.000"),
        (1234.5, "1,234.500"),
    ],
)
def test_privacy_figures_are_never_rounded_down(value: float, shown: str) -> None:
    assert rounded_up(value) == shown


def test_huge_figures_stay_readable() -> None:
    assert rounded_up(1.20001e16) == "1.201e+16"
    assert significant_up(0.1, 2) == "1.0e-1"


def test_shares_are_rounded_up_and_at_most_all() -> None:
    assert [percent_up(x) for x in (0.00123, 0.3211, 1.0)] == ["0.13%", "32.2%", "100.0%"]


def test_rounds_are_written_as_ranges() -> None:
    assert round_ranges([3, 1, 2, 5, 5, 7, 8]) == "1–3, 5, 7–8"


def test_durations() -> None:
    assert [duration(s) for s in (4.25, 200, 7500)] == ["4.2 s", "3 min 20 s", "2 h 5 min"]


@pytest.mark.parametrize(
    ("epsilon", "shown"),
    [(None, "–"), (float("inf"), "none"), (6.9541, "6.955"), (12345.6, "1.235e+4"), (0.0, "0.000")],
)
def test_an_epsilon_is_printed_in_one_way(epsilon: float | None, shown: str) -> None:
    assert epsilon_text(epsilon) == shown


def test_a_round_says_the_smallest_epsilon_and_who_proves_it() -> None:
    row = {"epsilon": {"rdp": 7.0001, "pld": 6.9541}, "delta": 1e-4}
    assert spent_text(row) == "ε 6.955 by PLD, δ 0.0001"
    assert spent_text(row | {"epsilon": {"rdp": 7.0001}}) == "ε 7.001 by RDP, δ 0.0001"
    assert spent_text(row | {"epsilon": {"rdp": 7.0001, "pld": None}}) == "ε 7.001 by RDP, δ 0.0001"
    assert spent_text(row | {"epsilon": {"rdp": None}}) == "no privacy"
    silos = {"silos": {"worst": 7.0001, "median": 3.0001, "worst_silo": 1}}
    assert spent_text(row | silos) == (
        "ε of the worst silo 6.955 by PLD (RDP: 7.001, the median one 3.001), δ 0.0001"
    )
    assert spent_text(row | silos | {"epsilon": {"rdp": 7.0001}}) == (
        "ε of the worst silo 7.001 by RDP, of the median one 3.001 by RDP, δ 0.0001"
    )
