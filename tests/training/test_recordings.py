"""Recorded stacks against `train_stack`, where recording is doing the work once more."""

import pytest
import torch
from in_process import small_config

from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.privacy.clipping import GlobalClipping, clip_and_add
from fedpriv.tasks.classification import Classification
from fedpriv.training import cohort
from fedpriv.training.recordings import Recordings, once
from fedpriv.training.stacked import StackedModel, train_stack

WRITTEN_OUT = {"local__momentum": 0.9, "local__proximal_mu": 0.1, "local__max_grad_norm": 1.0}
LARGEST = 8


class Counted:
    """Records by doing the work again, and counts."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, work):
        once(work)
        self.recorded += 1

        def replay():
            self.replayed += 1
            work()

        return replay


class Stacks:
    """Stacks of users of one trainer, by both ways."""

    def __init__(self, **changes):
        self.trainer = build_trainer(small_config(**changes))
        self.start = Layout.of(self.trainer.model).join(parameters_of(self.trainer.model))
        self.counted = Counted()
        self.recordings = Recordings(StackedModel(self.trainer.model), self.counted)
        self.plain = StackedModel(self.trainer.model)

    def users(self, numbers, round_=1):
        layout = Layout.of(self.trainer.model)
        seen = cohort._CohortStatistics(layout, self.trainer, None, torch.empty(0, layout.total))
        return [cohort._work(self.trainer, number, round_, 1, seen) for number in numbers]

    def recorded(self, users, start):
        recipe, task = self.trainer.recipe, self.trainer.task
        return self.recordings.train(start, users, LARGEST, recipe, task, 1)

    def expected(self, users, start):
        return train_stack(self.plain, start, users, self.trainer.recipe, self.trainer.task, 1)

    def summed(self, result):
        total = torch.zeros(len(self.start), dtype=torch.float64)
        seen = clip_and_add(result.deltas, GlobalClipping(0.05), total)
        return total, seen


@pytest.mark.parametrize("changes", [{}, WRITTEN_OUT], ids=["plain", "written out"])
def test_a_replay_trains_those_it_is_given_from_where_it_is_told(changes):
    stacks = Stacks(**changes)
    for turn, numbers in enumerate([[0, 1, 2], [3, 4, 5], [2, 9, 7], [1, 0, 8]]):
        start = stacks.start + 0.01 * turn
        users = stacks.users(numbers)
        found, expected = stacks.recorded(users, start), stacks.expected(users, start)
        assert found.losses.shape == (3,)
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=1e-6)
        total, seen = stacks.summed(found)
        true, true_seen = stacks.summed(expected)
        torch.testing.assert_close(total, true, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(seen.norms, true_seen.norms, rtol=1e-4, atol=1e-7)
        assert seen.finite.tolist() == [True] * 3
        assert total.norm() <= 3 * 0.05
    # Met once, recorded (steps and sum) at the second time, replayed from then on.
    assert (stacks.counted.recorded, stacks.counted.replayed) == (2, 2 + 3)


def test_bits_do_not_depend_on_what_was_recorded_before():
    stacks, fresh = Stacks(), Stacks()
    users = stacks.users([4, 5, 6])
    for _ in range(3):
        last = stacks.summed(stacks.recorded(users, stacks.start))[0]
    first = fresh.summed(fresh.recorded(users, fresh.start))[0]
    assert torch.equal(first, last)


def test_who_fills_a_stack_up_is_left_out_and_a_lost_user_is_too():
    stacks = Stacks()
    two, five = stacks.users([0, 1]), stacks.users([0, 1, 2, 3, 4])
    for users in (two, five, two, five, two):
        result = stacks.recorded(users, stacks.start)
        total, seen = stacks.summed(result)
        assert seen.norms.shape[0] == len(users)
        alone = sum(stacks.summed(stacks.expected([one], stacks.start))[0] for one in users)
        torch.testing.assert_close(total, alone, rtol=1e-4, atol=1e-7)
    five[1].examples.inputs[:] = float("nan")
    total, seen = stacks.summed(stacks.recorded(five, stacks.start))
    assert seen.finite.tolist() == [True, False, True, True, True]
    assert torch.isfinite(total).all()


def test_users_of_unequal_steps_and_tasks_that_wait_are_not_recorded(monkeypatch):
    stacks = Stacks()
    users = stacks.users([0, 1])
    object.__setattr__(users[1], "steps", users[1].steps[:-1])
    assert len(users[0].steps) > len(users[1].steps)
    assert stacks.recorded(users, stacks.start) is None
    monkeypatch.setattr(Classification, "waits", True)
    assert stacks.recorded(stacks.users([0, 1]), stacks.start) is None


def test_where_memory_is_short_a_stack_is_trained_without_a_recording():
    stacks = Stacks()

    def full(work):
        raise torch.OutOfMemoryError

    recordings = Recordings(StackedModel(stacks.trainer.model), full)
    users = stacks.users([0, 1, 2])
    recipe, task = stacks.trainer.recipe, stacks.trainer.task
    for _ in range(3):
        found = recordings.train(stacks.start, users, LARGEST, recipe, task, 1)
        torch.testing.assert_close(
            found.losses, stacks.expected(users, stacks.start).losses, rtol=1e-5, atol=1e-6
        )
