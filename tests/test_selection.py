"""The best model is kept, and a run ends early, by public measures of what it released."""

import json
import shutil
from collections import Counter

import pytest
from in_process import (
    SILOS,
    InProcessGrid,
    Silent,
    drive_on,
    resume_small,
    small_config,
    train_small,
)
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import fedpriv
from fedpriv import experiment
from fedpriv.cli import app
from fedpriv.data.facts import DataFacts
from fedpriv.errors import InputError, Interrupted
from fedpriv.privacy.charging import charge
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.ledger import read_ledger
from fedpriv.reporting.ledgers import open_ledger
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import spent
from fedpriv.reporting.statement import privacy_statement
from fedpriv.reporting.summary import summary_table
from fedpriv.selection import ends, require_public, selection
from fedpriv.tasks.quality import ACCURACY, WORD_ERROR_RATE

# So small a rate changes no accuracy: round 1 stays the best.
STILL = {"server": {"optimizer": "sgd", "lr": 1e-12}, "evaluation": {"every": 1}}
MOVING = {"server": {"optimizer": "adam", "lr": 0.5}, "evaluation": {"every": 1}, "rounds": 5}


def with_evaluation(changes, **evaluation):
    return changes | {"evaluation": {**changes["evaluation"], **evaluation}}


def row(round_, value, quality=ACCURACY):
    return {"round": round_, "held_out": {quality.key: value}, "quality": quality.record()}


@pytest.mark.parametrize(
    ("quality", "values", "best", "waited"),
    [
        (ACCURACY, [0.1, 0.3, 0.3, 0.2], 2, 2),
        (WORD_ERROR_RATE, [0.9, 0.4, 0.5], 2, 1),
        (ACCURACY, [float("nan"), 0.1, None], 2, 1),
        (ACCURACY, [0.1, 0.2], 2, 0),
    ],
)
def test_the_best_is_the_first_of_equals_in_the_measures_direction(quality, values, best, waited):
    rows = [row(number, value, quality) for number, value in enumerate(values, start=1)]
    found = selection([*rows, {"round": 9}])
    assert (found.round, found.waited, found.measured) == (best, waited, len(values))
    patient = small_config(evaluation={"stop_after": waited + 1})
    assert not ends(patient, rows)
    assert waited == 0 or ends(small_config(evaluation={"stop_after": waited}), rows)


def test_measures_that_are_no_numbers_end_a_run_and_are_never_the_best():
    rows = [row(1, float("nan")), row(2, None)]
    assert selection(rows) is None
    assert ends(small_config(evaluation={"stop_after": 2}), rows)


def test_the_best_checkpoint_is_kept_beside_the_newest_and_changes_no_release(tmp_path):
    plain, _ = train_small(tmp_path / "plain", **MOVING, checkpoint={"keep": 5})
    kept, _ = train_small(
        tmp_path / "kept", **with_evaluation(MOVING, keep_best=True), checkpoint={"keep": 1}
    )
    digests = [[each.digest for each in read_ledger(d.ledger).releases] for d in (plain, kept)]
    assert digests[0] == digests[1]
    rows = kept.read_metrics()
    best = max(rows, key=lambda each: (each["held_out"]["accuracy"], -each["round"]))["round"]
    assert 1 < best < 5, "the example must have its best model in between"
    expected = load_file(plain.checkpoints / f"round-{best:06d}.safetensors")
    found = load_file(kept.best)
    assert all(found[name].equal(expected[name]) for name in expected)
    assert not plain.best.exists()


class StopsAfter(Silent):
    """Ctrl-C as soon as a round is on the disk, before its model can be kept as the best."""

    def __init__(self, round_):
        super().__init__()
        self.round = round_

    def finished(self, row):
        if row["round"] == self.round:
            raise Interrupted("now")


@pytest.mark.parametrize("changes", [{}, SILOS | {"rounds": 5}], ids=["users", "silos"])
def test_a_resumed_run_keeps_and_ends_as_one_that_was_never_stopped(tmp_path, changes):
    settings = {**MOVING, **changes, "evaluation__every": 1}
    settings.pop("evaluation")
    settings |= {"evaluation__keep_best": True, "evaluation__stop_after": 2, "rounds": 8}
    whole, _ = train_small(tmp_path / "whole", **settings)
    last = whole.read_metrics()[-1]["round"]
    for round_ in range(1, last + 1):
        folder = tmp_path / f"stopped-{round_}"
        prepared = experiment.prepare(small_config(run_dir=str(folder), **settings))
        directory = experiment.create(prepared)
        with pytest.raises(Interrupted):
            experiment.train(prepared, directory, StopsAfter(round_), drive_on(None))
        resume_small(folder)
        found, expected = load_file(directory.best), load_file(whole.best)
        assert all(found[name].equal(expected[name]) for name in expected)
        measured = [[each["held_out"] for each in d.read_metrics()] for d in (directory, whole)]
        assert measured[0] == measured[1]


def test_a_run_ends_when_nothing_gets_better_and_pays_for_no_round_after(tmp_path):
    grid = InProcessGrid()
    settings = with_evaluation(STILL, stop_after=2)
    directory, _ = train_small(tmp_path / "run", grid, rounds=6, **settings)
    assert [each["round"] for each in directory.read_metrics()] == [1, 2, 3]
    assert [each.round for each in read_ledger(directory.ledger).releases] == [1, 2, 3]
    assert len([m for m in grid.sent if m.metadata.message_type == "train"]) == 3 * 2
    _, again = resume_small(tmp_path / "run")
    assert again.finished
    assert again.finished_rounds == 3

    said = " ".join(s for section in read_statement(directory).sections for s in section.sentences)
    assert "The run ended after round 3 of 6, when 2 evaluations" in said
    assert spent(read_run(train_small(tmp_path / "all", **STILL)[0].path)).charged == {}


CORRELATED = {"privacy__mechanism": {"kind": "correlated", "bands": 2}}
BLT = {
    "privacy__mechanism": {"kind": "correlated", "bands": 2, "factorization": "blt"},
    "privacy__sampling": {"kind": "min_separation", "rounds": 4, "expected_cohort": 4},
}
FIXED = {"privacy__sampling": {"kind": "fixed_size", "expected_cohort": 4}}
OWN = {"privacy__noise_by": "users"}


CASES = {
    "users": {},
    "correlated": CORRELATED,
    "blt": BLT,
    "fixed_size": FIXED,
    "own_noise": OWN,
    "silos": SILOS,
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def ended(request, tmp_path):
    """A run that ended after 3 of 6 rounds; its ε by the plan, and what is charged."""
    settings = with_evaluation(STILL, stop_after=2) | {"rounds": 6}
    changes = {
        key: each for key, each in request.param.items() if key.split("__")[0] not in settings
    }
    directory, prepared = train_small(tmp_path / "run", InProcessGrid(), **settings, **changes)
    ledger = read_ledger(directory.ledger).releases
    assert len(ledger) == len(directory.read_metrics()) == 3
    mechanism, paid = prepared.plan.mechanism, prepared.plan.mechanism.paid(6)
    if ledger[0].silos is not None or ledger[0].users is not None:
        # Whoever paid most of the first three rounds might have had the other three as well.
        paid = max(Counter(payer for each in ledger for payer in each.payers).values()) + 3
    cost = charge({mechanism.event(): paid}, mechanism.adjacency, [prepared.plan.delta], ["rdp"])
    return directory, cost.first.epsilon, directory.read_metrics()[-1]["epsilon"]["rdp"]


def test_of_a_run_that_ended_early_every_place_says_what_was_promised(ended):
    directory, promised, charged = ended
    shown = epsilon_text(promised)
    assert charged < promised
    run = fedpriv.Run.open(directory.path)
    assert run.epsilon() == pytest.approx(promised)
    assert fedpriv.compare([run])["epsilon"].item() == run.epsilon()
    statement = read_statement(directory)
    assert f"({shown}, " in statement.headline
    assert [each.shown for each in statement.guarantees] == [shown]
    assert f"come to ε = {epsilon_text(charged)}, which nobody promised" in str(statement)
    costs = spent(run._read).costs
    assert costs is None or costs.worst == pytest.approx(promised)

    document = json.loads(asked("ledger", "show", directory, "--format", "json"))
    assert document["epsilon_rdp"] == pytest.approx(promised)
    for command in ("show", "verify", "merge"):
        told = asked("ledger", command, directory)
        assert shown in told
        assert epsilon_text(charged) not in told
    assert shown in asked("report", directory, "--format", "md").split("\n## ")[0]
    console = Console(record=True, width=250)
    console.print(summary_table([directory.path]))
    table = console.export_text()
    assert shown in table
    assert epsilon_text(charged) not in table
    assert "ended early: ε is that of all rounds that it might have had" in table


@pytest.mark.parametrize(("left", "checkpoints"), [(2, True), (0, True), (0, False)])
def test_nothing_is_claimed_where_nobody_knows_whether_a_run_ended_early(
    tmp_path, left, checkpoints
):
    settings = with_evaluation(STILL, stop_after=2) | {"rounds": 6}
    directory, _ = train_small(tmp_path / "run", InProcessGrid(), **settings, **CASES["users"])
    lines = directory.metrics.read_text().splitlines(keepends=True)
    directory.metrics.write_text("".join(lines[:left]))
    if not checkpoints:
        shutil.rmtree(directory.checkpoints)
    assert open_ledger(directory.path).missing
    for command in ("verify", "merge"):
        done = CliRunner().invoke(app, ["ledger", command, str(directory.path)])
        assert isinstance(done.exception, InputError)
        assert "IS NOT COMPLETE: metrics.jsonl lacks round" in str(done.exception)


def asked(*words):
    """What a command prints on standard output."""
    *words, last = [str(each.path if hasattr(each, "path") else each) for each in words]
    done = CliRunner().invoke(app, [*words, last])
    assert done.exit_code == 0, done.output
    return done.stdout


def read_statement(directory):
    run = read_run(directory.path)
    return privacy_statement(run, spent(run))


def test_what_is_asked_for_is_the_best_model_where_it_was_kept(tmp_path):
    directory, _ = train_small(tmp_path / "run", **with_evaluation(MOVING, keep_best=True))
    run, best = fedpriv.Run.open(directory.path), read_run(directory.path).selection.round
    states = {which: run.model(which).state_dict() for which in (None, "best", "last")}
    assert all(states[None][name].equal(states["best"][name]) for name in states["best"])
    assert not all(states["last"][name].equal(states["best"][name]) for name in states["best"])

    out = CliRunner().invoke(app, ["export", str(directory.path), "--out", str(tmp_path / "best")])
    assert out.exit_code == 0, out.output
    card = (tmp_path / "best" / "README.md").read_text()
    assert f"It is that of round {best}, the best by its held-out measure." in card
    assert f"The model of round {best} of 5 is kept as the best of 5 measured ones" in card
    value = directory.read_metrics()[best - 1]["held_out"]["accuracy"]
    assert f"value: {value}" in card
    exported = load_file(tmp_path / "best" / "model.safetensors")
    assert all(exported[name].equal(states["best"][name]) for name in exported)

    refused = CliRunner().invoke(app, ["predict", str(directory.path), "x.npy", "--round", "3"])
    assert str(refused.exception) == "--round: write last or best, not 3"
    plain, _ = train_small(tmp_path / "plain", **STILL)
    with pytest.raises(
        InputError, match=r"kept no best model \(evaluation.keep_best\); write last"
    ):
        fedpriv.Run.open(plain.path).model("best")


def test_a_best_model_that_is_not_the_best_by_the_metrics_is_refused_until_mended(tmp_path):
    directory, _ = train_small(tmp_path / "run", **with_evaluation(MOVING, keep_best=True))
    rows = directory.read_metrics()
    rows[-1]["held_out"]["accuracy"] = 1.0
    directory.metrics.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(InputError, match="round 5 was better: fedpriv resume"):
        experiment.reopen_model(directory.path)
    resume_small(directory.path)
    assert experiment.reopen_model(directory.path).finished_rounds == 5


@pytest.mark.parametrize("key", ["keep_best", "stop_after"])
@pytest.mark.parametrize(("whose", "why"), [("same", "users themselves"), ("unknown", "facts")])
def test_examples_of_users_choose_no_model_of_a_private_run(key, whose, why):
    settings = {"keep_best": True, "stop_after": 3}
    config = small_config(evaluation={key: settings[key]})
    with pytest.raises(InputError, match=rf"^evaluation\.{key}: .*{why}.*leave evaluation\.{key}"):
        require_public(config, DataFacts(held_out=whose))
    for public in ("others", "unnamed", "made_up"):
        require_public(config, DataFacts(held_out=public))
    require_public(small_config(), DataFacts(held_out=whose))
    require_public(small_config(evaluation={key: settings[key]}, privacy=None), DataFacts())
