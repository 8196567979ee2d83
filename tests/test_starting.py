"""`fedpriv init`: configs that run as they are written, on data as their comments describe it."""

import shutil

import own_data
import pytest
import torch
from test_cli import assert_one_line, call

import fedpriv
from fedpriv.cli.starting import STARTERS
from fedpriv.config_files import load_config


@pytest.fixture
def fedpriv_here(tmp_path, monkeypatch, capsys):
    """The command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


def pictures(folder):
    own_data.write_images(folder / "photos")


def table(folder):
    own_data.write_table(folder)
    for name in ("people.csv", "test.csv"):
        text = (folder / name).read_text().replace("user,", "person,", 1)
        (folder / name).write_text(text.replace("target", "outcome", 1).replace("height", "h", 1))

    starter = (folder / "table.yaml").read_text()
    code = starter.partition("# mine.py:\n")[2].splitlines()
    (folder / "mine.py").write_text("\n".join(line.removeprefix("#   ") for line in code))


def text(folder):
    for user in (*own_data.USERS, "test"):
        (folder / "letters" / user).mkdir(parents=True)
        (folder / "letters" / user / "first.txt").write_text(f"Dear {user}, " + "a word " * 40)


DATA = {"digits": lambda folder: None, "pictures": pictures, "table": table, "text": text}


@pytest.mark.parametrize("kind", DATA)
def test_a_first_config_trains_with_privacy_on_what_it_describes(kind, fedpriv_here, tmp_path):
    code, out, err = fedpriv_here("init", kind)
    assert (code, err) == (0, "")
    assert f"fedpriv run {kind}.yaml" in out
    DATA[kind](tmp_path)
    changes = {"rounds": 1, "runtime.workers": 1}
    experiment = fedpriv.Experiment.load(f"{kind}.yaml", changes)
    run = experiment.train(grid="local", progress=False)
    assert 0 < run.epsilon() <= 8.0
    assert all(torch.isfinite(each).all() for each in run.model().state_dict().values())


def test_the_speakers_config_is_valid(fedpriv_here, tmp_path):
    fedpriv_here("init", "speech")
    assert load_config(tmp_path / "speech.yaml", []).data.name == "synthetic_speech"


def test_each_kind_is_written_where_it_is_told_and_nothing_is_overwritten(fedpriv_here, tmp_path):
    for kind in STARTERS:
        assert fedpriv_here("init", kind, "--out", f"{kind}-1.yaml")[0] == 0
    kept = tmp_path / "digits.yaml"
    kept.write_text("mine")
    assert_one_line(fedpriv_here("init"), "digits.yaml", "--out")
    assert kept.read_text() == "mine"
    assert_one_line(fedpriv_here("init", "images"), "pictures")
    assert_one_line(fedpriv_here("init", "--out", "no/such/place.yaml"), "no/such")
    shutil.copy(kept, tmp_path / "x")
    assert_one_line(fedpriv_here("init", "--out", "x"), "x is there already")


SWEPT = ["--set", "rounds=1", "--set", "runtime.grid=local", "--set", "data.users=40",
         "--set", "privacy.sampling.expected_cohort=8"]  # fmt: skip


def test_a_sweep_trains_each_point_once_and_says_that_choosing_is_not_counted(
    fedpriv_here, tmp_path
):
    fedpriv_here("init")
    grid = ["sweep", "digits.yaml", *SWEPT, "--grid", "server.lr=0.01,0.02", "--seeds", "1,2"]
    code, out, err = fedpriv_here(*grid)
    assert code == 0
    assert "fedpriv tune counts it" in err
    rows = [line.split() for line in out.splitlines() if "digits-sweep" in line]
    assert [row[:2] for row in rows] == [["0.01", "1"], ["0.01", "2"], ["0.02", "1"], ["0.02", "2"]]
    before = sorted((tmp_path / "runs").rglob("checkpoints/*"))
    code, csv, err = fedpriv_here(*grid, "--format", "csv")
    assert code == 0
    assert csv.splitlines()[0].startswith("server.lr,seed,rounds,accuracy,epsilon")
    assert len(csv.splitlines()) == 5
    assert sorted((tmp_path / "runs").rglob("checkpoints/*")) == before
    for line, row in zip(csv.splitlines()[1:], rows, strict=True):
        assert float(line.split(",")[3]) == pytest.approx(float(row[2]), abs=1e-4)


def test_a_sweep_refuses_what_it_could_not_mean(fedpriv_here):
    fedpriv_here("init")
    sweep = ["sweep", "digits.yaml", *SWEPT]
    assert_one_line(fedpriv_here(*sweep), "--grid", "--seeds")
    assert_one_line(fedpriv_here(*sweep, "--grid", "server.lr"), "key=a,b")
    assert_one_line(fedpriv_here(*sweep, "--seeds", "a"), "seed")
    assert_one_line(fedpriv_here(*sweep, "--grid", "seed=1,2", "--seeds", "3"), "--seeds")
    twice = ["--grid", "server.lr=1", "--grid", "server.lr=2"]
    assert_one_line(fedpriv_here(*sweep, *twice), "server.lr", "twice")
    assert_one_line(fedpriv_here("tune", "digits.yaml", *twice), "server.lr", "twice")
    assert_one_line(fedpriv_here(*sweep, "--grid", "nothing=1"), "nothing")
