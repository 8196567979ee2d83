"""The files that a report makes."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedpriv.cli import app
from fedpriv.errors import InputError
from fedpriv.reporting.report import render, write_report
from fedpriv.reporting.run_directory import RunDirectory, require_no_record

FINITE_EPSILON = re.compile(r"ε\s*(=|≤|<)\s*\d|id=\"epsilon-|ε (rdp|pld)", re.IGNORECASE)


class Page(HTMLParser):
    """Collects tags and attributes; a void of links to anywhere but the page itself is checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or ""
            for name, value in attrs
            if name in ("href", "src", "xlink:href", "action", "srcset", "poster", "data")
        ]


def test_the_page_loads_nothing(make_run) -> None:
    page = Page(write_report([make_run()]).read_text())
    assert "svg" in page.tags
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    text = write_report([make_run("other")]).read_text()
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?://|@import|url\((?!#)", without_namespaces)


def test_the_default_paths(make_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = make_run("one"), make_run("two")
    assert write_report([one]) == one / "report.html"
    assert write_report([one, two]) == Path("comparison.html")
    assert write_report([one], tmp_path / "mine.html") == tmp_path / "mine.html"
    assert not list(tmp_path.rglob("*.partial"))


def test_epsilon_can_be_found_by_a_program(make_run) -> None:
    path = make_run()
    text = write_report([path]).read_text()
    found = re.search(r'id="epsilon-rdp" data-accountant="rdp" value="([^"]+)"', text)
    assert found is not None
    assert float(found[1]) == json.loads(render([path], "json"))["runs"][0]["epsilon"]["rdp"]


def test_a_run_without_privacy_shows_no_epsilon_anywhere(make_run) -> None:
    path = make_run(privacy=None)
    for text in (write_report([path]).read_text(), render([path], "md")):
        assert "no privacy" in text.lower()
        assert not FINITE_EPSILON.search(text)
    run = json.loads(render([path], "json"))["runs"][0]
    assert (run["private"], run["epsilon"], run["delta"]) == (False, {}, None)
    assert all(row["epsilon"]["rdp"] is None for row in run["metrics"])


def test_the_check_above_would_find_an_epsilon(make_run) -> None:
    path = make_run()
    assert FINITE_EPSILON.search(write_report([path]).read_text())
    assert FINITE_EPSILON.search(render([path], "md"))


def test_what_users_write_is_escaped(make_run) -> None:
    hostile = "<script>alert('x')</script>"
    path = make_run(server={"options": {"note": hostile}})
    text = write_report([path]).read_text()
    assert hostile not in text
    assert "&lt;script&gt;" in text
    assert Page(text).tags.count("script") == 1


def test_contradictions_stand_in_a_banner(make_run) -> None:
    path = make_run()
    metrics = path / "metrics.jsonl"
    metrics.write_text(re.sub(r'"rdp": [\d.]+', '"rdp": 0.001', metrics.read_text()))
    text = write_report([path]).read_text()
    assert '<p class="banner" role="alert"><strong>Contradiction.</strong>' in text


def test_json_is_strict(make_run) -> None:
    path = make_run()
    metrics = path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": 2.0', '"loss": NaN'))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    run = json.loads(render([path], "json"), parse_constant=refuse)["runs"][0]
    assert run["metrics"][0]["simulation_only"]["loss"] is None
    assert set(run) >= {"config", "epsilon", "releases", "metrics", "statement", "environment"}
    assert len(run["releases"]) == 6
    write_report([path])


def test_csv_has_a_row_for_each_run_and_round(make_run) -> None:
    private, other = make_run("a"), make_run("b", privacy=None)
    rows = list(csv.DictReader(io.StringIO(render([private, other], "csv"))))
    assert len(rows) == 12
    assert float(rows[0]["epsilon.rdp"]) > 0
    assert rows[-1]["epsilon.rdp"] == ""
    assert rows[1]["held_out.accuracy"] == "0.6"
    assert not any("block" in name for name in rows[0])


def test_several_runs_share_their_figures(make_run, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", privacy=None), make_run("c", rounds=3)]
    text = write_report(runs, tmp_path / "all.html").read_text()
    assert "3 runs compared" in text
    assert [text.count(f'id="run-{mark}"') for mark in "ABCD"] == [1, 1, 1, 0]
    assert text.count('<figure id="epsilon">') == 1
    ids = re.findall(r'\bid="([^"]+)"', re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    assert len(ids) == len(set(ids))


def test_one_round_is_enough(make_run) -> None:
    assert "Not measured" not in write_report([make_run(rounds=1)]).read_text()


@pytest.mark.parametrize("format", ["md", "json", "csv"])
def test_nothing_to_report_is_refused(format, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run"):
        render([], format)
    with pytest.raises(InputError, match="not a run directory"):
        render([tmp_path], format)


def test_an_output_that_cannot_be_written_is_refused(make_run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write the report"):
        write_report([make_run()], tmp_path / "missing" / "report.html")


@pytest.mark.parametrize("format", ["html", "md"])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ledger.jsonl", "is a record of the run"),
        ("metrics.jsonl", "is a record of the run"),
        ("config.yaml", "is a record of the run"),
        ("checkpoints/round-1.pt", "is a record of the run"),
        ("checkpoints", "is a folder; name a file in it"),
        ("", "is a folder; name a file in it"),
    ],
)
def test_a_report_is_written_over_no_record_of_a_run(tmp_path, name, problem, format):
    (tmp_path / "checkpoints").mkdir()
    target = tmp_path / name
    if not target.is_dir():
        target.write_text("kept")
    with pytest.raises(InputError, match=f"--output: .* {problem}"):
        require_no_record(target, "--output")
    asked = CliRunner().invoke(
        app, ["report", str(tmp_path), "--format", format, "--output", str(target)]
    )
    assert isinstance(asked.exception, InputError)
    assert "--output" in str(asked.exception)
    assert target.is_dir() or target.read_text() == "kept"


@pytest.mark.parametrize("format", ["html", "md", "json", "csv"])
def test_a_report_is_written_over_a_report_and_over_nothing_of_somebody_elses(
    make_run, tmp_path, format
):
    target = tmp_path / f"mine.{format}"
    asked = ["report", str(make_run()), "--format", format, "--output", str(target)]

    def written():
        return CliRunner().invoke(app, asked)

    # What `mktemp` makes, a first report, and one over it.
    target.touch()
    for _ in range(2):
        assert written().exit_code == 0
        assert target.stat().st_size > 500
    # One of another format, too: it is fedpriv's as well.
    for other in {"html", "md", "json", "csv"} - {format}:
        again = CliRunner().invoke(app, [*asked[:3], other, *asked[4:]])
        assert again.exit_code == 0
    for theirs in (
        "rounds: 3\n",
        "# Notes\n",
        '{"runs": []}',
        '{"runs": [{}]}',
        "[1]",
        "run,loss\n1,2\n",
    ):
        target.write_text(theirs)
        refused = written().exception
        assert isinstance(refused, InputError)
        assert str(refused) == (
            f"--output: {target} is there already, and fedpriv did not write it; name another file"
        )
        assert target.read_text() == theirs


def test_a_comparison_and_a_report_from_python_are_written_over_no_other_page(
    make_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    runs = [make_run("one"), make_run("two")]
    mine = Path("comparison.html")
    mine.write_text("<!doctype html><title>mine</title>")
    for given, output in ((runs, None), (runs[:1], mine)):
        with pytest.raises(InputError, match=r"comparison\.html is there already"):
            write_report(given, output)
    assert "mine" in mine.read_text()
    # The run's own page is written anew, whoever touched it.
    (runs[0] / "report.html").write_text("changed")
    assert "<svg" in write_report(runs[:1]).read_text()


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_an_output_without_a_name_is_a_folder(name):
    with pytest.raises(InputError, match=r"--output: \S+ is a folder; name a file in it"):
        require_no_record(Path(name), "--output")


def test_metrics_that_cannot_be_read_are_named(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1: not the metrics of a round"):
        run.read_metrics()
    run.metrics.unlink()
    run.metrics.mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be read \(Is a directory\)"):
        run.read_metrics()
