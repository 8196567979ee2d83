"""Data as somebody brings them, by a config alone: two rounds, and what goes wrong in one line."""

import json
import sys

import pytest
import yaml
from own_data import CASES, WRITERS, document_of

from fedpriv import cli
from fedpriv.components import KINDS


@pytest.fixture
def fedpriv(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedpriv", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code, _ = 0, capsys.readouterr()  # what wrote the data may have had something to say
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder, case, **changes):
    """Write the files and the config of a case; return the config's path."""
    WRITERS[case](folder / "data")
    document = document_of(case)
    document["data"] = {**document["data"], **changes}
    (folder / "mine.yaml").write_text(yaml.safe_dump(document))
    return folder / "mine.yaml"


@pytest.mark.parametrize("case", CASES)
def test_a_config_alone_trains_on_it(case, folder, fedpriv):
    code, _, err = fedpriv("run", written(folder, case))
    assert code == 0, err
    rows = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["round"] for row in rows] == [1, 2]
    assert rows[-1]["simulation_only"]["examples"] > 0
    assert rows[-1]["aggregate_norm"] > 0


def test_a_data_sets_own_code_is_named_and_not_needed_by_who_reads(folder, fedpriv):
    assert fedpriv("run", written(folder, "torch"))[0] == 0
    (folder / "own_pictures.py").unlink()
    for kind in KINDS.values():
        kind._found.clear()
    code, out, err = fedpriv("report", "run", "--format", "md")
    assert code == 0, err
    assert "own_pictures:Pictures" in out
    code, _, err = fedpriv("resume", "run")
    assert code == 2
    assert "there is no module own_pictures" in err


#: By what is wrong: the data set, what its section says instead, and words of the line.
BAD = {
    "no folder": ("image_folder", {"path": "dat"}, ["data.path", "/dat does not exist"]),
    "a held-out part elsewhere": (
        "image_folder",
        {"held_out": "../x"},
        ["data.held_out", "within"],
    ),
    "no held-out part": (
        "image_folder",
        {"held_out": "tst"},
        ["data.held_out", "/tst;", "null"],
    ),
    "no expression": ("image_folder", {"pattern": "("}, ["data.pattern", "regular expression"]),
    "no user in it": ("image_folder", {"pattern": ".*"}, ["data.pattern", "(?P<user>"]),
    "no size": ("image_folder", {"image": {"size": 0}}, ["data.image", "1 to 4096"]),
    "a size that is a word": ("image_folder", {"image": {"size": "L"}}, ["data.image.size: write"]),
    "a size of three": (
        "image_folder",
        {"image": {"size": [8, 8, 3]}},
        ["data.image.size: write a number of pixels, or [height, width], got [8, 8, 3]"],
    ),
    "a key that is another's": ("image_folder", {"speech": {}}, ["data.speech", "unknown key"]),
    "no file": ("table", {"path": "data/x.csv"}, ["data.path", "/data/x.csv does not exist"]),
    "no table": ("table", {"path": "mine.yaml"}, ["data.path", "is no table", ".parquet"]),
    "no such column": (
        "table",
        {"user": "usr"},
        ["data.user", "did you mean user?"],
    ),
    "no such target": (
        "table",
        {"target": "z"},
        ["data.target", "there are user, x0"],
    ),
    "no such feature": ("table", {"features": "y."}, ["data.features", "y. names no column"]),
    "classes that are numbers": (
        "table",
        {"target": ["x0", "x1"]},
        ["data.target", "data.predict: number"],
    ),
    "a division by nothing": ("table", {"std": 0}, ["data.std", "above 0"]),
    "means of others": ("table", {"mean": [1, 2]}, ["data.mean", "2 numbers for 3 features"]),
    "no saved folder": ("hf", {"path": "."}, ["data.path", "save_to_disk"]),
    "no such part": ("hf", {"held_out": "tets"}, ["data.held_out", "did you mean test?"]),
    "no such input": ("hf", {"input": "img"}, ["data.input", "did you mean image?"]),
    "text for a model of images": ("hf", {"input": "user"}, ["data.input", "data.name: text"]),
    "another number of classes": ("hf", {"classes": 3}, ["data.classes is 3", "names 2"]),
    "no module": ("torch", {"dataset": "mien:D"}, ["data.dataset.name", "no module mien"]),
    "no object": (
        "torch",
        {"dataset": {"name": "own_pictures:Picture"}},
        ["data.dataset.name", "did you mean own_pictures:Pictures?"],
    ),
    "no option of it": (
        "torch",
        {"dataset": {"name": "own_pictures:Pictures", "off": 1, "of": "u"}},
        ["data.dataset.off", "did you mean of?"],
    ),
    "no data set": (
        "torch",
        {"dataset": "own_pictures:no_data_set"},
        ["data.dataset", "no map-style"],
    ),
    "no ids": ("torch", {"user_ids": "people"}, ["data.user_ids", "no attribute people"]),
    "no texts": ("text", {"path": "dta"}, ["data.path", "/dta does not exist"]),
    "no public text": (
        "text",
        {"tokenizer": {"kind": "bpe", "public": "pubic.en"}},
        ["data.tokenizer.public", "pubic.en"],
    ),
    "no tokenizer": (
        "text",
        {"tokenizer": {"kind": "file", "file": "public.en"}},
        ["data.tokenizer.file", "no tokenizer.json"],
    ),
    "a file without its kind": (
        "text",
        {"tokenizer": {"file": "x.json"}},
        ["data.tokenizer", "kind: file and a file"],
    ),
    "no column of texts": (
        "text in a table",
        {"text": "lines"},
        ["data.text", "mean line?"],
    ),
    "too many people": (
        "image_folder",
        {"partition": {"kind": "iid"}, "users": 99},
        ["at most 30"],
    ),
}


@pytest.mark.parametrize("wrong", BAD)
def test_what_is_wrong_is_one_line(wrong, folder, fedpriv):
    case, changes, words = BAD[wrong]
    code, out, err = fedpriv("run", written(folder, case, **changes))
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1, err
    assert all(word in err for word in words), err
    assert not (folder / "run").exists()
