"""Every place that says an ε of a run that a tuning chose says what the tuning cost."""

import dataclasses
import io
import json
import re
import shutil

import pytest
from dp_accounting.rdp import RdpAccountant
from in_process import SMALL
from matplotlib.axes import Axes
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner

import fedpriv
from fedpriv.cli import app
from fedpriv.errors import InputError
from fedpriv.privacy.charging import charge
from fedpriv.privacy.composition import merge
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.sampling import Adjacency
from fedpriv.privacy.trials import Trials
from fedpriv.reporting.conclusion import conclusion
from fedpriv.reporting.ledgers import open_ledger
from fedpriv.reporting.overview import overview
from fedpriv.reporting.picture import write_picture
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import privacy_statement
from fedpriv.reporting.summary import summary_table
from fedpriv.tuning import tune

EXPERIMENT = fedpriv.Experiment(**SMALL).with_(
    {"rounds": 2, "evaluation.every": 1, "privacy.accountants": ["rdp", "pld"]}
)
GRID = {"server.lr": [0.01, 0.02, 0.05]}
SAMPLINGS = {
    "poisson": {},
    "fixed_size": {"privacy.sampling": {"kind": "fixed_size", "expected_cohort": 4}},
    "correlated": {"privacy.mechanism": {"kind": "correlated", "bands": 2}},
    "blt": {
        "privacy.mechanism": {"kind": "correlated", "bands": 2, "factorization": "blt"},
        "privacy.sampling": {"kind": "min_separation", "rounds": 4, "expected_cohort": 4},
    },
}


class Tuned:
    """A tuning of two trials: what its best run's places must say, and must not."""

    def __init__(self, folder, changes, monkeypatch):
        self.folder = folder / "tuning"
        experiment = EXPERIMENT.with_(changes)
        with monkeypatch.context() as patched:
            patched.setattr(Trials, "draw", lambda self, generator: 2)
            found = tune(experiment, GRID, "geometric", 3.0, run_dir=self.folder, progress=False)
        self.path, self.cost = found.best.path, found.cost
        (self.loser,) = set((self.folder / "simulation_only").iterdir()) - {self.path}
        self.own = self.costs(open_ledger(self.path).account.own_events())

    @staticmethod
    def costs(events):
        cost = charge(events, adjacency_of(events), [1e-3]).first
        return [each for each in (cost.epsilon_rdp, cost.epsilon_pld) if each is not None]


def adjacency_of(events):
    replaced = any("WithoutReplacement" in str(event) for event in events)
    return Adjacency.REPLACE_ONE if replaced else Adjacency.ADD_OR_REMOVE_ONE


@pytest.fixture(scope="module", params=SAMPLINGS.values(), ids=list(SAMPLINGS))
def tuned(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Tuned(tmp_path_factory.mktemp("tuned"), request.param, monkeypatch)


def asked(*words):
    """What a command prints, on whatever stream; its reason where it refuses."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    refused = f" {done.exception}" if isinstance(done.exception, InputError) else ""
    assert done.exit_code == 0 or refused, done.output
    return done.output + refused


def statement_of(path):
    run = read_run(path)
    return run, privacy_statement(run, spent(run))


def exported(path, tmp_path):
    out = tmp_path / "exported"
    asked("export", path, "--out", out)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        return json.dumps(file.metadata()) + (out / "README.md").read_text()


def page(paths, tmp_path):
    out = tmp_path / "page.html"
    said = asked("report", *paths, "--output", out)
    # Coordinates and digests are no ε.
    return said + re.sub(r"<path.*?>|<use.*?>|[0-9a-f]{16,}", "", out.read_text())


def table(path):
    console = Console(record=True, width=250, file=io.StringIO())
    console.print(summary_table([path]))
    return console.export_text()


def concluded(path):
    run = read_run(path)
    return conclusion(run, spent(run))


def headline(path):
    return str(statement_of(path)[1])


def plain(path):
    return str(overview(*statement_of(path)))


def of_python(path):
    run = fedpriv.Run.open(path)
    try:
        said = f"{run.epsilon():.3f}" if run.epsilon() else ""
    except InputError as refused:
        said = str(refused)
    columns = run.metrics.columns
    assert not [name for name in columns if name.startswith(("epsilon", "groups"))]
    return said + str(run.metrics) + str(fedpriv.compare([run]).drop(columns="run").to_dict())


def drawn(path, monkeypatch):
    """The heights of all lines of the picture."""
    heights = []

    def keep(method):
        def kept(self, *values, **options):
            heights.extend(map(float, _flat(values)))
            return method(self, *values, **options)

        return kept

    monkeypatch.setattr(Axes, "axhline", keep(Axes.axhline))
    monkeypatch.setattr(Axes, "plot", keep(Axes.plot))
    write_picture(path)
    return " ".join(epsilon_text(height) for height in heights)


def _flat(values):
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        elif not isinstance(value, str):
            yield value


PLACES = {
    "statement": lambda path, other, tmp_path, patch: headline(path),
    "overview": lambda path, other, tmp_path, patch: plain(path),
    "conclusion": lambda path, other, tmp_path, patch: concluded(path),
    "summary": lambda path, other, tmp_path, patch: table(path),
    "page": lambda path, other, tmp_path, patch: page([path], tmp_path),
    "comparison": lambda path, other, tmp_path, patch: page([path, other], tmp_path),
    "md": lambda path, other, tmp_path, patch: render([path], "md"),
    "comparison md": lambda path, other, tmp_path, patch: render([path, other], "md"),
    "json": lambda path, other, tmp_path, patch: render([path], "json"),
    "csv": lambda path, other, tmp_path, patch: render([path], "csv"),
    "python": lambda path, other, tmp_path, patch: of_python(path),
    "export": lambda path, other, tmp_path, patch: exported(path, tmp_path),
    "show": lambda path, other, tmp_path, patch: asked("ledger", "show", path),
    "show json": lambda path, other, tmp_path, patch: asked(
        "ledger", "show", path, "--format", "json"
    ),
    "verify": lambda path, other, tmp_path, patch: asked("ledger", "verify", path),
    "verify json": lambda path, other, tmp_path, patch: asked(
        "ledger", "verify", path, "--format", "json"
    ),
    "merge": lambda path, other, tmp_path, patch: asked("ledger", "merge", path),
    "merge json": lambda path, other, tmp_path, patch: asked(
        "ledger", "merge", path, "--format", "json"
    ),
    "resume": lambda path, other, tmp_path, patch: asked("resume", path),
    "picture": lambda path, other, tmp_path, patch: drawn(path, patch),
    "registry": lambda path, other, tmp_path, patch: asked("export", path, "--to", "registry"),
    "validate": lambda path, other, tmp_path, patch: asked(
        "config", "validate", path / "config.yaml"
    ),
    "audit": lambda path, other, tmp_path, patch: asked("audit", path / "config.yaml"),
}
#: Of a simulation there is no entry, and of a trial's config alone no ε.
SILENT = {"registry", "validate", "audit"}


def says(text, epsilon):
    """Whether a text has ε, rounded up or in all its digits."""
    digits = {epsilon_text(epsilon), f"{epsilon:.5f}"[:-1], f"{epsilon:.3f}"}
    return any(re.search(rf"(?<![\d.]){re.escape(each)}", text) for each in digits)


@pytest.mark.parametrize("place", PLACES)
def test_every_place_says_the_tunings_price_of_its_best_run(place, tuned, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(tuned.path, copy)
    (copy / "config.yaml").write_text(
        (copy / "config.yaml").read_text().replace(str(tuned.path), str(copy))
    )
    text = PLACES[place](tuned.path, copy, tmp_path, monkeypatch)
    assert place in SILENT or says(text, tuned.cost.epsilon), text
    assert not [own for own in tuned.own if says(text, own)], text


@pytest.mark.parametrize("place", PLACES)
def test_no_place_says_an_epsilon_of_a_trial_that_was_not_chosen(
    place, tuned, tmp_path, monkeypatch
):
    text = PLACES[place](tuned.loser, tuned.path, tmp_path, monkeypatch)
    assert not [own for own in tuned.own if says(text, own)], text
    if not place.startswith("comparison"):
        assert not says(text, tuned.cost.epsilon), text


# ---------------------------------------------------------------- what is beside the ledger


def copied(tuned, tmp_path, *names):
    """A folder with some files of the best run."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in names:
        shutil.copy(tuned.path / name, folder)
    return folder


def test_a_copy_says_the_price_as_far_as_the_file_beside_it_went(tuned, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(tuned.path, folder)
    assert fedpriv.Run.open(folder).epsilon() == pytest.approx(tuned.cost.epsilon)
    text = render([folder], "md")
    assert "It counts all tunings that its folder had when it was chosen." in text
    alone = copied(tuned, tmp_path / "copied", "ledger.jsonl", "tuned.json")
    assert says(asked("ledger", "show", alone), tuned.cost.epsilon)


def test_a_ledger_alone_says_that_it_is_of_a_trial(tuned, tmp_path):
    folder = copied(tuned, tmp_path, "ledger.jsonl")
    other = shutil.copy(folder / "ledger.jsonl", tmp_path / "other.jsonl")
    for path in (folder, other):
        for command in ("show", "verify", "merge"):
            told = asked("ledger", command, path)
            assert "it is a trial of a tuning, and what choosing it cost is not recorded" in told
            assert "\n" not in told.strip()


def test_nothing_is_claimed_where_the_file_beside_it_says_less_or_is_another_runs(tuned, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(tuned.path, folder)
    told = json.loads((folder / "tuned.json").read_text())
    (one,) = told["tunings"]

    def written(**changes):
        (folder / "tuned.json").write_text(json.dumps({**told, **changes}))

    quieter = [{**each, "event": {"noise_multiplier": 50.0}, "times": 1} for each in one["charged"]]
    cases = {
        "CONTRADICTS": [
            {"epsilon": told["epsilon"] / 2},
            {"tunings": [{**one, "mean": 1.5}]},
            {"tunings": [{**one, "charged": quieter}]},
        ],
        "of another trial": [{"trial": 7}, {"delta": 0.5}],
        "not what a tuning writes": [{"tunings": []}, {"tunings": None}, {"tunings": [{}]}],
    }
    for reason, changes in cases.items():
        for each in changes:
            written(**each)
            with pytest.raises(InputError, match=rf"tuned.json.*{reason}") as refused:
                read_run(folder)
            assert "\n" not in str(refused.value)
            with pytest.raises(InputError, match=reason):
                open_ledger(folder)


# ---------------------------------------------------------------- beside other runs


def test_with_another_run_the_tuning_composes(tuned, tmp_path):
    config = fedpriv.Run.open(tuned.path).config
    document = config.document() | {"trial": 0, "seed": 99, "run_dir": None}
    other = fedpriv.Experiment(**document).train(run_dir=tmp_path / "other", progress=False)
    accounts = [open_ledger(path).account for path in (tuned.path, other.path)]
    found = merge(accounts).total.first
    accountant = RdpAccountant(neighboring_relation=accounts[0].adjacency.relation)
    for account in accounts:
        for event, count in account.events().items():
            accountant.compose(event, count)
    assert found.accountant == "rdp"
    assert found.epsilon == pytest.approx(accountant.get_epsilon(1e-3), rel=1e-6)
    assert found.epsilon > tuned.cost.epsilon


def test_two_tunings_of_one_source_are_not_merged(tuned, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(tuned.path, first)
    told = json.loads((first / "tuned.json").read_text())
    accounts = [open_ledger(path).account for path in (tuned.path, first)]
    other = dataclasses.replace(accounts[1], releases=accounts[1].releases[:0], name="other")
    header = dataclasses.replace(other.header, fingerprint="another")
    assert told["tunings"][0]["source"] == accounts[0].tunings[0].source > 0
    with pytest.raises(InputError, match="chosen by one tuning, or by two that began with one"):
        merge([accounts[0], dataclasses.replace(other, header=header)])
