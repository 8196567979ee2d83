"""What users' own values say is marked wherever it is written or printed: every sink is walked.

The users' sizes are numbers that nothing else has, and what is measured of users in a round has all
its digits, so that a value is known by its text.
"""

import dataclasses
import io
import json
import logging
import re
import threading

import numpy as np
import pytest
from audited import Unseen
from in_process import InProcessGrid, drive_on, small_config
from rich.console import Console
from safetensors import safe_open

from fedpriv import counting, experiment
from fedpriv.audit import AuditSettings, audit
from fedpriv.data.digits import build_digits
from fedpriv.data.options import DealtOptions
from fedpriv.data.registry import DATASETS
from fedpriv.flower_app import LogLines
from fedpriv.reporting import audit as audits
from fedpriv.reporting import ledgers
from fedpriv.reporting.progress import ProgressLines
from fedpriv.reporting.report import render, write_report
from fedpriv.reporting.strict_json import to_json
from fedpriv.reporting.summary import summary_table

SIZES = [173, 3, *[17] * 58]  # 1162 in all


def build_odd(options: DealtOptions, seed: int):
    """Digits dealt to users of those sizes."""
    dealt = build_digits(options, seed)
    parts = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    told = counting.in_words(SIZES, "training example")
    return dataclasses.replace(dealt, parts=parts, sizes=told)


class Watched:
    """Prints as the command line does, and logs as under Flower."""

    def __init__(self, text):
        self.lines, self.log = ProgressLines(Console(file=text, width=400)), LogLines()

    def begin(self, prepared):
        self.lines.begin(prepared)
        self.log.begin(prepared)

    def finished(self, row):
        self.lines.finished(row)
        self.log.finished(row)

    def say(self, sentence):
        self.lines.say(sentence)


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run directory and all that was printed: `(path, {sink: text})`."""
    printed, logged = io.StringIO(), io.StringIO()
    console = Console(file=printed, width=400)
    handler = logging.StreamHandler(logged)
    logging.getLogger("flwr").addHandler(handler)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(DATASETS.registered, "odd", build_odd)
        config = small_config(
            run_dir=str(tmp_path_factory.mktemp("left") / "run"),
            data={"name": "odd", "users": 60, "partition": {"kind": "iid"}},
            privacy__error_feedback={"kind": "user"},
            runtime={"workers": 2, "profile": True},
        )
        prepared = experiment.prepare(config)
        directory = experiment.create(prepared)
        with (observer := Watched(printed)).lines:
            experiment.train(prepared, directory, observer, drive_on(InProcessGrid()))
        plain = config.privacy.model_copy(
            update={"error_feedback": type(config.privacy.error_feedback)()}
        )
        audited = config.model_copy(update={"privacy": plain})
        found = audit(audited, AuditSettings(60, rounds=1), Unseen(), threading.Event())
        logging.getLogger("flwr").removeHandler(handler)
        path = directory.path
        audits.write_audit(path, found)
        console.print(audits.audit_table(found))
        console.print(audits.audit_verdict(found))
        console.print(prepared.profile.table())
        console.print(summary_table([path]))
        opened = ledgers.open_ledger(path)
        console.print(ledgers.ledger_table(opened, opened.account.bill(1e-3)))
        console.print(ledgers.verified_lines(ledgers.verify(path)))
        write_report([path])
        texts = {
            "terminal": printed.getvalue(),
            "log": logged.getvalue(),
            "markdown": render([path], "md"),
            "csv": render([path], "csv"),
            "json": render([path], "json"),
            "ledger verify": to_json(ledgers.verified_document(ledgers.verify(path))),
            "config.yaml": (path / "config.yaml").read_text(),
            "report.html": (path / "report.html").read_text(),
        }
        yield path, texts


def private_values(path):
    """The texts by which users' values are known, of sizes, rounds and scores."""
    values = {str(number) for number in (173, 1162)} | {"1,162"}
    for line in (path / "metrics.jsonl").read_text().splitlines():
        seen = json.loads(line)["simulation_only"]
        numbers = [seen[key] for key in ("loss", "norm", "users_per_second", "memory_norm")]
        values |= {repr(number) for number in numbers} | {f"{numbers[0]:.3f}"}
        values |= {repr(number) for number in seen["block_norms"].values() if number}
    users = json.loads((path / "audit.json").read_text())["simulation_only"]["users"]
    return values | {repr(users["auc"]), f"AUC {users['auc']:.3f}"}


def holds(text, values):
    # Not within a digest.
    return [v for v in values if re.search(rf"(?<![\w.]){re.escape(v)}(?![\da-f])", text)]


def unmarked(document):
    """A document without what is marked, and without a trace's clock, which may say any number."""
    if isinstance(document, dict):
        if document.get("cat") == "simulation_only":
            return {}
        left_out = ("simulation_only", "ts", "dur")
        return {k: unmarked(v) for k, v in document.items() if k not in left_out}
    return [unmarked(each) for each in document] if isinstance(document, list) else document


def test_the_values_are_there_to_be_found(left):
    path, texts = left
    values = private_values(path)
    assert {"173", "1162"} <= set(holds((path / "environment.json").read_text(), values))
    for sink in ("terminal", "markdown", "csv", "json", "report.html"):
        assert holds(texts[sink], values), sink


def test_every_file_that_a_run_leaves_is_one_that_is_walked(left):
    path, _ = left
    assert {file.name for file in path.iterdir() if not file.name.startswith(".")} == {
        *("config.yaml", "environment.json", "ledger.jsonl", "metrics.jsonl", "audit.json"),
        *("trace.json", "checkpoints", "report.html"),
        "memory",  # users' own, which the statement says are in no ε
    }


@pytest.mark.parametrize(
    "name", ["environment.json", "audit.json", "trace.json", "metrics.jsonl", "ledger.jsonl"]
)
def test_no_file_has_users_values_that_are_not_marked(left, name):
    path, _ = left
    text = (path / name).read_text()
    lines = text.splitlines() if name.endswith("l") else [text]
    kept = json.dumps([unmarked(json.loads(line)) for line in lines])
    assert holds(kept, private_values(path)) == []
    if name == "trace.json":
        assert "train" not in kept
        assert "wait for workers" in kept


def test_checkpoints_say_nothing_of_users_beside_the_model(left):
    path, _ = left
    for file in (path / "checkpoints").iterdir():
        with safe_open(file, framework="pt") as opened:
            assert holds(json.dumps(opened.metadata()), private_values(path)) == []


@pytest.mark.parametrize("sink", ["terminal", "log", "markdown", "config.yaml"])
def test_no_line_has_users_values_without_saying_so(left, sink):
    path, texts = left
    values = private_values(path)
    for line in texts[sink].splitlines():
        if holds(line, values):
            assert re.search("simulation[_ ]only", line), line


@pytest.mark.parametrize("sink", ["json", "ledger verify"])
def test_no_document_has_users_values_that_are_not_marked(left, sink):
    path, texts = left
    document = unmarked(json.loads(texts[sink]))
    for run in document.get("runs", []):
        marked = [s for s in run["statement"]["sections"] if s["key"] == "audit"]
        assert all("(simulation only)" in " ".join(s["sentences"]) for s in marked)
        run["statement"]["sections"] = [
            s for s in run["statement"]["sections"] if s["key"] != "audit"
        ]
    assert holds(json.dumps(document), private_values(path)) == []


def test_no_column_has_users_values_that_are_not_marked(left):
    path, texts = left
    head, *rows = (line.split(",") for line in texts["csv"].splitlines())
    kept = [i for i, name in enumerate(head) if "simulation_only" not in name]
    assert len(kept) < len(head)
    values = private_values(path)
    assert all(holds(row[i], values) == [] for row in rows for i in kept)


def test_no_part_of_the_page_has_users_values_without_saying_so(left):
    path, texts = left
    page = re.sub(r"<svg.*?</svg>", "", texts["report.html"], flags=re.DOTALL)
    page = re.sub(r"simulation_only:\n(  .*\n)+", "", page)  # of the environment
    values = private_values(path)
    for line in page.splitlines():
        if holds(line, values):
            assert re.search("simulation[_ ]only", line), line
    for figure in re.findall(r"<figure id=\"(?:cohort|throughput).*?</figure>", page, re.DOTALL):
        assert "simulation only" in figure


def test_statements_name_what_is_marked(left):
    _, texts = left
    logged = texts["markdown"].split("## What else was logged")[1].split("##")[0]
    for word in ("environment.json", "trace.json", "memory", "loss", "NOT covered by ε"):
        assert word in logged
