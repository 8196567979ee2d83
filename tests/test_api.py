import math
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from audited import Unseen
from in_process import SMALL
from torch import nn

import fedpriv
from fedpriv.api import _name
from fedpriv.audit import AuditSettings, audit
from fedpriv.errors import InputError
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.spent import spent
from fedpriv.training.checkpoint import checkpoint_files, load_checkpoint

EXPERIMENT = fedpriv.Experiment(**SMALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return EXPERIMENT.train(grid="local", run_dir=tmp_path_factory.mktemp("run") / "run")


def test_importing_it_imports_neither_torch_nor_flower():
    code = "import fedpriv, sys; assert not {'torch', 'flwr', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_experiment_never_changes(tmp_path):
    other = EXPERIMENT.with_({"privacy.clipping.bound": 0.5, "rounds": 2}, seed=9)
    assert (other.config.rounds, other.config.seed) == (2, 9)
    assert other.config.privacy.clipping.bound == 0.5
    assert other.config.privacy.delta == EXPERIMENT.config.privacy.delta
    assert EXPERIMENT.config.rounds == 4
    assert EXPERIMENT.config.privacy.clipping.bound == 0.1
    path = tmp_path / "small.yaml"
    path.write_text(other.config.to_yaml())
    loaded = fedpriv.Experiment.load(path, {"privacy.delta": 1e-4}, rounds=3)
    assert (loaded.config.rounds, loaded.config.privacy.delta) == (3, 1e-4)
    assert loaded.config.privacy.clipping.bound == 0.5


def test_what_it_is_changed_by_never_changes():
    clipping = {"kind": "global"}
    other = EXPERIMENT.with_({"privacy.clipping": clipping, "privacy.clipping.bound": 0.5})
    assert other.config.privacy.clipping.bound == 0.5
    assert clipping == {"kind": "global"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"privacy.clippin.bound": 1}, "clippin"),
        ({"rounds": 0}, "rounds"),
        ({"rounds.of": 1}, "rounds is a value, not a section"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(changes, told):
    with pytest.raises(InputError, match=told):
        EXPERIMENT.with_(changes)


def test_a_run_is_what_its_directory_says(run):
    read = read_run(run.path)
    assert list(run.metrics.index) == [1, 2, 3, 4]
    assert run.metrics["epsilon.rdp"].tolist() == [row["epsilon"]["rdp"] for row in read.rows]
    measured = run.metrics["held_out.accuracy"].dropna()
    assert measured.tolist() == list(read.measured.values)
    assert run.quality == measured.iloc[-1]
    assert len(run.ledger) == 4
    assert run.epsilon() == run.epsilon("rdp") == spent(read).epsilons["rdp"]
    assert run.delta == 1e-3
    assert run.report().read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(InputError, match="no ε by pld"):
        run.epsilon("pld")


def test_its_norms_by_block_add_up_to_the_whole(run):
    released = run.blocks["released_block_norms"].groupby("round").apply(lambda b: (b**2).sum())
    assert (released**0.5).tolist() == pytest.approx(run.metrics["aggregate_norm"].tolist())
    assert list(run.blocks.loc[1].index) == [name for name, _ in run.model().named_parameters()]
    seen = run._read.rows[-1]["simulation_only"]["block_norms"]
    assert run.blocks["simulation_only.block_norms"].loc[4].to_dict() == seen


def test_its_model_is_the_one_of_the_last_checkpoint(run):
    fingerprint = read_run(run.path).header.fingerprint
    checkpoint = load_checkpoint(checkpoint_files(run.path / "checkpoints")[-1], fingerprint)
    for name, parameter in run.model().named_parameters():
        assert torch.equal(parameter, checkpoint.tensors[f"parameter/{name}"])


def test_nothing_is_overwritten(run):
    before = (run.path / "ledger.jsonl").read_bytes()
    with pytest.raises(InputError, match="not empty"):
        EXPERIMENT.train(grid="local", run_dir=run.path)
    assert (run.path / "ledger.jsonl").read_bytes() == before
    with pytest.raises(InputError):
        fedpriv.Run.open(run.path / "nowhere")


def test_a_model_may_be_handed_over(tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = EXPERIMENT.with_(model=model, rounds=1).train("local", tmp_path / "run", False)
    found = dict(given.model().named_parameters())
    assert found.keys() == start.keys()
    assert any(not torch.equal(found[name], start[name]) for name in start)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_a_sweep_trains_all_and_keeps_each_runs_ledger(tmp_path):
    values = {"privacy.clipping.bound": [0.05, 0.1]}
    table = fedpriv.sweep(
        EXPERIMENT.with_(rounds=2), values, seeds=[5, 6], run_dir=tmp_path, progress=False
    )
    assert table[["privacy.clipping.bound", "seed"]].to_numpy().tolist() == [
        [0.05, 5],
        [0.05, 6],
        [0.1, 5],
        [0.1, 6],
    ]
    assert table["bound"].tolist() == pytest.approx([0.05, 0.05, 0.1, 0.1])
    assert table["epsilon"].nunique() == 1
    alone = EXPERIMENT.with_(rounds=2, seed=6).train("local", tmp_path / "alone", False)
    assert table["accuracy"].iloc[3] == alone.quality
    compared = fedpriv.compare([alone, *table["run"]])
    assert compared["accuracy"].tolist() == [alone.quality, *table["accuracy"]]
    assert compared["epsilon"].tolist() == [alone.epsilon()] * 5


def test_without_privacy_epsilon_is_infinite_and_none(tmp_path):
    plain = EXPERIMENT.with_(privacy=None, cohort=8, rounds=1)
    run = plain.train("local", tmp_path / "run", False)
    assert run.epsilon() is None
    assert run.epsilon("rdp") is None
    assert math.isinf(fedpriv.compare([run])["epsilon"].iloc[0])


def test_a_sweep_with_one_impossible_value_trains_nothing(tmp_path):
    with pytest.raises(InputError, match="bound"):
        fedpriv.sweep(EXPERIMENT, {"privacy.clipping.bound": [0.1, -1.0]}, run_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_sweep_goes_on_after_a_budget_stopped_one_of_its_runs(tmp_path):
    within = EXPERIMENT.with_(rounds=2).planned_cost().epsilon
    one = EXPERIMENT.with_({"privacy.budget.epsilon": within * 0.9}, rounds=2)
    values = {"privacy.noise_multiplier": [1.0, 2.0]}
    table = fedpriv.sweep(one, values, run_dir=tmp_path / "runs", progress=False)
    assert table["rounds"].tolist() == [1, 2]


def test_folders_of_a_sweep_have_names_for_any_value(tmp_path):
    assert _name(nn.Linear(2, 2), 1) == "number-1"
    assert _name("../up", 2) == "up"
    assert _name(0.05, 1) == "0.05"
    assert _name("x" * 300, 3) == "number-3"


def test_two_models_of_one_class_are_two_models(tmp_path):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    first, second = (EXPERIMENT.with_(model=model, rounds=1) for model in (wide, narrow))
    assert first.config.model.name != second.config.model.name
    assert EXPERIMENT.with_(model=narrow).config.model.name == second.config.model.name
    run = first.train("local", tmp_path / "run", False)
    assert len(list(run.model().parameters())) == 4

    def of(width):
        def build(input_shape, classes):
            return nn.Sequential(
                nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes)
            )

        return build

    first, _ = (EXPERIMENT.with_(model=of(width), rounds=1) for width in (6, 7))
    run = first.train("local", tmp_path / "built", False)
    assert next(run.model().parameters()).shape == (6, 64)


def test_runs_of_two_objects_that_have_no_digest_share_no_noise():
    def made():
        weighted = nn.utils.parametrizations.weight_norm(nn.Linear(64, 10))  # no pickle takes it
        return nn.Sequential(nn.Flatten(), weighted)

    first, second = made(), made()
    one, other = (EXPERIMENT.with_(model=model).config for model in (first, second))
    assert one.fingerprint("") != other.fingerprint("")


def test_a_sweep_may_change_several_keys_under_one_name(tmp_path):
    fewer = {"none": {"privacy": None, "cohort": 8}, "as is": {}}
    table = fedpriv.sweep(
        EXPERIMENT.with_(rounds=1), {"protection": fewer}, run_dir=tmp_path, progress=False
    )
    assert table["protection"].tolist() == ["none", "as is"]
    assert [math.isinf(epsilon) for epsilon in table["epsilon"]] == [True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["as_is", "none"]
    assert set(table["parameters"]) == {sum(p.numel() for p in run_model(table).parameters())}


def run_model(table):
    return table["run"].iloc[0].model()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"epsilon": {"1": {}}}, "epsilon is a column"),
        ({"seed": [1, 1]}, "would have one folder"),
        ({"which": {"a b": {}, "a/b": {}}}, "would have one folder"),
    ],
)
def test_a_sweep_whose_runs_cannot_be_told_apart_is_refused(tmp_path, values, told):
    with pytest.raises(InputError, match=told):
        fedpriv.sweep(EXPERIMENT, values, run_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_sweep_trains_what_is_missing_and_nothing_twice(tmp_path):
    values = {"privacy.clipping.bound": [0.05, 0.1]}
    whole = fedpriv.sweep(EXPERIMENT, values, run_dir=tmp_path / "whole", progress=False)
    begun = tmp_path / "begun"
    shutil.copytree(whole["run"].iloc[0].path, begun / "0.05")
    # The other one was interrupted after its third round.
    shutil.copytree(whole["run"].iloc[1].path, begun / "0.1")
    for path, kept in (("ledger.jsonl", 4), ("metrics.jsonl", 3)):
        lines = (begun / "0.1" / path).read_text().splitlines(keepends=True)
        (begun / "0.1" / path).write_text("".join(lines[:kept]))
    checkpoint_files(begun / "0.1" / "checkpoints")[-1].unlink()
    before = (begun / "0.05" / "metrics.jsonl").read_bytes()
    table = fedpriv.sweep(EXPERIMENT, values, run_dir=begun, progress=False)
    assert (begun / "0.05" / "metrics.jsonl").read_bytes() == before
    told = ["accuracy", "epsilon", "bound", "rounds"]
    assert table[told].to_numpy().tolist() == whole[told].to_numpy().tolist()
    for name, parameter in whole["run"].iloc[1].model().named_parameters():
        assert torch.equal(parameter, dict(table["run"].iloc[1].model().named_parameters())[name])


@pytest.mark.parametrize("finished", [True, False])
def test_a_sweep_takes_no_run_of_another_experiment(run, tmp_path, finished):
    folder = tmp_path / "5"
    shutil.copytree(run.path, folder)
    if not finished:  # it was interrupted before it had charged anything
        for each in ("ledger.jsonl", "metrics.jsonl", "checkpoints"):
            gone = folder / each
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    before = (folder / "config.yaml").read_bytes()
    other = EXPERIMENT.with_({"privacy.clipping.bound": 0.05})
    with pytest.raises(InputError, match="run of another configuration"):
        fedpriv.sweep(other, {}, seeds=[5], run_dir=tmp_path, progress=False)
    assert (folder / "config.yaml").read_bytes() == before


def test_a_sweep_takes_no_run_of_another_model_that_was_handed_over(tmp_path):
    def swept(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        given = EXPERIMENT.with_(model=model, rounds=1)
        return fedpriv.sweep(given, {}, seeds=[5], run_dir=tmp_path, progress=False)

    assert swept(1)["accuracy"].tolist() == swept(1)["accuracy"].tolist()
    with pytest.raises(InputError, match="run of another configuration"):
        swept(2)


def test_a_model_is_measured_without_training(run):
    read = read_run(run.path)
    assert EXPERIMENT.evaluate(run.model()) == read.rows[-1]["held_out"]
    start = EXPERIMENT.evaluate()
    assert start == EXPERIMENT.evaluate()
    assert start["accuracy"] < run.quality


def test_an_audit_is_that_of_the_command():
    found = EXPERIMENT.with_(rounds=1).audit(canaries=60, confidence=0.9, progress=False)
    settings = AuditSettings(60, confidence=0.9)
    expected = audit(EXPERIMENT.with_(rounds=1).config, settings, Unseen(), threading.Event())
    assert found == expected
    with pytest.raises(InputError, match="canaries"):
        EXPERIMENT.audit(canaries=1)
    with pytest.raises(InputError, match="privacy"):
        EXPERIMENT.with_(privacy=None, cohort=8).audit()
