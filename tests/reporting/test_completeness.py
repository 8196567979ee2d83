"""A ledger that lost lines, beside whatever still shows what was finished."""

import io
import json
import shutil
from dataclasses import replace

import pytest
from in_process import train_small
from rich.console import Console

from fedpriv import experiment
from fedpriv.errors import InputError
from fedpriv.flower_app import LogLines
from fedpriv.privacy import Ledger
from fedpriv.reporting.ledgers import verify
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render, write_report
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import privacy_statement
from fedpriv.reporting.summary import summary_table


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four rounds; users keep memories, so that all that can show a round is there."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_small(folder, privacy__error_feedback={"kind": "user"})
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def cut(run, name, lines):
    kept = (run / name).read_bytes().splitlines(keepends=True)[:-lines]
    (run / name).write_bytes(b"".join(kept))


def remove(run, *names):
    for path in (run / name for name in names):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


WITNESSES = ("checkpoints", "memory", "metrics.jsonl")


def test_a_whole_run_is_complete(run):
    found = verify(run).opened
    assert found.missing == ()
    assert found.evidence.finished == {"checkpoints": 4, "memory": 4, "metrics.jsonl": 4}
    statement = privacy_statement(read_run(run), spent(read_run(run)))
    assert statement.alarms == ()
    assert "It charges every round that is finished" in json.dumps(statement.sections[-1].sentences)


@pytest.mark.parametrize("witness", WITNESSES)
def test_each_that_is_left_alone_shows_what_was_cut_off(run, witness):
    cut(run, "ledger.jsonl", 2)
    remove(run, *(name for name in WITNESSES if name != witness))
    with pytest.raises(InputError, match=rf"NOT COMPLETE.*round 3.*by {witness}") as error:
        verify(run)
    assert "\n" not in str(error.value)


def test_nothing_of_a_budget_is_won_by_cutting(run):
    """Not even where checkpoints, by which a run is resumed, are gone too."""
    cut(run, "ledger.jsonl", 2)
    remove(run, "checkpoints")
    directory, prepared = experiment.reopen(run)
    with pytest.raises(InputError, match="charges nothing for round 3"):
        experiment.train(prepared, directory, LogLines(), lambda _: None)
    assert len(directory.read_metrics()) == 4


def test_a_repeated_charge_that_was_cut_off_is_missed_too(run):
    """Its round is charged still; the checkpoint of the round after knows the line."""
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    directory, prepared = experiment.reopen(run)
    ledger = directory.open_ledger(prepared.header())
    ledger.append(replace(list(ledger)[-1], round=4))
    with pytest.raises(InputError, match=r"round-000004\.safetensors was written"):
        verify(run)


def test_every_report_says_it_first(run):
    for name in ("ledger.jsonl", "metrics.jsonl"):
        cut(run, name, 2)
    said = "lines are missing at its end"
    assert said in render([run], "md")
    assert "Nothing can be claimed" in render([run], "md")
    (document,) = json.loads(render([run], "json"))["runs"]
    assert said in document["disagreements"][0]
    assert said in render([run], "csv").splitlines()[1]
    assert said in write_report([run]).read_text()
    table = Console(file=io.StringIO(), width=200)
    table.print(summary_table([run]))
    assert "contradicts its ledger" in table.file.getvalue()


def test_metrics_that_were_cut_off_alone_are_missed(run):
    cut(run, "metrics.jsonl", 2)
    with pytest.raises(InputError, match=r"metrics\.jsonl lacks round 4"):
        verify(run)
    assert any("metrics.jsonl lacks" in each for each in spent(read_run(run)).disagreements)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"metrics\.jsonl: missing or cut off"):
        read_run(run)


def test_a_ledger_that_was_written_anew_does_not_fit_the_checkpoints(run):
    directory, prepared = experiment.reopen(run)
    releases = list(directory.open_ledger(prepared.header()))
    directory.ledger.unlink()
    ledger = Ledger.create(directory.ledger, prepared.header())
    for each in releases:
        doubled = {"stddev": 2 * each.stddev, "noise_multiplier": 2 * each.noise_multiplier}
        ledger.append(replace(each, **doubled))
    with pytest.raises(InputError, match="cut off or written anew"):
        verify(run)
