"""The commands that plan, check and add up privacy: their output, and their one-line errors."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import SILOS, SMALL, train_small
from matplotlib.figure import Figure
from test_cli import assert_one_line, call

from fedpriv.privacy import (
    CentralMechanism,
    GaussianMechanism,
    GlobalClipping,
    Header,
    Ledger,
    RdpAccountant,
    Release,
    build_sampling,
)

Fedpriv = Callable[..., tuple[int, str, str]]

PLAN = ["--population", "1000", "--cohort", "20", "--rounds", "50", "--delta", "1e-5"]
SPEECH = ["--population", "34753", "--cohort", "1024", "--noise-multiplier", "0.003072"]
SPEECH += ["--rounds", "2000", "--delta", "1e-9"]


@pytest.fixture
def fedpriv(monkeypatch, capsys) -> Fedpriv:
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    directory, _ = train_small(tmp_path_factory.mktemp("trained") / "run", rounds=2)
    return directory.path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of two rounds."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def write_ledger(
    folder: Path,
    kind: str = "poisson",
    population: int = 1000,
    noise: float = 1.0,
    **header: Any,
) -> Path:
    """A ledger of three releases in a folder of its own."""
    sampling = build_sampling(kind, population, 50)
    folder.mkdir()
    fields = {"delta": 1e-5, "adjacency": sampling.adjacency.value} | header
    ledger = Ledger.create(
        folder / "ledger.jsonl", Header(fingerprint=folder.name, population=population, **fields)
    )
    mechanism = GaussianMechanism(noise, GlobalClipping(0.5))
    for round_ in range(1, 4):
        ledger.append(Release.of(round_, 0, CentralMechanism(sampling, mechanism), folder.name))
    return folder


def strict(text: str) -> Any:
    """The one document in `text`; NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def table_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def ok(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, err
    return out


# -------------------------------------------------------------------- budget


def test_a_plan_in_every_format(fedpriv):
    options = ["budget", "plan", *PLAN, "--delta", "1e-8", "--noise-multiplier", "1"]
    table = ok(fedpriv(*options))
    document = strict(ok(fedpriv(*options, "--format", "json")))
    rows = table_of(ok(fedpriv(*options, "--format", "csv")))
    assert document["solved_for"] == "epsilon"
    assert document["epsilon_rdp"] > document["epsilon_pld"] > 0
    assert (document["epsilon"], document["accountant"]) == (document["epsilon_pld"], "pld")
    assert [cost["delta"] for cost in document["deltas"]] == [1e-5, 1e-8]
    assert float(rows[-2]["epsilon"]) == document["epsilon"]
    assert len(rows) == 5 * 2
    assert "by RDP" in table
    assert "1,000 users" in table


def test_a_solved_noise_is_rounded_up_and_keeps_the_budget(fedpriv):
    table = ok(fedpriv("budget", "plan", *PLAN, "--epsilon", "2"))
    line = next(line for line in table.splitlines() if line.startswith("noise"))
    retyped = line.split()[-1]
    options = ["--noise-multiplier", retyped, "--format", "json"]
    assert strict(ok(fedpriv("budget", "plan", *PLAN, *options)))["epsilon"] <= 2


def test_which_band_pays_is_said_and_planned(fedpriv):
    options = ["budget", "plan", *PLAN, "--noise", "correlated", "--momentum", "0.9"]
    code, out, err = fedpriv(*options, "--epsilon", "8", "--format", "json")
    document = strict(out)
    assert code == 0
    assert [each["bands"] for each in document["tried"]] == [1, 2, 4, 8, 16, 32]
    least = min(document["tried"], key=lambda each: each["error"])
    assert document["bands"] == least["bands"] > 1
    assert f"{least['bands']} bands pay" in err
    assert "noise in the model" in ok(fedpriv(*options, "--epsilon", "8"))
    refused = fedpriv(*options, "--noise-multiplier", "1")
    assert_one_line(refused, "leave out --bands and --noise-multiplier")


APART = ["--sampling", "min_separation", "--noise", "correlated", "--epsilon", "4"]


def test_bands_and_separation_are_planned_for_the_server_of_a_config(fedpriv, tmp_path):
    """A schedule of the server bears on what pays; one of users, whose updates are clipped, not."""
    options = ["budget", "plan", *PLAN, *APART, "--separation", "10", "--format", "json"]
    document = json.loads(json.dumps(SMALL)) | {"rounds": 50}
    document["server"] = {"optimizer": "sgd", "lr": 1.0, "options": {"momentum": 0.5}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(document))
    of = [*options, "--config", str(path)]

    def tried(*arguments):
        return strict(ok(fedpriv(*arguments)))["tried"]

    same = tried(*options, "--momentum", "0.5")
    assert tried(*of) == same
    assert tried(*of, "--set", "local.schedule={kind: cosine}") == same
    falling = tried(*of, "--set", "server.schedule={kind: exponential, factor: 0.8}")
    assert falling[-1]["error"] != pytest.approx(same[-1]["error"], rel=1e-2)

    code, out, err = fedpriv(*options[:-2], "--factorization", "bisr")
    assert code == 0
    assert "at most once in 10 rounds pay" in err
    assert "rounds: 10, expected_cohort: 20}" in err
    assert "one in 10 at most" in out
    assert_one_line(fedpriv(*of, "--momentum", "0.5"), "leave out --momentum")
    assert_one_line(fedpriv(*options, "--momentum", "1"), "--momentum: write a number")
    assert_one_line(fedpriv(*options, "--set", "rounds=3"), "--set: goes with --config")


@pytest.mark.parametrize(
    ("options", "separation", "block"),
    [
        (PLAN, None, None),
        ([*PLAN, "--sampling", "min_separation", "--separation", "4"], 4, None),
        ([*PLAN, "--sampling", "random_allocation"], None, 50),
    ],
)
def test_rounds_between_a_users_and_of_a_block_are_told_apart(fedpriv, options, separation, block):
    noise = ["--noise-multiplier", "2"]
    document = strict(ok(fedpriv("budget", "plan", *options, *noise, "--format", "json")))
    assert (document["separation"], document["block"]) == (separation, block)


def test_what_pld_cannot_prove_is_null_and_said(fedpriv):
    options = ["--noise-multiplier", "1", "--sampling", "fixed_size", "--format", "json"]
    code, out, err = fedpriv("budget", "plan", *PLAN, *options)
    assert code == 0
    assert strict(out)["epsilon_pld"] is None
    assert "no PLD" in err


RDP = ("--accountant", "rdp")


def test_extrapolation_rows(fedpriv):
    scales = ["--scale-population", "1,1000", "--scale-cohort", "1,300"]
    code, out, err = fedpriv("budget", "extrapolate", *SPEECH, *scales, *RDP, "--format", "json")
    assert code == 0
    rows = strict(out)
    keys = ["population", "cohort", "noise_multiplier", "rounds", "delta", "epsilon"]
    keys += ["accountant", "epsilon_rdp"]
    assert [list(row) for row in rows] == [keys] * 3
    assert rows[-1]["epsilon"] == pytest.approx(4.65, abs=0.005)
    assert "307,200 of 34,753" in err
    table = ok(fedpriv("budget", "extrapolate", *SPEECH, *scales, *RDP))
    assert "4.652" in table
    assert "34,753,000" in table
    text = ok(fedpriv("budget", "extrapolate", *SPEECH, "--format", "csv", "--accountant", "pld"))
    assert table_of(text)[0]["epsilon_pld"] == ""


def test_plots_are_written(fedpriv, tmp_path):
    plan, grid = tmp_path / "plan.svg", tmp_path / "grid.png"
    ok(fedpriv("budget", "plan", *PLAN, "--epsilon", "2", "--plot", plan))
    ok(fedpriv("budget", "extrapolate", *SPEECH, "--scale-cohort", "1,10,100", "--plot", grid))
    assert "<svg" in plan.read_text()
    assert grid.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_plot_is_drawn_over_a_plot_and_over_nothing_of_somebody_elses(fedpriv, tmp_path, kind):
    commands = {
        "plan": [*PLAN, "--noise-multiplier", "1"],
        "extrapolate": [*SPEECH, "--scale-cohort", "1,10"],
    }
    for command, given in commands.items():
        path = tmp_path / f"{command}.{kind}"
        for _ in range(2):
            ok(fedpriv("budget", command, *given, "--plot", path))
        figure = Figure()
        figure.add_subplot()
        figure.savefig(path)
        theirs = path.read_bytes()
        assert_one_line(
            fedpriv("budget", command, *given, "--plot", path),
            "--plot",
            "is there already, and fedpriv did not write it; name another file",
        )
        assert path.read_bytes() == theirs


NOISE = ["--noise-multiplier", "1"]
BAD_BUDGETS: dict[str, tuple[list[str], list[str]]] = {
    "negative noise": (["plan", *PLAN, "--noise-multiplier", "-1"], ["--noise-multiplier", "-1"]),
    "delta of one": (["plan", *PLAN, *NOISE, "--delta", "1"], ["--delta", "below 1"]),
    "a cohort above the population": (
        ["plan", *PLAN, *NOISE, "--cohort", "1001"],
        ["--cohort", "1000"],
    ),
    "nobody": (["plan", *PLAN, *NOISE, "--population", "0"], ["--population", "at least 1"]),
    "no rounds": (["plan", *PLAN, *NOISE, "--rounds", "0"], ["--rounds", "at least 1"]),
    "noise and budget": (["plan", *PLAN, *NOISE, "--epsilon", "1"], ["--epsilon", "--solve"]),
    "neither": (["plan", *PLAN], ["--noise-multiplier", "--epsilon"]),
    "no delta": (["plan", *PLAN[:-2], *NOISE], ["--delta"]),
    "an unknown format": (["plan", *PLAN, *NOISE, "--format", "xml"], ["--format", "csv"]),
    "an unknown sampling": (["plan", *PLAN, *NOISE, "--sampling", "some"], ["--sampling"]),
    "a budget of nothing": (["plan", *PLAN, "--epsilon", "0"], ["--epsilon", "above 0"]),
    "a budget out of reach": (
        ["plan", *PLAN[:-1], "1e-10", "--epsilon", "0.001"],
        ["--epsilon", "larger"],
    ),
    "no plot format": (["plan", *PLAN, *NOISE, "--plot", "plan.doc"], ["--plot", ".png"]),
    "an unwritable plot": (["plan", *PLAN, *NOISE, "--plot", "no/where/p.png"], ["--plot"]),
    "scales that are no numbers": (
        ["extrapolate", *SPEECH, "--scale-population", "1,ten"],
        ["--scale-population", "1,10,100", "1,ten"],
    ),
    "a scale of zero": (["extrapolate", *SPEECH, "--scale-cohort", "0"], ["--scale-cohort"]),
    "no cohort that fits": (["extrapolate", *SPEECH, "--scale-cohort", "50"], ["--scale-cohort"]),
    "an unknown accountant": (["extrapolate", *SPEECH, "--accountant", "gdp"], ["--accountant"]),
    "an unknown grid format": (["extrapolate", *SPEECH, "--format", "md"], ["--format", "table"]),
}


@pytest.mark.parametrize("case", BAD_BUDGETS)
def test_bad_budgets_are_one_line(case, fedpriv):
    arguments, words = BAD_BUDGETS[case]
    assert_one_line(fedpriv("budget", *arguments), *words)


# -------------------------------------------------------------------- ledger


def tear(folder: Path) -> None:
    """Add half a line, as a crash in the middle of an append leaves it."""
    path = folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "release", "rou')


def test_a_ledger_is_shown_in_groups(fedpriv, tmp_path):
    folder = write_ledger(tmp_path / "one")
    table = ok(fedpriv("ledger", "show", folder))
    assert "1–3" in table
    document = strict(ok(fedpriv("ledger", "show", folder / "ledger.jsonl", "--format", "json")))
    assert [group["releases"] for group in document["groups"]] == [3]
    accountant = RdpAccountant(build_sampling("poisson", 1000, 50).adjacency)
    Ledger.open(folder / "ledger.jsonl").compose_into(accountant)
    assert document["epsilon_rdp"] == accountant.epsilon(1e-5)


def test_a_run_is_verified_against_its_metrics(fedpriv, run):
    document = strict(ok(fedpriv("ledger", "verify", run, "--format", "json")))
    assert (document["intact"], document["metrics_agree"], document["releases"]) == (True, True, 2)
    said = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["epsilon"]["rdp"]
    assert document["epsilon_rdp"] == pytest.approx(said, rel=1e-9)
    assert "agrees" in ok(fedpriv("ledger", "verify", run / "ledger.jsonl"))


def test_a_ledger_alone_is_verified_for_what_it_is(fedpriv, tmp_path):
    folder = write_ledger(tmp_path / "one")
    assert "no metrics to compare" in ok(fedpriv("ledger", "verify", folder))
    document = strict(ok(fedpriv("ledger", "verify", folder, "--format", "json")))
    assert document["metrics_agree"] is None


def test_runs_are_merged(fedpriv, tmp_path):
    folders = [write_ledger(tmp_path / name) for name in ("one", "other")]
    document = strict(ok(fedpriv("ledger", "merge", *folders, "--format", "json")))
    assert document["releases"] == 6
    assert [run["releases"] for run in document["runs"]] == [3, 3]
    assert document["epsilon"] > document["runs"][0]["epsilon"]
    assert document["epsilon_pld"] < document["epsilon_rdp"]
    table = ok(fedpriv("ledger", "merge", *folders, "--delta", "1e-6"))
    assert "all together" in table
    assert "same people" in table


def test_silos_are_called_silos_and_pay_each_for_itself(fedpriv, tmp_path):
    folders = [tmp_path / name for name in ("one", "other")]
    for seed, folder in enumerate(folders):
        train_small(folder, **SILOS | {"rounds": 1, "seed": seed})
    for command in ("show", "verify"):
        assert "the worst has spent:" in ok(fedpriv("ledger", command, folders[0]))
    assert "6 silos, unit example" in ok(fedpriv("ledger", "show", folders[0]))
    table = ok(fedpriv("ledger", "merge", *folders))
    assert "6 silos, taken to be the same in every run" in " ".join(table.split())
    assert "users" not in table
    assert "people" not in table


def test_no_privacy_is_null_and_said(fedpriv, tmp_path):
    folder = write_ledger(tmp_path / "public", noise=0.0, delta=None)
    for command in ("show", "verify"):
        assert "no privacy" in ok(fedpriv("ledger", command, folder))
        document = strict(ok(fedpriv("ledger", command, folder, "--format", "json")))
        assert document["epsilon"] is None
    private = write_ledger(tmp_path / "private")
    merged = strict(ok(fedpriv("ledger", "merge", folder, private, "--format", "json")))
    assert [run["epsilon"] is None for run in merged["runs"]] == [True, False]
    assert merged["epsilon"] is None


@pytest.mark.parametrize("torn", [False, True])
def test_looking_changes_nothing(fedpriv, run, tmp_path, torn):
    other = write_ledger(tmp_path / "other", population=60, delta=1e-3)
    if torn:
        tear(run)
        tear(other)
    files = [path for folder in (run, other) for path in folder.rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    for arguments in (["show", run], ["verify", run], ["verify", other], ["merge", run, other]):
        code, out, err = fedpriv("ledger", *arguments, "--format", "json")
        assert code == 0, err
        strict(out)
        assert ("torn" in err) is torn
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def lines_of(folder: Path) -> list[str]:
    return (folder / "ledger.jsonl").read_text().splitlines(keepends=True)


TAMPERINGS: dict[str, tuple[Callable[[str, str, str, str], tuple[str, ...]], str]] = {
    "edited": (lambda h, a, b, c: (h, a.replace('"round": 1', '"round": 7'), b, c), "line 2"),
    "dropped": (lambda h, a, b, c: (h, b, c), "line 2"),
    "reordered": (lambda h, a, b, c: (h, b, a, c), "line 2"),
    "doubled": (lambda h, a, b, c: (h, a, b, c, c), "line 5"),
    "not ours": (lambda h, a, b, c: (h, a, "{}\n", c), "line 3"),
}


@pytest.mark.parametrize("case", TAMPERINGS)
@pytest.mark.parametrize("command", ["show", "verify", "merge"])
def test_tampering_is_found_by_its_line(case, command, fedpriv, tmp_path):
    folder = write_ledger(tmp_path / "one")
    tamper, line = TAMPERINGS[case]
    (folder / "ledger.jsonl").write_text("".join(tamper(*lines_of(folder))))
    assert_one_line(fedpriv("ledger", command, folder, "--format", "json"), line)


def test_lines_cut_off_at_the_end_are_found_by_the_metrics(fedpriv, run):
    shutil.rmtree(run / "checkpoints")
    (run / "ledger.jsonl").write_text("".join(lines_of(run)[:-1]))
    assert_one_line(fedpriv("ledger", "verify", run), "NOT COMPLETE", "metrics.jsonl")


def test_lines_cut_off_ledger_and_metrics_are_found_by_the_checkpoints(fedpriv, run):
    for name in ("ledger.jsonl", "metrics.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:-1]))
    assert_one_line(fedpriv("ledger", "verify", run), "NOT COMPLETE", "round 2", "checkpoints")
    assert_one_line(fedpriv("ledger", "merge", run), "NOT COMPLETE", "round 2", "checkpoints")
    code, out, err = fedpriv("ledger", "show", run, "--format", "json")
    assert (code, json.loads(out)["completeness"]) == (0, None)
    assert "lines are missing at its end" in json.loads(out)["missing"][0]
    assert "lines are missing at its end" in " ".join(err.split())
    code, out, _ = fedpriv("ledger", "show", run)
    assert "lines are missing at its end" in " ".join(out.split())


def test_without_checkpoints_nobody_says_that_a_ledger_is_complete(fedpriv, run):
    _, out, _ = fedpriv("ledger", "verify", run)
    assert "charges every round that is finished, by checkpoints (round 2)" in " ".join(out.split())
    assert "simulation with a known seed" in out
    shutil.rmtree(run / "checkpoints")
    _, out, _ = fedpriv("ledger", "verify", run)
    assert "CANNOT be checked" in out
    document = json.loads(fedpriv("ledger", "verify", run, "--format", "json")[1])
    assert document["complete"] is None


def test_metrics_that_say_less_than_the_ledger_are_found(fedpriv, run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["epsilon"]["rdp"] /= 2
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_one_line(fedpriv("ledger", "verify", run), "CONTRADICTS", "round 2")


def test_merges_that_make_no_sense_are_one_line(fedpriv, tmp_path):
    one = write_ledger(tmp_path / "one")
    larger = write_ledger(tmp_path / "larger", population=2000)
    fixed = write_ledger(tmp_path / "fixed", kind="fixed_size")
    other_delta = write_ledger(tmp_path / "other-delta", delta=1e-6)
    copied = tmp_path / "copied.jsonl"
    shutil.copy(one / "ledger.jsonl", copied)
    assert_one_line(fedpriv("ledger", "merge", one, larger), "population", "2000", "1000")
    assert_one_line(fedpriv("ledger", "merge", one, fixed), "adjacency", "replace_one")
    assert_one_line(fedpriv("ledger", "merge", one, one), "same releases")
    assert_one_line(fedpriv("ledger", "merge", one, copied), "same releases")
    assert_one_line(fedpriv("ledger", "merge", one, other_delta), "--delta", "1e-06, 1e-05")
    assert_one_line(fedpriv("ledger", "merge", one, "--delta", "0"), "--delta")


def test_what_is_no_ledger_is_one_line(fedpriv, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("a text\n")
    (tmp_path / "nothing").write_bytes(b"")
    for command in ("show", "verify", "merge"):
        assert_one_line(fedpriv("ledger", command, tmp_path / "absent"), "absent", "no such")
        assert_one_line(fedpriv("ledger", command, tmp_path / "empty"), "ledger.jsonl")
        assert_one_line(fedpriv("ledger", command, tmp_path / "text"), "not a fedpriv ledger")
        assert_one_line(fedpriv("ledger", command, tmp_path / "nothing"), "not a fedpriv ledger")
    folder = write_ledger(tmp_path / "one")
    assert_one_line(fedpriv("ledger", "show", folder, "--format", "csv"), "--format")


# -------------------------------------------------------------------- report


def test_reports_in_every_format(fedpriv, run, tmp_path):
    page = tmp_path / "page.html"
    assert "small" in ok(fedpriv("report", run, "--output", page))
    assert "<html" in page.read_text()
    assert strict(ok(fedpriv("report", run, "--format", "json")))["runs"][0]["name"] == "small"
    assert len(table_of(ok(fedpriv("report", run, "--format", "csv")))) == 2
    text = tmp_path / "statement.md"
    assert ok(fedpriv("report", run, "--format", "md", "--output", text)) == ""
    assert text.read_text() == ok(fedpriv("report", run, "--format", "md"))


def test_bad_reports_are_one_line(fedpriv, run, tmp_path):
    (tmp_path / "empty").mkdir()
    nowhere = tmp_path / "no" / "where"
    assert_one_line(fedpriv("report", tmp_path / "empty"), "not a run directory")
    assert_one_line(fedpriv("report", run, "--format", "pdf"), "--format", "html")
    assert_one_line(fedpriv("report", run, "--output", nowhere), "cannot write")
    assert_one_line(fedpriv("report", run, "--format", "md", "--output", nowhere), "--output")
