"""Reading runs: nothing is written, and what is wrong is said in one line."""

from pathlib import Path

import pytest

from fedpriv.errors import InputError
from fedpriv.reporting.reader import read_run, run_labels


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        read_run(tmp_path / "nowhere")


def test_a_run_without_a_finished_round_is_refused(make_run) -> None:
    path = make_run()
    (path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="no finished round"):
        read_run(path)


def test_a_missing_ledger_is_refused(make_run) -> None:
    path = make_run()
    (path / "ledger.jsonl").unlink()
    with pytest.raises(InputError, match=r"ledger\.jsonl: cannot read"):
        read_run(path)


def test_an_edited_ledger_is_refused(make_run) -> None:
    path = make_run()
    ledger = path / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"round": 3', '"round": 4'))
    with pytest.raises(InputError, match="line 4: edited"):
        read_run(path)


def test_reading_leaves_a_torn_ledger_as_it_is(make_run) -> None:
    path = make_run()
    ledger = path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes() + b'{"kind": "rel')
    before = ledger.read_bytes()
    assert len(read_run(path).releases) == 6
    assert ledger.read_bytes() == before


def test_word_error_rate_is_preferred(make_run) -> None:
    path = make_run()
    metrics = path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"accuracy": ', '"wer": '))
    measured = read_run(path).measured
    assert measured.quality.name == "word error rate"
    assert measured.rounds == (2, 4, 6)


def test_runs_of_one_name_are_told_apart(make_run) -> None:
    runs = [read_run(make_run("a")), read_run(make_run("b"))]
    assert run_labels(runs) == ["tiny · a", "tiny · b"]
    assert run_labels(runs[:1]) == ["tiny"]
