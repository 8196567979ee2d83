"""The sentence with which a run ends."""

import json
import re

import pytest
from typer.testing import CliRunner

from fedpriv.cli import app
from fedpriv.reporting.conclusion import conclusion
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import spent


def said(path) -> str:
    run = read_run(path)
    return conclusion(run, spent(run))


def test_it_says_how_good_and_what_it_cost(make_run) -> None:
    path = make_run()
    epsilon = spent(read_run(path)).epsilons["pld"]
    (shown,) = re.findall(r"at ε = (\d\.\d{3}) \(PLD\)", said(path))
    assert 0 <= float(shown) - epsilon < 1e-3
    assert said(path).startswith("tiny: accuracy 80.0% at ε = ")
    assert said(path).endswith("δ = 1e-05 (simulation with a known seed)")
    assert said(make_run("d", runtime={"deployment": True})).endswith("δ = 1e-05")


def test_what_is_not_promised_is_not_said(make_run) -> None:
    assert said(make_run("plain", privacy=None)) == "tiny: accuracy 80.0% WITHOUT PRIVACY"
    path = make_run()
    metrics = path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"rdp": ', '"rdp": 9'))
    assert "CONTRADICT ITS LEDGER" in said(path)
    lines = (path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (path / "ledger.jsonl").write_text("".join(lines[:-1]))
    assert "Nothing can be claimed" in said(path)
    assert "ε" not in said(path)


def test_of_a_run_that_was_never_measured_it_says_so(make_run) -> None:
    path = make_run()
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        row.pop("held_out", None)
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said(path).startswith("tiny: not measured yet at ε = ")


@pytest.mark.parametrize("several", [False, True])
def test_a_report_on_one_run_ends_with_it_and_one_on_several_with_a_table(
    make_run, several, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal breaks a column's head over two lines
    paths = [make_run(), make_run("b")][: 1 + several]
    out = str(tmp_path / "report.html")
    done = CliRunner().invoke(app, ["report", *map(str, paths), "--output", out])
    assert done.exit_code == 0, done.output
    assert ("tiny: accuracy 80.0% at ε = " in done.stdout) != several
    assert ("held out" in done.stdout) == several
