"""A mechanism of somebody's own, in whole runs in this process."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import Silent, drive_on, resume_small, small_config, train_small

from fedpriv import experiment
from fedpriv.errors import InputError
from fedpriv.privacy import Ledger, Purpose
from fedpriv.reporting.ledgers import open_ledger
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.reporting.spent import spent

OUTSIDE = {"code": str(Path(__file__).parent.parent / "outside"), "rounds": 2}
OWN = {**OUTSIDE, "privacy__mechanism": {"kind": "own_mechanism:TwoKeepers"}}


def test_it_adds_its_noise_is_charged_by_the_record_and_told(tmp_path):
    still = {"local__lr": 1e-12, "server": {"optimizer": "sgd", "lr": 1.0}, "rounds": 1}
    directory, prepared = train_small(tmp_path / "run", **{**OWN, **still})
    before = experiment.prepare(prepared.config).server.parameters().double()
    moved = before - prepared.server.parameters().double()
    draws = [
        prepared.plan.randomness.numpy(Purpose.NOISE, round_, 0).standard_normal(len(moved))
        for round_ in (1, 10**6 + 1)
    ]
    expected = torch.from_numpy(0.1 * sum(draws) / 2**0.5 / 8)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)

    plain = experiment.prepare(small_config(rounds=1)).plan.planned_cost()
    assert prepared.plan.planned_cost() == plain
    account = spent(read_run(directory.path))
    assert account.disagreements == ()
    assert account.epsilons["rdp"] == pytest.approx(plain.epsilon)
    text = render([directory.path], "md")
    assert "Not fedpriv's own, and not checked by it: privacy.mechanism: own_mechanism" in text
    assert "Gaussian noise N(0, σ²) is added once" not in text  # it may be more
    assert "charged as Gaussian noise N(0, σ²) with the σ on record, and the code may" in text
    assert "found to be as large as recorded and Gaussian, as far as a trial can tell" in text


def test_two_of_its_runs_share_no_noise_with_others(tmp_path):
    _, own = train_small(tmp_path / "own", **OWN)
    other = {"kind": "own_mechanism:TwoKeepers", "first_of_the_second": 7}
    prepared = experiment.prepare(small_config(**{**OWN, "privacy__mechanism": other}))
    assert prepared.plan.fingerprint != own.plan.fingerprint


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Boastful", "record and event must agree"),
        ("Forgetful", "does not record who pays"),
        ("TwoDraws", "TwoDraws is not a Mechanism: write a class that extends CentralMechanism"),
        ("changed", "changed is not a Mechanism: write a class"),
        ("Bare", "Bare extends neither CentralMechanism nor CorrelatedMechanism"),
    ],
)
def test_one_that_the_ledger_would_charge_otherwise_is_refused(name, reason):
    mechanism = {"kind": f"own_mechanism:{name}"}
    if name == "TwoDraws":
        mechanism |= {"drawn": 1, "first_of_the_second": 1}
    if name == "changed":
        mechanism |= {"change": 1}
    with pytest.raises(InputError, match=reason):
        experiment.prepare(small_config(**{**OUTSIDE, "privacy__mechanism": mechanism}))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Quiet", "Quiet adds less noise than it records"),
        ("Repeating", "less noise than it records: .* rounds, attempts and runs its variance"),
        ("Constant", "less noise than it records"),
        ("Stubborn", "less noise than it records"),
        ("Half", "less noise than it records"),
        ("Everybody", "Everybody overrides cohort,"),
        ("Leaving", "Leaving overrides in_sums,"),
        ("Narrow", "Narrow records or draws with another bound than the config's"),
        ("Cheap", "Cheap overrides paid,"),
    ],
)
def test_one_whose_noise_or_payers_are_not_what_is_recorded_is_refused(name, reason):
    mechanism = {"kind": f"own_mechanism:{name}"}
    mechanism |= {"bands": 3} if name in ("Cheap", "Half") else {}
    changes = {**OUTSIDE, "privacy__mechanism": mechanism, "rounds": 6}
    with pytest.raises(InputError, match=reason):
        experiment.prepare(small_config(**changes))


def refused(name: str, **changes: Any) -> str:
    """Return why a config with this mechanism is refused."""
    mechanism = {"kind": f"own_mechanism:{name}"}
    with pytest.raises(InputError) as error:
        experiment.prepare(small_config(**{**OUTSIDE, "privacy__mechanism": mechanism, **changes}))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("rounds", [1, 2, 40])
def test_a_block_or_a_number_with_too_little_noise_is_found(rounds):
    less = "adds less noise than it records"
    assert re.search(
        rf"{less}: in block \d+ of 23 \(of \d\d? numbers\)", refused("SmallBlocks", rounds=rounds)
    )
    assert f"{less}: at number 6 of a release" in refused("OneLess", rounds=rounds)
    assert f"{less}: " in refused("Quiet1pc", rounds=rounds)


def test_too_little_noise_in_later_rounds_alone_is_found():
    assert "less noise than it records" in refused("Late", rounds=36)
    assert "less noise than it records" in refused("Late", rounds=1000)


def test_noise_that_is_not_the_runs_own_is_found():
    state = torch.get_rng_state()
    assert "draws other noise when it is asked again" in refused("OwnRng")
    assert "in a run that is resumed" in refused("Forgetting", rounds=4)
    assert torch.equal(state, torch.get_rng_state())


def test_noise_that_does_not_follow_adaptive_bounds_is_found():
    clipping = {"kind": "adaptive", "bound": 0.1}
    assert "less noise than it records" in refused("Stale", privacy__clipping=clipping)
    stale = {**OUTSIDE, "privacy__mechanism": {"kind": "own_mechanism:Stale"}}
    assert experiment.prepare(small_config(**stale)).plan.planned_cost()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NoSource", "NoSource.noise(sizes, randomness, attempts) must return an object with draw"),
        ("FewArguments", "FewArguments.noise(sizes, randomness, attempts) cannot be called with"),
        ("Broken", "no attribute 'nope' (own_mechanism.py, line "),
        ("Short", "must return a torch.Tensor of float64 [738], and returns torch.float64 [737]"),
        ("Listed", "must return a torch.Tensor of float64 [738], and returns list"),
    ],
)
def test_one_that_cannot_draw_is_told_in_a_line_before_the_run(name, reason):
    assert reason in refused(name)


@pytest.mark.parametrize("rounds", [2, 40])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Laplace", "not Gaussian"),
        ("Uniform", "not Gaussian"),
        ("Patchy", "less of it to some numbers"),
        ("Halved", "the same noise to several numbers"),
        ("Doubled", "the same noise to several numbers"),
    ],
)
def test_one_whose_noise_has_the_variance_but_is_not_gaussian_is_refused(name, reason, rounds):
    mechanism = {"kind": f"own_mechanism:{name}"}
    with pytest.raises(InputError, match=reason):
        experiment.prepare(
            small_config(**{**OUTSIDE, "privacy__mechanism": mechanism, "rounds": rounds})
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy__mechanism": {"kind": "own_mechanism:Renamed", "bands": 3}},
        {"privacy__mechanism": {"kind": "own_mechanism:Renamed", "bands": 1}, "rounds": 40},
        {**OWN, "rounds": 40, "privacy__noise": "per_block"},
        {"privacy__mechanism": {"kind": "own_mechanism:Louder"}, "rounds": 40},
        {**OWN, "privacy__clipping": {"kind": "adaptive", "bound": 0.1, "adapts": "per_layer"}},
    ],
    ids=["banded", "one band", "per block", "louder", "adaptive"],
)
def test_one_whose_noise_is_what_it_records_is_taken(changes):
    assert experiment.prepare(small_config(**{**OUTSIDE, **changes})).plan.planned_cost()


UNPLUGGED = {**OUTSIDE, "privacy__mechanism": {"kind": "own_mechanism:Unplugged"}}


@pytest.mark.parametrize(
    ("away", "paid"),
    [("record", 0), ("noise", 0), ("stddevs", 0), ("draw 1", 0), ("draw 2", 1)],
)
def test_what_it_raises_in_a_run_is_told_before_the_round_is_charged(
    away, paid, tmp_path, monkeypatch
):
    """As where a keeper goes away after the trial; the run goes on when it is back."""
    settings = {"run_dir": str(tmp_path / "run"), **UNPLUGGED}
    prepared = experiment.prepare(small_config(**settings))
    directory = experiment.create(prepared)
    monkeypatch.setenv("KEEPER_AWAY", away)
    with pytest.raises(InputError) as told:
        experiment.train(prepared, directory, Silent(), drive_on(None))
    assert told.value.exit_code == 2
    said = (
        r"privacy\.mechanism: Unplugged fails: the keeper is away \(own_mechanism\.py, line \d+\)"
    )
    assert re.fullmatch(said, str(told.value))
    assert len(list(Ledger.open(directory.ledger))) == paid

    monkeypatch.delenv("KEEPER_AWAY")
    _, resumed = resume_small(directory.path)
    _, whole = train_small(tmp_path / "whole", **UNPLUGGED)
    assert resumed.server.parameters().equal(whole.server.parameters())
    assert len(list(Ledger.open(directory.ledger))) == 2


@pytest.mark.parametrize("away", ["event", "record", "payers", "noise"])
def test_what_it_raises_before_a_run_is_told(away, monkeypatch):
    monkeypatch.setenv("KEEPER_AWAY", away)
    name = "Paying" if away == "payers" else "Unplugged"
    assert re.search(
        rf"privacy\.mechanism: {name}.* fails: the keeper is away \(own_mechanism\.py",
        refused(name),
    )


def test_what_a_cost_raises_after_the_trial_is_told(monkeypatch):
    plan = experiment.prepare(small_config(**UNPLUGGED, privacy__budget={"epsilon": 9.0})).plan
    monkeypatch.setenv("KEEPER_AWAY", "event")
    for ask in (plan.planned_cost, plan.affordable_rounds):
        with pytest.raises(InputError, match="Unplugged fails: the keeper is away"):
            ask()


def test_a_lack_of_memory_is_not_the_mechanisms_fault(monkeypatch):
    monkeypatch.setenv("KEEPER_AWAY", "memory")
    with pytest.raises(MemoryError, match="the keeper is away"):
        experiment.prepare(small_config(**UNPLUGGED))


def test_it_does_not_go_with_noise_that_others_add():
    with pytest.raises(InputError, match=r"has no proof with noise_by: nodes"):
        small_config(**OWN, privacy__noise_by="nodes")


def test_a_ledger_of_it_is_read_without_its_code(tmp_path):
    directory, _ = train_small(tmp_path / "run", **OWN)
    ledger = Ledger.open(directory.ledger)
    assert "own_mechanism:TwoKeepers" in ledger.header.outside[0]
    (note,) = open_ledger(directory.path).notes
    assert "not checked: privacy.mechanism: own_mechanism:TwoKeepers" in note
    assert next(release.event() for release in ledger).sampling_probability == 8 / 60
