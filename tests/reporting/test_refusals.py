"""The page of refused pairs is what the code says today."""

from pathlib import Path

from typer.testing import CliRunner

from fedpriv.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "refusals.md"


def test_the_page_is_current():
    made = CliRunner().invoke(app, ["methods", "--pairs"]).stdout
    assert made == PAGE.read_text(encoding="utf-8"), "fedpriv methods --pairs > docs/refusals.md"
    for pair in (
        "| algorithm: scaffold | mechanism: correlated | algorithm.name: scaffold has no proof",
        "| noise_by: users | error_feedback: user |",
    ):
        assert pair in made
    assert "algorithm: fedavg_m | clipping: adaptive" not in made
