"""`data`: which data sets there are, and what is in one, private figures apart from public ones."""

import json
import sys

import numpy as np
import pytest
import yaml
from own_data import CLASSES, USERS, document_of, table_rows, write_table, write_texts
from PIL import Image

from fedpriv import cli
from fedpriv.data import DATASETS, build_dataset
from fedpriv.data.describe import describe
from fedpriv.data.partition import PartitionConfig


@pytest.fixture
def fedpriv(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedpriv", "data", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "data")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document_of("table")))
    return path


def test_every_data_set_is_listed_with_its_options(fedpriv):
    code, out, err = fedpriv("list", "--format", "json")
    assert (code, err) == (0, "")
    found = {each["name"]: each for each in json.loads(out)}
    assert found.keys() >= DATASETS.registered.keys()
    assert all(each["does"].endswith(".") or each["does"] for each in found.values())
    assert found["image_folder"]["options"]["image.size"]["default"] == 32
    assert all(o["description"] for each in found.values() for o in each["options"].values())
    code, table, _ = fedpriv("list")
    assert code == 0
    assert all(name in table for name in DATASETS.registered)


def test_figures_are_those_of_the_rows(fedpriv, config):
    code, out, err = fedpriv("describe", config, "--format", "json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    rows = table_rows()
    counts = [sum(row["target"] == label for row in rows) for label in CLASSES]
    private = found["private"]
    assert private["population"] == len(USERS)
    assert private["examples"] == {"min": 4, "median": 4.0, "max": 4, "sum": 40}
    assert private["classes"] == counts
    own = (
        np.array(
            [
                [sum(r["target"] == c for r in rows[4 * u : 4 * u + 4]) for c in CLASSES]
                for u in range(len(USERS))
            ]
        )
        / 4
    )
    assert private["largest_class_share"] == pytest.approx(np.median(own.max(axis=1)))
    distance = np.abs(own - np.array(counts) / 40).sum(axis=1).mean() / 2
    assert private["label_distance"] == pytest.approx(distance)
    assert "do not publish" in private["note"]
    public = found["public"]
    assert (public["classes"], public["input_shape"], public["held_out"]) == (2, [3], 12)
    assert not {"population", "examples", "classes_of_users"} & public.keys()


def test_a_description_says_what_is_private_before_any_private_figure(fedpriv, config):
    code, out, _ = fedpriv("describe", config)
    assert code == 0
    public, private = out.split("PRIVATE: functions of users' data")
    assert "12 held-out examples" in public
    assert "40 in all" not in public
    assert "40 in all" in private
    assert "█" in private


def test_a_picture_is_drawn_where_out_says(fedpriv, config, tmp_path):
    code, _, err = fedpriv("describe", config, "--out", tmp_path / "d.png")
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "d.png") as picture:
        assert picture.width > 600
    for name, word in (("d.gif", ".png or .svg"), ("no/d.png", "there is no folder")):
        code, out, err = fedpriv("describe", config, "--out", tmp_path / name)
        assert (code, out) == (2, "")
        assert "--out" in err
        assert word in err


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_is_drawn_over_a_picture_of_fedprivs_alone(fedpriv, config, tmp_path, kind):
    path = tmp_path / f"d.{kind}"
    for _ in range(2):
        assert fedpriv("describe", config, "--out", path)[0] == 0
    path.write_text("mine")
    code, out, err = fedpriv("describe", config, "--out", path)
    assert (code, out) == (2, "")
    assert f"--out: {path} is there already, and fedpriv did not write it" in err
    assert path.read_text() == "mine"


def test_so_many_users_are_read_at_most(fedpriv, config):
    code, out, _ = fedpriv("describe", config, "--users", 3, "--format", "json")
    private = json.loads(out)["private"]
    assert (code, private["population"], private["looked_at"]) == (0, 10, 3)
    assert private["examples"]["sum"] == 12


def test_users_of_one_class_each_are_apart_and_texts_have_no_classes(tmp_path):
    one_each = DATASETS.parse(
        {
            "name": "digits",
            "users": 10,
            "partition": PartitionConfig(kind="shards", shards_per_user=1).model_dump(),
        }
    )
    skew = describe(build_dataset(one_each, 3), 1000, 3).skew
    assert skew.largest > 0.9
    assert skew.distance > 0.8
    iid = DATASETS.parse({"name": "digits", "users": 10})
    assert describe(build_dataset(iid, 3), 1000, 3).skew.distance < 0.15
    texts = DATASETS.parse({"name": "text", "path": write_texts(tmp_path), "held_out": "test"})
    assert describe(build_dataset(texts, 3), 1000, 3).skew is None


def test_what_is_wrong_with_the_data_is_one_line(fedpriv, config, tmp_path):
    code, out, err = fedpriv("describe", config, "--set", "data.target=goal")
    assert (code, out) == (2, "")
    assert "data.target" in err
    assert len(err.strip().splitlines()) == 1


def test_people_without_a_place_are_told_in_run_validate_and_describe(
    fedpriv, config, monkeypatch, capsys
):
    said = (
        f"data.users is 7 and there are {len(USERS)} people here: 7 drawn at random are trained "
        "on, and the other 3 are left out; write users: 10 or more for all"
    )
    for command in (["run"], ["config", "validate"], ["data", "describe"]):
        given = [*command, str(config), "--set", "data.users=7", "--set", "rounds=1"]
        monkeypatch.setattr(sys, "argv", ["fedpriv", *given])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        printed = "".join(capsys.readouterr())
        assert printed.count(said) == 1, command
        assert "1 rounds" not in printed
    _, out, _ = fedpriv("describe", config, "--set", f"data.users={len(USERS)}")
    assert "left out" not in out


def test_what_is_skipped_is_said_with_its_first_reason(fedpriv, config, tmp_path):
    table = tmp_path / "data" / "people.csv"
    rows = table.read_text().splitlines()
    rows[1] = rows[1].replace(rows[1].split(",")[1], "much")
    table.write_text("\n".join(rows))
    code, out, _ = fedpriv("describe", config)
    assert code == 0
    assert f"1 skipped, first: {table}: row 1: x0 is no number" in out


def test_classes_are_called_by_their_names(fedpriv, config):
    _, out, _ = fedpriv("describe", config)
    assert [line.split()[0] for line in out.splitlines()[-2:]] == list(CLASSES)
    _, out, _ = fedpriv("describe", config, "--format", "json")
    assert json.loads(out)["public"]["class_names"] == list(CLASSES)


def test_a_bad_record_that_stops_a_run_stops_a_description_with_the_same_line(
    fedpriv, config, tmp_path, monkeypatch, capsys
):
    table = tmp_path / "data" / "people.csv"
    rows = table.read_text().splitlines()
    rows[4] = rows[4].replace(rows[4].split(",")[1], "much")
    table.write_text("\n".join(rows))
    everybody = "privacy.sampling.expected_cohort=10"
    given = [str(config), "--set", "data.on_bad=stop", "--set", everybody]
    code, out, err = fedpriv("describe", *given)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {table}: row 4: x0 is no number; ")
    assert "data.on_bad: skip" in err
    assert len(err.splitlines()) == 1
    monkeypatch.setattr(sys, "argv", ["fedpriv", "run", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert err in capsys.readouterr().err
