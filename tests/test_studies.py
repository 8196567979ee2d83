"""The studies: what was measured can be drawn, and one of them is measured again, in small."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt

SIMULATIONS = Path(__file__).parents[1] / "simulations"
STUDIES = [
    script.stem
    for script in sorted(SIMULATIONS.glob("*.py"))
    if "study.run(" in script.read_text(encoding="utf-8")
]


@pytest.fixture
def imported(monkeypatch):
    monkeypatch.syspath_prepend(str(SIMULATIONS))
    return importlib.import_module


def test_every_study_has_results():
    folders = {path.parent.name for path in SIMULATIONS.glob("results/*/results.csv")}
    assert len(STUDIES) > 5
    assert set(STUDIES) <= folders


@pytest.mark.parametrize("name", STUDIES)
def test_what_was_measured_can_be_drawn(imported, name):
    study, script = imported("study"), imported(name)
    results = pd.read_csv(study.results_of(name))
    assert len(script.table(results)) > 1
    plotted = script.figure(results)
    labelled = [text for axes in plotted.axes for text in axes.get_legend_handles_labels()[1]]
    assert labelled
    plt.close(plotted)


def test_the_engines_benchmark_compares_what_vmap_runs_and_says_what_it_does_not():
    script = SIMULATIONS / "benchmarks" / "models_of_others.py"
    told = subprocess.run(
        [sys.executable, script, "cnn-4k", "cnn-300k", "--turns", "1", "--stack", "8"],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert told.returncode == 0, told.stderr
    stacked, alone = told.stdout.splitlines()
    assert re.match(r"cnn-4k: 3,706 parameters; .* together: \d+\.\d\d .*run by vmap", stacked)
    assert alone.startswith("cnn-300k: trained one by one: the convolutions")


def test_a_study_measures_the_table_that_is_there(imported, monkeypatch, tmp_path):
    study, script = imported("study"), imported("clipping_and_optimizer")
    there = pd.read_csv(study.results_of(script.__name__)).query("optimizer == 'adam'")
    load = script.fedpriv.Experiment.load
    small = {"rounds": 1, "data.users": 40, "privacy.sampling.expected_cohort": 20}
    small |= {"privacy.delta": 1e-3, "privacy.accountants": ["rdp"]}
    monkeypatch.setattr(
        script.fedpriv.Experiment,
        "load",
        lambda path, changes, **sections: load(path, {**changes, **small}, **sections),
    )
    monkeypatch.setattr(script, "STYLES", {"adam": script.STYLES["adam"]})
    monkeypatch.setitem(script.CLIPPING, "no privacy", {"privacy": None, "cohort": 20})
    monkeypatch.setattr(study, "results_of", lambda name: tmp_path / name / "results.csv")
    monkeypatch.setattr(sys, "argv", [script.__name__])
    monkeypatch.chdir(tmp_path)
    study.run(script.__file__, script.measure, script.figure, script.table)
    found = pd.read_csv(tmp_path / script.__name__ / "results.csv")
    assert list(found.columns) == list(there.columns)
    keys = ["clipping", "optimizer", "seed"]
    assert found[keys].to_numpy().tolist() == there[keys].to_numpy().tolist()
    assert (tmp_path / script.__name__ / "figure.png").exists()
