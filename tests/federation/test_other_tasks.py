"""Whole runs of tasks other than those of images and speech, in this process."""

import math
from pathlib import Path

import pytest
from in_process import SMALL, train_small

from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import write_report

OUTSIDE = str(Path(__file__).parent.parent / "outside")
GPT = {"name": "gpt", "dim": 16, "depth": 1, "heads": 2}


@pytest.mark.parametrize(
    ("name", "model", "key", "shown"),
    [
        ("brightness:pictures", SMALL["model"], "rmse", "root mean squared error"),
        ("letters:alphabets", GPT, "perplexity", "perplexity"),
    ],
)
def test_a_run_measures_its_own_quality_and_reports_it(tmp_path, name, model, key, shown):
    changes = {
        "code": OUTSIDE,
        "data": {"name": name, "users": 40},
        "model": model,
        "rounds": 12,
        "privacy__noise_multiplier": 0.01,
        "privacy__clipping__bound": 1.0,
        "local__lr": 0.1 if key == "rmse" else 0.5,
    }
    directory, prepared = train_small(tmp_path / "run", **changes)
    run = read_run(directory.path)
    measured = run.measured
    assert measured.quality == prepared.trainer.task.quality
    assert measured.quality.key == key
    assert math.isfinite(measured.final)
    assert measured.final < measured.values[0]
    text = write_report([directory.path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Held-out {shown}" in text
    assert "accuracy by round" not in text
