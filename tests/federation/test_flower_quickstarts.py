"""Apps of the shape of Flower's quickstarts: what making them private takes, and that it works."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
from flower_apps import QUICKSTARTS, run_quickstart

from fedpriv.api import Run
from fedpriv.privacy.ledger import read_ledger

APPS = ("tabular", "text", "vision")
SETTINGS = {"num_server_rounds": 2, "local_epochs": 1, "lr": 0.01}


def changed(app: str) -> tuple[list[str], list[str]]:
    """The lines of an app that are removed, and those that are added, to make it private."""
    removed, added = [], []
    for name in ("client_app.py", "server_app.py"):
        folder = QUICKSTARTS / app / f"{app}_app"
        before, after = (
            (folder / each).read_text().splitlines() for each in (f"plain_{name}", name)
        )
        for line in difflib.ndiff(before, after):
            if line[2:].strip() and line[:2] in ("- ", "+ "):
                (removed if line[0] == "-" else added).append(line[2:].strip())
    return removed, added


@pytest.mark.parametrize("app", APPS)
def test_two_lines_are_changed_and_two_imported(app):
    removed, added = changed(app)
    assert len(removed) == 2
    assert removed[0] == "app = ClientApp()"
    assert removed[1].startswith("strategy = Fed")
    assert sorted(line for line in added if "import" in line) == [
        "from fedpriv.flower import PrivateStrategy",
        "from fedpriv.flower import clipping_mod",
    ]
    # The strategy stays as it was, inside; what is said of privacy is the rest.
    assert removed[1].removeprefix("strategy = ") + "," in added
    assert len(added) == 14


@pytest.mark.parametrize("app", APPS)
def test_a_quickstart_trains_privately_and_says_what_it_costs(app, tmp_path, monkeypatch):
    monkeypatch.setattr("fedpriv.flower.strategy.write_report", lambda paths: "not written")
    folder = tmp_path / "run"
    run_quickstart(app, 40, run_dir=str(folder), model=str(tmp_path / "model"), **SETTINGS)
    run = Run.open(folder)
    assert 0 < run.epsilon("pld") <= run.epsilon("rdp")
    assert run.epsilon("pld") == pytest.approx(8.0, rel=1e-3)
    assert run.metrics["held_out.accuracy"].between(0, 1).all()
    releases = read_ledger(folder / "ledger.jsonl").releases
    assert [release.round for release in releases] == [1, 2]
    assert {release.population for release in releases} == {40}
    assert any(Path(tmp_path).glob("model*"))


@pytest.mark.parametrize("app", APPS)
def test_a_quickstart_ran_before(app, tmp_path):
    grid = run_quickstart(app, 4, plain=True, model=str(tmp_path / "model"), **SETTINGS)
    assert len(grid.get_node_ids()) == 4
    assert any(Path(tmp_path).glob("model*"))
