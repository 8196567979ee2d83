"""The audit command: over the true round, what it prints and writes, and what it refuses."""

import json
import math
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from audited import Unseen, audited, audited_config
from in_process import train_small
from test_cli import assert_one_line, call

from fedpriv import audit as auditing
from fedpriv.audit import AuditSettings
from fedpriv.errors import InputError
from fedpriv.experiment import prepare
from fedpriv.federation import audit_node
from fedpriv.privacy import GaussianMechanism, Ledger, PoissonSampling, Purpose, RdpAccountant
from fedpriv.privacy.clipping import clip_and_sum
from fedpriv.reporting.audit import audit_document, audit_verdict, read_audit, write_audit
from fedpriv.reporting.report import render, write_report


@pytest.fixture
def fedpriv(monkeypatch, capsys):
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def found():
    return audited(60, rounds=2)


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(audited_config(rounds=2).to_yaml())
    return path


def audited_run(**changes):
    return auditing._AuditedRun(prepare(audited_config(**changes)), AuditSettings(60))


# ---------------------------------------------------------------- the true round


def test_a_canary_that_is_in_uses_its_whole_bound():
    run = audited_run()
    planted = run.nodes[1].trainer.planted
    assert planted is not None
    for update in planted:
        summed = clip_and_sum(update[None], run.plan.layout.sizes, run.trainer.clipping)
        assert float(summed.total.norm()) == pytest.approx(0.1, rel=1e-5)


def test_directions_are_orthonormal_where_there_is_room():
    directions = audited_run().canaries.updates / (100 * 0.1)
    torch.testing.assert_close(directions @ directions.T, torch.eye(60), atol=1e-5, rtol=0)


def test_the_sampling_rate_is_the_configs_and_the_ledger_says_so(monkeypatch):
    drawn = []
    append = Ledger.append
    monkeypatch.setattr(Ledger, "append", lambda *a: (drawn.append(a[1]), append(*a))[1])
    found = audited(60, rounds=2)
    plan = prepare(audited_config(rounds=2)).plan
    accountant = RdpAccountant(plan.sampling.adjacency)
    for release in drawn:
        assert release.expected_cohort / release.population == pytest.approx(6 / 60)
        assert release.noise_multiplier == 1.5
        accountant.compose(release.event())
    assert found.epsilons["rdp"] == pytest.approx(accountant.epsilon(1e-4))
    assert found.epsilons["rdp"] == pytest.approx(plan.planned_cost().epsilon_rdp)


def test_only_those_the_coin_let_in_are_trained(monkeypatch):
    """The sum that a node sends is that of the users who are there, among those who were drawn."""
    run, seen = audited_run(privacy__sampling={"kind": "all"}, rounds=1), []
    trained = audit_node.trained
    monkeypatch.setattr(
        audit_node, "trained", lambda t, work: (seen.append(work.users), trained(t, work))[1]
    )
    run.judged(Unseen(), threading.Event())
    assert seen == [
        np.flatnonzero(run.present).tolist(),
        np.flatnonzero(run.canaries.included).tolist(),
    ]
    assert 10 < len(seen[0]) < 50


def test_the_audited_run_shares_neither_noise_nor_cohorts_with_the_run():
    run = audited_run()
    assert run.plan.randomness.root != run.experiment.plan.randomness.root


def test_without_noise_the_projections_are_exact(monkeypatch):
    """R is the sum of the canaries alone: p = n for those in, 0 for those out."""
    silence = partial(torch.zeros, dtype=torch.float64)
    monkeypatch.setattr(GaussianMechanism, "noise", lambda self, sizes, _: silence(sum(sizes)))
    changes = {"sampling": {"kind": "all"}, "clipping": {"kind": "global", "bound": 0.1}}
    run = audited_run(rounds=1, **{f"privacy__{key}": value for key, value in changes.items()})
    run.judged(Unseen(), threading.Event())
    found, included = run.evidence, run.canaries.included
    np.testing.assert_allclose(found.projection[included], found.energy[included], rtol=1e-3)
    np.testing.assert_allclose(found.projection[~included], 0.0, atol=1e-3)
    np.testing.assert_allclose(found.energy, 1.5**-2, rtol=1e-4)  # (C/zC)²


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy__sampling": {"kind": "fixed_size", "expected_cohort": 6}},
        {"privacy__sampling": {"kind": "all"}, "privacy__adjacency": "replace_one"},
        {
            "privacy__clipping": {"kind": "adaptive", "bound": 0.1, "adapts": "per_layer"},
            "privacy__noise": "per_block",
        },
        {"runtime__engine": "sequential"},
        {
            "local__multipliers": {"embed*": 30.0},
            "privacy__clipping": {"kind": "global", "bound": 0.1, "undo": True},
        },
    ],
    ids=["fixed size", "replace one", "adaptive", "sequential", "undone multipliers"],
)
def test_every_kind_of_round_can_be_audited(changes):
    found = audited(60, rounds=2, privacy__accountants=["rdp"], **changes)
    assert found.holds
    assert math.isfinite(found.estimates[0].epsilon)
    signed = "replace" in found.adjacency
    assert len(found.estimates) == (1 if signed else 2)


def test_replace_one_canaries_send_one_sign_or_the_other():
    run = audited_run(privacy__sampling={"kind": "all"}, privacy__adjacency="replace_one")
    node = run.nodes[1]
    assert node.present.all()
    included = torch.from_numpy(run.canaries.included)
    assert node.trainer.planted[included].equal(run.canaries.updates[included])
    assert node.trainer.planted[~included].equal(-run.canaries.updates[~included])


def test_every_real_user_whose_coin_was_tossed_counts(monkeypatch):
    losses = auditing._losses

    def some(trainer, parameters, users):
        return np.where(np.arange(len(users)) % 5 == 0, np.nan, losses(trainer, parameters, users))

    monkeypatch.setattr(auditing, "_losses", some)
    users = audited(60, rounds=1).users
    assert users.members + users.others == 48
    assert users.bound.coins == 60


def test_the_larger_of_two_bounds_holds_at_the_confidence_that_is_printed(found):
    errors = [1 - found.bound.confidence, 1 - found.users.bound.confidence]
    assert sum(errors) <= 1 - found.confidence + 1e-12


def test_a_budget_ends_the_audited_run_where_it_ends_the_configs_own():
    plan = prepare(audited_config()).plan
    accountant = RdpAccountant(plan.adjacency)
    accountant.compose(plan.mechanism.event(), 2)
    two = accountant.epsilon(1e-4)
    by_rdp = {"privacy__budget": {"epsilon": two * 1.001}, "privacy__accountants": ["rdp"]}
    found = audited(60, **by_rdp)
    assert (found.rounds, found.planned_rounds) == (2, 3)
    assert found.epsilons["rdp"] == pytest.approx(two)
    with pytest.raises(InputError, match=r"privacy\.budget\.epsilon"):
        audited(60, privacy__budget={"epsilon": 1e-3})


# ---------------------------------------------------------------- the command


def test_the_command_prints_and_writes_what_was_found(fedpriv, config, tmp_path):
    directory, _ = train_small(
        tmp_path / "run",
        **{
            "rounds": 2,
            "model__dim": 16,
            "model__mlp_ratio": 2.0,
            "privacy__delta": 1e-4,
            "privacy__noise_multiplier": 1.5,
            "privacy__accountants": ["rdp", "pld"],
            "privacy__sampling": {"kind": "poisson", "expected_cohort": 6},
        },
    )
    arguments = ["audit", config, "--canaries", 60, "--run", directory.path]
    code, out, err = fedpriv(*arguments, "--format", "json")
    assert code == 0, err
    assert "survived" in err
    document = json.loads(out)
    assert document["holds"] is True
    found = read_audit(directory.path)
    assert found is not None
    assert json.loads(audit_document(found)) == document

    html = write_report([directory.path]).read_text()
    assert 'data-section="audit"' in html
    text = render([directory.path], "md")
    assert "Measured from outside" in text
    assert "with confidence 0.95" in text
    assert "ANOTHER" not in text

    code, out, _ = fedpriv("audit", config, "--canaries", 60, "--rounds", 1)
    assert code == 0
    assert "claimed, by rdp" in out
    assert "1 of 2 rounds" in out


def test_a_refuted_claim_is_said_and_exits_with_1(fedpriv, config, monkeypatch):
    monkeypatch.setattr(PoissonSampling, "draw", lambda self, _: np.arange(self.population))
    code, out, err = fedpriv("audit", config, "--canaries", 800)
    assert code == 1
    assert "REFUTED" in err
    assert "lower bound" in out


def test_a_report_says_when_a_claim_is_refuted(found, tmp_path):
    directory, _ = train_small(tmp_path / "run", rounds=2)
    refuted = replace(found, bound=replace(found.bound, epsilon=99.0))
    write_audit(directory.path, refuted)
    html = write_report([directory.path]).read_text()
    assert "THE CLAIM IS REFUTED" in html
    assert "ANOTHER configuration" in html  # this run's noise is not the audited one's
    assert "REFUTED" in audit_verdict(refuted)


def test_a_damaged_audit_is_one_line(tmp_path):
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(InputError, match="not an audit"):
        read_audit(tmp_path)
    assert read_audit(tmp_path / "nothing") is None


REFUSED = {
    "no privacy": (["privacy=null"], [], ["privacy: null", "infinite"]),
    "no noise": (["privacy.noise_multiplier=0"], [], ["noise_multiplier: 0", "infinite"]),
    "a deployment": (["runtime.deployment=true"], [], ["runtime.deployment"]),
    "few canaries": ([], ["--canaries", 5], ["--canaries", "at least 40"]),
    "too many canaries": ([], ["--canaries", 10**7], ["--canaries", "GiB"]),
    "too many rounds": ([], ["--rounds", 3], ["--rounds", "1 to 2"]),
    "no confidence": ([], ["--confidence", 1.5], ["--confidence"]),
    "an unknown format": ([], ["--format", "csv"], ["--format"]),
    "no run": ([], ["--run", "nowhere"], ["nowhere", "not a run directory"]),
}


@pytest.mark.parametrize(("overrides", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(fedpriv, config, overrides, options, words):
    sets = [part for override in overrides for part in ("--set", override)]
    code, out, err = fedpriv("audit", config, *sets, *options)
    # How large a model is, and so how many canaries are too many, is known when data were read.
    assert_one_line(
        (code, out, err.removeprefix("reading the data and drawing canaries\n")), *words
    )


def test_the_run_must_be_of_the_same_configuration(fedpriv, config, tmp_path):
    directory, _ = train_small(tmp_path / "run", rounds=2)
    result = fedpriv("audit", config, "--run", directory.path)
    assert_one_line(result, "--run", "another configuration")
    assert not (directory.path / "audit.json").exists()


def test_the_attacker_takes_the_real_users_sum_of_the_same_round_away(monkeypatch):
    """What is left of each release is what canaries sent, and noise."""
    run, left = audited_run(rounds=3), []
    gather = auditing._AuditedRun._gather

    def gathered(self, averages):
        released = averages * self.plan.sampling.expected_cohort
        left.append(released - self.nodes[0].sent - self.nodes[1].sent)
        gather(self, averages)

    monkeypatch.setattr(auditing._AuditedRun, "_gather", gathered)
    run.judged(Unseen(), threading.Event())
    for round_, noise in enumerate(left, start=1):
        generator = run.plan.randomness.numpy(Purpose.NOISE, round_, 0)
        drawn = run.plan.mechanism.gaussian.noise(run.plan.layout.sizes, generator)
        torch.testing.assert_close(noise.double(), drawn, rtol=1e-4, atol=1e-5)
