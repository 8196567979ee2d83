"""Whole runs with example-level privacy in silos, in this process."""

import json
from collections import Counter
from itertools import chain

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from in_process import SILOS, InProcessGrid, resume_small, small_config, train_small

from fedpriv import experiment
from fedpriv.config import ExperimentConfig
from fedpriv.errors import BudgetError, InputError
from fedpriv.federation.messages import work_of
from fedpriv.privacy import CountNoise, Ledger, Purpose, Randomness
from fedpriv.privacy.clipping import bounds_of
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.reporting.spent import spent
from fedpriv.training.example_level import train_silos


def parameters(prepared):
    return prepared.server.parameters().double()


def by_dp_accounting(rounds):
    accountant = RdpAccountant()
    if rounds:
        gaussian = dp_accounting.GaussianDpEvent(1.0)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(0.5, gaussian), 2 * rounds)
    return accountant.get_epsilon(1e-3) if rounds else 0.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("silos") / "run", **SILOS)


def test_metrics_ledger_and_report_say_what_the_worst_and_the_median_silo_spent(whole):
    directory, _ = whole
    rows, releases = directory.read_metrics(), list(Ledger.open(directory.ledger))
    assert [tuple(row["silos"]["took_part"]) for row in rows] == [r.silos for r in releases]
    counts = np.zeros(6, dtype=int)
    for row, release in zip(rows, releases, strict=True):
        counts[list(release.silos)] += 1
        epsilons = [by_dp_accounting(int(count)) for count in counts]
        assert row["epsilon"]["rdp"] == pytest.approx(max(epsilons))
        assert row["silos"]["median"] == pytest.approx(np.median(epsilons))
    assert 0 < min(len(r.silos) for r in releases) < 6  # else worst and median say the same
    account = spent(read_run(directory.path))
    assert account.disagreements == ()
    assert account.epsilons["rdp"] == pytest.approx(max(epsilons))
    document = json.loads(render([directory.path], "json"))["runs"][0]
    assert document["silos"]["worst"] == pytest.approx(max(epsilons))
    text = render([directory.path], "md")
    assert "each of its counts" not in text
    assert "counted within" not in text
    assert "private (simulation with a known seed) for every example" in text
    assert "NOT protected: a person with several examples" in text


def test_the_server_adds_no_noise_and_averages_over_the_expected_silos(tmp_path):
    """Silos that move by nothing but noise: its size says that it was added once, in each."""
    changes = {"privacy__example": {"sampling_rate": 1e-9, "silo_size": 6}, "rounds": 1}
    settings = {**SILOS, **changes, "local__lr": 1e-9}
    before = parameters(experiment.prepare(small_config(**settings)))
    directory, prepared = train_small(tmp_path / "run", **settings)
    silos = Ledger.open(directory.ledger).charges(1)[0].silos
    assert len(silos) > 0
    # In each silo lr·z·C·√steps/(q·N); the sum over the silos is divided by the 3 expected.
    expected = 1e-9 * 0.1 * np.sqrt(2) / (1e-9 * 6) * np.sqrt(len(silos)) / 3
    assert float((parameters(prepared) - before).std()) == pytest.approx(expected, rel=0.12)


def test_a_resumed_run_ends_as_one_that_was_never_stopped_and_pays_once(whole, tmp_path):
    directory, prepared = whole
    copy = tmp_path / "run"
    train_small(copy, **SILOS)
    # As if the process had died after the ledger's last line and before the last checkpoint.
    (copy / "checkpoints" / "round-000003.safetensors").unlink()
    again, resumed = resume_small(copy)
    assert parameters(resumed).equal(parameters(prepared))
    assert len(Ledger.open(again.ledger)) == 3
    assert list(Ledger.open(again.ledger)) == list(Ledger.open(directory.ledger))


def test_silos_of_a_node_that_died_are_charged_all_the_same(tmp_path):
    grid = InProcessGrid(dead=[1])
    directory, prepared = train_small(tmp_path / "run", grid, **{**SILOS, "rounds": 1})
    charged = Ledger.open(directory.ledger).charges(1)[0]
    assert directory.read_metrics()[0]["nodes_lost"] == 1
    generator = prepared.plan.randomness.numpy(Purpose.SAMPLING, 1, 0)
    assert list(charged.silos) == prepared.plan.sampling.draw(generator).tolist()
    asked = [work_of(m).users for m in grid.sent if m.metadata.message_type == "train"]
    assert all(asked)  # both nodes had silos, the dead one too
    assert sorted(chain.from_iterable(asked)) == list(charged.silos)


ADAPTIVE = {"kind": "adaptive", "bound": 1e-3, "adapt_lr": 1.0, "count_noise": 5.0}


@pytest.mark.parametrize("adapts", ["global", "per_layer"])
def test_bounds_that_adapt_in_silos_go_on_from_their_mean_and_cost_the_same(
    tmp_path, whole, adapts
):
    clipping = {**ADAPTIVE, "adapts": adapts}
    # So many examples a silo that the noise on their counts is small beside them.
    many = {
        "data__examples_per_user": 100,
        "privacy__example": {"sampling_rate": 0.5, "silo_size": 100},
    }
    grid, settings = InProcessGrid(), {**SILOS, **many, "privacy__clipping": clipping}
    directory, prepared = train_small(tmp_path / "run", grid, **settings)
    releases = list(Ledger.open(directory.ledger))
    assert [row["clip_bound"] for row in directory.read_metrics()] == [r.bound for r in releases]
    for release in releases:
        assert release.counts == (1 if adapts == "global" else len(prepared.plan.layout.names))
        counts = release.counts / (2 * release.count_stddev) ** 2
        assert ((release.bound / release.stddev) ** 2 + counts) ** -0.5 == pytest.approx(1.0)
    rounds = Counter(silo for release in releases for silo in release.silos)
    spent_here = directory.read_metrics()[-1]["epsilon"]["rdp"]
    assert spent_here == pytest.approx(by_dp_accounting(max(rounds.values())), rel=1e-9)
    text = render([directory.path], "md")
    assert "Counts of a step's examples" in text
    assert "and each of its counts, of ±1/2 for each example, by 1/2." in text
    assert "C and σ on record are those of a round's first step" in text
    assert "whether a norm that is so near to its bound is counted within" in text

    # A round's bounds are what the silos of the one before ended with, in geometric mean.
    plan = experiment.prepare(small_config(**settings)).plan
    bounds = np.array(bounds_of(plan.mechanism.gaussian.clipping))
    sent = [work_of(m) for m in grid.sent if m.metadata.message_type == "train"]
    for round_, release in enumerate(releases, start=1):
        assert release.bound == pytest.approx(np.linalg.norm(bounds))
        level = plan.mechanism.level.at(bounds.tolist())
        moves = [
            train_silos(
                prepared.trainer, level, work.parameters, [silo], round_, 0, plan.randomness, 1e-3
            ).bound_moves
            for work in sent
            if work.round == round_
            for silo in work.users
        ]
        assert len(moves) == len(release.silos) > 0
        bounds = bounds * np.exp(np.mean(moves, axis=0))
    assert releases[1].bound > 1.05 * releases[0].bound  # far below the norms, so it grows


def test_adapted_bounds_of_silos_survive_a_resume(tmp_path):
    settings = {**SILOS, "privacy__clipping": ADAPTIVE, "checkpoint__keep": 3}
    whole, prepared = train_small(tmp_path / "whole", **settings)
    train_small(tmp_path / "run", **settings)
    for round_ in (2, 3):
        (tmp_path / "run" / "checkpoints" / f"round-{round_:06d}.safetensors").unlink()
    assert experiment.reopen(tmp_path / "run")[1].finished_rounds == 1
    _, resumed = resume_small(tmp_path / "run")
    assert parameters(resumed).equal(parameters(prepared))
    assert list(Ledger.open(tmp_path / "run" / "ledger.jsonl")) == list(Ledger.open(whole.ledger))


def test_a_round_in_which_no_silo_answers_keeps_the_bounds(tmp_path):
    settings = {**SILOS, "privacy__clipping": ADAPTIVE, "rounds": 1}
    _, prepared = train_small(tmp_path / "run", InProcessGrid(dead=[0, 1]), **settings)
    _, reopened = experiment.reopen(tmp_path / "run")
    assert reopened.bounds == bounds_of(prepared.plan.mechanism.gaussian.clipping)


def test_counts_have_a_noise_of_a_twentieth_of_a_step_and_blocks_their_own():
    changes = {
        "privacy__clipping": {"kind": "adaptive", "bound": 0.1, "adapts": "per_layer"},
        "privacy__example": {"sampling_rate": 0.5, "silo_size": 100},
        "privacy__noise": "per_block",
    }
    plan = experiment.prepare(small_config(**{**SILOS, **changes})).plan
    blocks = len(plan.layout.names)
    assert plan.mechanism.gaussian.per_block
    assert plan.mechanism.gaussian.counts == CountNoise(blocks, 0.5 * 100 / 20 * np.sqrt(blocks))
    assert plan.mechanism.level.mechanism == plan.mechanism.gaussian


def test_noise_is_calibrated_with_counts_whose_noise_is_small(tmp_path):
    """What calibration tries on its way would leave nothing for the gradients."""
    changes = {"privacy__noise_multiplier": None, "privacy__target_epsilon": 2.0}
    clipping = {**ADAPTIVE, "count_noise": 1.5}
    plan = experiment.prepare(small_config(**{**SILOS, **changes, "privacy__clipping": clipping}))
    fixed = experiment.prepare(small_config(**{**SILOS, **changes}))
    multipliers = [p.plan.mechanism.gaussian.noise_multiplier for p in (plan, fixed)]
    assert multipliers[0] == multipliers[1]
    clipping = {**ADAPTIVE, "count_noise": 0.1}
    config = small_config(**{**SILOS, **changes, "privacy__clipping": clipping})
    with pytest.raises(InputError, match="noise on the counts must be above"):
        experiment.prepare(config)


def test_ghost_clipping_gives_the_same_run(tmp_path, monkeypatch):
    # The fingerprint, which differs, decides who is drawn and what the noise is.
    monkeypatch.setattr(ExperimentConfig, "fingerprint", lambda *_: "0" * 64)
    ends = []
    for gradients in ("instantiated", "ghost"):
        example = {**SILOS["privacy__example"], "gradients": gradients}
        settings = {**SILOS, "privacy__example": example, "model__dim": 24}
        ends.append(parameters(train_small(tmp_path / gradients, **settings)[1]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)
    assert not ends[0].equal(ends[1])  # else it was the same way


def test_how_gradients_are_taken_counts_for_the_fingerprint_where_it_was_written():
    def fingerprint(**example):
        example = {**SILOS["privacy__example"], **example}
        return small_config(**{**SILOS, "privacy__example": example}).fingerprint("")

    assert fingerprint(gradients="instantiated") == fingerprint()
    assert fingerprint(gradients="ghost") != fingerprint()


def test_the_budget_holds_for_each_silo(tmp_path):
    budget = by_dp_accounting(1) * 1.001
    with pytest.raises(BudgetError):
        train_small(tmp_path / "run", **{**SILOS, "rounds": 40}, privacy__budget__epsilon=budget)
    releases = list(Ledger.open(tmp_path / "run" / "ledger.jsonl"))
    charged = [silo for release in releases for silo in release.silos]
    assert charged
    assert len(set(charged)) == len(charged)


def test_noise_is_calibrated_for_a_silo_that_is_in_every_round():
    changes = {**SILOS, "privacy__noise_multiplier": None, "privacy__target_epsilon": 2.0}
    plan = experiment.prepare(small_config(**changes)).plan
    accountant = RdpAccountant()
    gaussian = dp_accounting.GaussianDpEvent(plan.mechanism.gaussian.noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.5, gaussian), 2 * 3)
    assert accountant.get_epsilon(1e-3) == pytest.approx(2.0, abs=1e-4)


def test_masks_within_a_silo_are_as_secret_as_its_noise():
    """Examples share a stream, so where one is drawn the others' masks move."""
    silo_options = {"example": {"sampling_rate": 1.0, "silo_size": 6}, "noise_multiplier": 0.0}
    options = {f"privacy__{name}": value for name, value in silo_options.items()}
    prepared = experiment.prepare(small_config(**{**SILOS, **options}, model__dropout=0.5))
    level, start = prepared.plan.mechanism.level, prepared.server.parameters()

    def change(secret, attempt):
        randomness = Randomness.simulation(secret)
        return train_silos(prepared.trainer, level, start, [0], 1, attempt, randomness, 1e-3).total

    assert change(1, 0).equal(change(1, 0))
    assert not change(1, 0).equal(change(2, 0))
    assert not change(1, 0).equal(change(1, 1))


REFUSED = {
    "denominator": ({"privacy__example": {"sampling_rate": 0.5}}, "silo_size"),
    "unknown gradients": (
        {"privacy__example": {"sampling_rate": 0.5, "silo_size": 6, "gradients": "fast"}},
        "privacy.example.gradients",
    ),
    "no rate": ({"privacy__example": None}, "sampling_rate"),
    "user with example": ({"privacy__unit": "user"}, "go together"),
    "replace one": ({"privacy__adjacency": "replace_one"}, "exchanged"),
    "memory": ({"privacy__error_feedback": "user"}, "error_feedback"),
    "counts of silos of their own sizes": (
        {
            "privacy__example": {"sampling_rate": 0.5},
            "privacy__adjacency": "zero_out",
            "privacy__clipping": {"kind": "adaptive", "bound": 0.1},
        },
        "count_noise",
    ),
    "epochs": ({"local__steps": None}, "local.steps"),
    "clipped twice": ({"local__max_grad_norm": 1.0}, "max_grad_norm"),
    "fixed-size samples": (
        {"privacy__example": {"sampling_rate": 0.5, "silo_size": 6, "batch": 3}},
        "unknown key",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_proof_is_refused_with_the_reason(case):
    changes, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason):
        small_config(**{**SILOS, **changes})


@pytest.mark.parametrize("example", [{"silo_size": 1000}, {}], ids=["public size", "own size"])
def test_delta_is_held_against_the_size_of_a_silo(tmp_path, example):
    changes = {
        "privacy__example": {"sampling_rate": 0.5, **example},
        "privacy__adjacency": "zero_out",
        "privacy__delta": 0.3,
    }
    with pytest.raises(InputError, match="delta must be below 1/N"):
        train_small(tmp_path / "run", **{**SILOS, **changes})


def test_a_fixed_number_of_silos_may_be_drawn_since_nothing_is_claimed_for_it():
    sampling = {"kind": "fixed_size", "expected_cohort": 3}
    plan = experiment.prepare(small_config(**{**SILOS, "privacy__sampling": sampling})).plan
    assert plan.planned_cost().epsilon == pytest.approx(by_dp_accounting(3))
