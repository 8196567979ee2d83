"""The Opacus script, as it stands and with its optimizer line exchanged."""

import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "simulations" / "opacus_script.py"


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:opacus", "ignore:Full backward hook")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script for an epoch, and return accuracy, ε and the name of its accounting."""

    def run_(script: Path) -> tuple[float, float, str]:
        monkeypatch.setattr(sys, "argv", [str(script), "1"])
        runpy.run_path(str(script), run_name="__main__")
        printed = capsys.readouterr().out
        pattern = r"accuracy (\S+), ε = (\S+) at δ = 1e-4 by the accounting (.+)\n"
        found = re.fullmatch(pattern, printed)
        assert found, printed
        return float(found[1]), float(found[2]), found[3]

    return run_


def test_one_line_is_the_difference_between_dp_sgd_and_dice_sgd(tmp_path, run):
    dice = SCRIPT.read_text().splitlines()
    line, other = (
        next(i for i, text in enumerate(dice) if text.startswith(start))
        for start in ("    optimizer = DiceSGD.", "    # optimizer = dp_sgd")
    )
    assert other == line + 1
    plain = [*dice[:line], dice[other].replace("# ", ""), *dice[other + 1 :]]
    dp_sgd = tmp_path / "dp_sgd.py"
    dp_sgd.write_text("\n".join(plain))
    (_, spent, name), (_, less, plain_name) = run(SCRIPT), run(dp_sgd)
    assert name == "DiceSGD, provable (rdp)"
    assert plain_name == "rdp"
    assert 0 < less < spent  # the same noise costs more where the memory must be hidden too
