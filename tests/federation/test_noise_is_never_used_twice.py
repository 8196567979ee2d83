"""Whole runs: noise, cohorts and journals of one round and attempt are those of no other."""

from itertools import combinations

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from in_process import SILOS
from listened import Listened, ListeningGrid, begun, resumed

from fedpriv.errors import BudgetError, WorkerLost
from fedpriv.privacy import Purpose


def are_unlike(vectors: list[torch.Tensor]) -> bool:
    """Whether no two have a correlation that independent ones would hardly ever have."""
    assert len(vectors) > 1
    limit = 6 / len(vectors[0]) ** 0.5
    return all(
        abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < limit
        for pair in combinations(vectors, 2)
    )


def moved_a_little(total: torch.Tensor) -> torch.Tensor:
    return total * (1 + 1e-9)


def repeated(folder, changed: bool = True, **changes) -> tuple[Listened, Listened]:
    """Return a run that died in round 2, paid for and unused, and the run that went on from it.

    The sums of the repeated round are others where they have `changed`.
    """
    first = begun(folder, **changes)
    with pytest.raises(RuntimeError, match="crash"):
        first.go(crash_in=2)
    return first, resumed(folder, ListeningGrid(change=moved_a_little if changed else None))


def test_the_servers_noise_is_another_in_each_round_and_attempt(tmp_path):
    first, second = repeated(tmp_path / "run")
    second.go()
    charges = [(release.round, release.attempt) for release in second.ledger]
    assert charges == [(1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]
    noises = [first.noise(1), first.noise(2), *(second.noise(round_) for round_ in (2, 3, 4))]
    assert are_unlike(noises)


def test_a_repeated_round_with_the_same_sum_has_the_same_noise(tmp_path):
    first, second = repeated(tmp_path / "run", changed=False)
    second.go()
    assert second.averages[2].equal(first.averages[2])
    assert [(r.round, r.attempt) for r in second.ledger] == [(1, 0), (2, 0), (3, 0), (4, 0)]


#: Six parties, each at a node of its own, who send nothing but their noise: what they learn is
#: too little to matter, and silos draw no examples.
ALONE = {
    "nodes": {"privacy__noise_by": "nodes", "local__lr": 1e-12, "data__users": 6},
    "users": {"privacy__noise_by": "users", "local__lr": 1e-12, "data__users": 6},
    "silos": {**SILOS, "privacy__example": {"sampling_rate": 1e-9, "silo_size": 6}},
}


@pytest.mark.parametrize("by", ALONE)
def test_noise_that_others_add_is_another_for_each_in_each_round_and_attempt(tmp_path, by):
    changes = {**ALONE[by], "privacy__sampling": {"kind": "all"}, "runtime__workers": 6}
    changes["rounds"] = 3
    first = begun(tmp_path / "run", ListeningGrid(6), **changes)
    with pytest.raises(RuntimeError, match="crash"):
        first.go(crash_in=2)
    second = resumed(tmp_path / "run", ListeningGrid(6, dead=[5]))
    with pytest.raises(WorkerLost):  # after round 2, in which node 5 is missing
        second.go()
    charges = [(release.round, release.attempt) for release in second.ledger]
    assert charges == [(1, 0), (2, 0), (2, 1)]
    third = resumed(tmp_path / "run", ListeningGrid(6)).go()
    sent = [
        answer
        for run in (first, second, third)
        for _, heard in sorted(run.grid.heard.items())
        for answer in heard
    ]
    assert len(sent) == 2 * 6 + 2 * 5 + 6
    # The repeated attempt is the first one again; everything else is drawn afresh.
    again = {(a.work.round, a.work.own_noise.attempt, a.partition): a.summed.total for a in sent}
    assert len(again) == 2 * 6 + 5 + 6
    assert all(
        again[a.work.round, a.work.own_noise.attempt, a.partition].equal(a.summed.total)
        for a in sent
    )
    assert are_unlike(list(again.values()))


def test_what_users_keep_is_written_under_the_name_of_its_attempt(tmp_path):
    """A node of an attempt that was given up may still be writing."""
    first, second = repeated(tmp_path / "run", privacy__error_feedback="user")
    second.go()
    journals = [
        (answer.work.journal, answer.work.journal.attempt)
        for run in (first, second)
        for answer in run.grid.heard[2]
    ]
    assert sorted({attempt for _, attempt in journals}) == [0, 1]
    assert len({journal for journal, _ in journals}) == len(journals)  # sessions differ too


def test_the_servers_own_draws_are_other_ones_in_each_round_and_repeat(tmp_path):
    """Those of optimizers with random projections."""
    first, second = repeated(tmp_path / "run", changed=False)
    second.go()
    assert len({*first.seeds.values(), *second.seeds.values()}) == 4
    assert second.seeds[2] == first.seeds[2]


# ---------------------------------------------------------------- the budget


def epsilon_of(rounds: int) -> float:
    event = PoissonSampledDpEvent(8 / 60, GaussianDpEvent(1.0))
    return RdpAccountant().compose(event, rounds).get_epsilon(1e-3)


JUST_ENOUGH = {"privacy__budget": {"epsilon": epsilon_of(2) * 1.0001}}


def test_a_round_that_is_paid_for_is_finished_though_the_budget_is_spent(tmp_path):
    _, second = repeated(tmp_path / "run", changed=False, rounds=2, **JUST_ENOUGH)
    second.go()
    assert second.prepared.plan.budget < epsilon_of(3)
    assert [row["round"] for row in second.directory.read_metrics()] == [1, 2]
    assert len(second.ledger) == 2


def test_a_repeated_round_that_must_be_paid_again_is_held_against_the_budget(tmp_path):
    _, second = repeated(tmp_path / "run", rounds=2, **JUST_ENOUGH)
    with pytest.raises(BudgetError, match="round 2 is not run"):
        second.go()
    assert len(second.ledger) == 2


def test_what_was_spent_before_a_resume_counts_for_the_budget_of_silos(tmp_path):
    gaussian = PoissonSampledDpEvent(0.5, GaussianDpEvent(1.0))
    two = RdpAccountant().compose(gaussian, 2 * 2).get_epsilon(1e-3)  # of 2 steps each
    everybody = {"privacy__sampling": {"kind": "all"}, "privacy__budget": {"epsilon": two * 1.0001}}
    changes = {**SILOS, **everybody, "rounds": 3}
    with pytest.raises(WorkerLost):
        begun(tmp_path / "run", ListeningGrid(last=1), **changes).go()
    again = resumed(tmp_path / "run")
    with pytest.raises(BudgetError, match="round 3 is not run"):
        again.go()
    assert len(again.ledger) == 2


def test_the_cohort_of_each_round_and_attempt_is_drawn_afresh(tmp_path):
    first, second = repeated(tmp_path / "run")
    second.go()
    plan = second.prepared.plan
    drawn = {
        path: plan.sampling.draw(plan.randomness.numpy(Purpose.SAMPLING, *path)).tolist()
        for path in ((1, 0), (2, 0), (2, 1), (3, 0), (4, 0))
    }
    assert len({tuple(cohort) for cohort in drawn.values()}) == 5
    heard = {1: first.grid.heard[1], **{r: second.grid.heard[r] for r in (3, 4)}}
    for round_, answers in heard.items():
        trained = sorted(user for answer in answers for user in answer.work.users)
        assert trained == drawn[round_, 0]
