"""Numbers in words."""

import pytest

from fedpriv.reporting.wording import duration, percent_up, round_ranges, rounded_up


@pytest.mark.parametrize(
    ("value", "shown"),
    [(7.0, "7.000"), (7.0000004, "7.001"), (7.9999997, "8.000"), (1234.5, "1,234.500")],
)
def test_privacy_figures_are_never_rounded_down(value: float, shown: str) -> None:
    assert rounded_up(value) == shown


def test_huge_figures_stay_readable() -> None:
    assert rounded_up(1.2e16) == "1.2e+16"


def test_shares_are_rounded_up_and_at_most_all() -> None:
    assert [percent_up(x) for x in (0.00123, 0.3211, 1.0)] == ["0.13%", "32.2%", "100.0%"]


def test_rounds_are_written_as_ranges() -> None:
    assert round_ranges([3, 1, 2, 5, 5, 7, 8]) == "1–3, 5, 7–8"


def test_durations() -> None:
    assert [duration(s) for s in (4.25, 200, 7500)] == ["4.2 s", "3 min 20 s", "2 h 5 min"]
