"""Components of others train with privacy in this process; ledger and report name them."""

import hashlib
import json

import numpy as np
import pytest
import torch
from in_process import Silent, drive_on
from outside_cases import HANDED, HERE, KEYS, NAMED, by_python, by_yaml, write_people

from fedpriv import experiment
from fedpriv.components import KINDS
from fedpriv.errors import InputError
from fedpriv.privacy import Ledger
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.reporting.spent import spent

WAYS = {"yaml": by_yaml, "python": by_python}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a project, which people's pictures are in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_people(tmp_path / "people")
    return tmp_path


def trained(config) -> RunDirectory:
    prepared = experiment.prepare(config)
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, Silent(), drive_on(None))
    return directory


@pytest.mark.parametrize(
    ("case", "way"),
    [*((case, "yaml") for case in NAMED), *((case, "python") for case in HANDED)],
)
def test_it_is_trained_and_named(case, way, folder):
    mine = case != "timm"
    directory = trained(WAYS[way](folder, [case], run_dir="run"))
    rows = directory.read_metrics()
    assert [row["round"] for row in rows] == [1, 2]
    assert 0 < rows[0]["epsilon"]["rdp"] < rows[1]["epsilon"]["rdp"]
    assert all(np.isfinite(row["held_out"]["loss"]) for row in rows)
    assert rows[-1]["aggregate_norm"] > 0
    assert rows[-1]["simulation_only"]["norm"] > 0
    assert rows[-1]["simulation_only"]["non_finite"] == 0

    ledger, found = Ledger.open(directory.ledger), directory.environment()["outside"]
    assert len(ledger) == 2
    assert tuple(sorted(found)) == KEYS[case]
    told = [named["name"] for named in found.values()]
    digest = hashlib.sha256((HERE / f"{case}.py").read_bytes()).hexdigest() if mine else ""
    # Of an object made by the file, but of a class of somebody else's, its own digest is told.
    given = found[KEYS[case][-1]].get("source_sha256", "")
    assert (digest or "timm") in str(found) or given
    told.append(digest if digest in str(found) else given)
    if way == "yaml" and mine:
        # Who reads the report need not have the code.
        (folder / f"{case}.py").unlink()
        for key in KEYS[case]:
            KINDS[key]._found.clear()
    assert spent(read_run(directory.path)).disagreements == ()
    reports = [render([directory.path], form) for form in ("md", "json")]
    for text in (str(ledger.header.outside), *reports):
        assert all(each in text for each in told)
    if way == "yaml" and mine:
        with pytest.raises(InputError, match=rf"there is no module {case}"):
            experiment.reopen(directory.path)


def test_a_run_goes_on_with_the_code_that_it_began_with(folder):
    directory = trained(by_yaml(folder, ["groupnorm_cnn"], run_dir="run", rounds=4))
    (directory.checkpoints / "round-000004.safetensors").unlink()
    assert experiment.reopen(directory.path)[1].finished_rounds == 3
    code = folder / "groupnorm_cnn.py"
    before = code.read_text()
    code.write_text(before.replace("nn.ReLU()", "nn.GELU()"))
    with pytest.raises(InputError, match="only with the code that it began with") as refused:
        experiment.reopen(directory.path)
    assert "\n" not in str(refused.value)
    code.write_text(before)
    assert json.loads((directory.path / "environment.json").read_text())["outside"]
    assert experiment.reopen(directory.path)[1].finished_rounds == 3


@pytest.mark.parametrize("way", WAYS)
def test_what_a_normaliser_keeps_goes_on_where_a_run_does(way, folder):
    config = {"rounds": 4, "checkpoint": {"keep": 4}}
    whole = trained(WAYS[way](folder, ["running_scale"], run_dir="whole", **config))
    cut = trained(WAYS[way](folder, ["running_scale"], run_dir="cut", **config))
    for round_ in (3, 4):
        (cut.checkpoints / f"round-{round_:06d}.safetensors").unlink()
    directory, prepared = experiment.reopen(cut.path)
    assert prepared.finished_rounds == 2
    experiment.train(prepared, directory, Silent(), drive_on(None))
    _, uninterrupted = experiment.reopen(whole.path)
    assert prepared.server.parameters().equal(uninterrupted.server.parameters())
    assert prepared.server._normalize._made.rounds == 4
    assert all(map(torch.isfinite, prepared.server._normalize._made.squares.values()))
