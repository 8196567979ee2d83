import dataclasses

import pytest
import torch
from in_process import small_config

from fedpriv.data.federated import DatasetPartition, Examples
from fedpriv.errors import DamagedFile, EnvironmentFault, InputError
from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.privacy import GlobalClipping, Unclipped, clip
from fedpriv.training import cohort
from fedpriv.training.cohort import train_cohort
from fedpriv.training.device import resolve_device


@pytest.fixture
def trainer():
    return build_trainer(small_config())


def flat_start(trainer):
    return Layout.of(trainer.model).join(parameters_of(trainer.model))


def test_the_sum_is_that_of_users_alone(trainer):
    start = flat_start(trainer)
    together = train_cohort(trainer, start, [3, 17, 40], round_=2)
    alone = [train_cohort(trainer, start, [user], round_=2) for user in (3, 17, 40)]
    torch.testing.assert_close(together.total, sum(one.total for one in alone), rtol=0, atol=1e-6)
    assert together.users == 3
    assert together.examples == sum(one.examples for one in alone)
    assert together.norm == pytest.approx(sum(one.norm for one in alone))


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """A data set in which user 7's pixels are not numbers."""

    whole: object

    def __getattr__(self, name):
        return getattr(self.whole, name)

    def user(self, index):
        examples = self.whole.user(index)
        if index == 7:
            return Examples(examples.inputs * torch.nan, examples.targets)
        return examples


def test_a_user_with_nan_contributes_zero_and_is_counted(trainer):
    start = flat_start(trainer)
    poisoned = dataclasses.replace(trainer, dataset=Poisoned(trainer.dataset))
    with_nan = train_cohort(poisoned, start, [3, 7, 9], round_=1)
    without = train_cohort(trainer, start, [3, 9], round_=1)
    assert with_nan.non_finite == 1
    assert with_nan.users == 3
    torch.testing.assert_close(with_nan.total, without.total, rtol=0, atol=1e-6)
    assert with_nan.loss == pytest.approx(without.loss)


@dataclasses.dataclass(frozen=True)
class Failing(Poisoned):
    """A data set in which user 7's data raise something."""

    error: Exception

    def user(self, index):
        if index == 7:
            raise self.error
        return self.whole.user(index)


@pytest.mark.parametrize(
    "error", [InputError("label 11"), KeyError("label"), ValueError("NUL"), RuntimeError("?")]
)
def test_whatever_a_user_of_a_deployment_raises_loses_that_user_alone(trainer, error):
    start = flat_start(trainer)
    failing = dataclasses.replace(trainer, dataset=Failing(trainer.dataset, error))
    deployed = dataclasses.replace(failing, tolerant=True)
    summed = train_cohort(deployed, start, [3, 7, 9], round_=1)
    without = train_cohort(trainer, start, [3, 9], round_=1)
    assert (summed.users, summed.non_finite) == (3, 1)
    torch.testing.assert_close(summed.total, without.total, rtol=0, atol=1e-6)
    with pytest.raises(type(error)):
        train_cohort(failing, start, [3, 7, 9], round_=1)


@pytest.mark.parametrize(
    "error",
    [
        EnvironmentFault("the disk is gone"),
        DamagedFile("a cache"),
        OSError("too many open files"),
        MemoryError(),
        torch.OutOfMemoryError("GPU"),
        torch.AcceleratorError("CUDA error: an illegal memory access"),
    ],
)
@pytest.mark.parametrize("tolerant", [True, False])
def test_a_fault_of_the_machine_is_no_users(trainer, error, tolerant):
    dataset = Failing(trainer.dataset, error)
    failing = dataclasses.replace(trainer, dataset=dataset, tolerant=tolerant)
    with pytest.raises(type(error)):
        train_cohort(failing, flat_start(trainer), [3, 7, 9], round_=1)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("GPU"), torch.AcceleratorError("CUDA error: ECC")],
)
def test_a_fault_of_the_machine_in_training_is_no_users(trainer, error, monkeypatch):
    def train_user(*_):
        raise error

    monkeypatch.setattr(cohort, "train_user", train_user)
    deployed = dataclasses.replace(trainer, engine="sequential", tolerant=True)
    with pytest.raises(type(error)):
        train_cohort(deployed, flat_start(trainer), [3, 7, 9], round_=1)


def test_every_contribution_is_within_the_bound(trainer):
    start = flat_start(trainer)
    tight = dataclasses.replace(trainer, clipping=GlobalClipping(1e-3))
    for user in range(5):
        summed = train_cohort(tight, start, [user], round_=1)
        assert float(summed.total.norm()) <= 1e-3
        assert summed.clipped == 1
        assert all(count == 1 for count in summed.block_clipped)


def test_an_unclipped_sum_is_start_minus_end(trainer):
    start = flat_start(trainer)
    free = dataclasses.replace(trainer, clipping=Unclipped(), engine="sequential")
    summed = train_cohort(free, start, [4], round_=1)
    end = flat_start(trainer)
    torch.testing.assert_close(summed.total.float(), start - end, rtol=0, atol=0)
    blocks = Layout.of(trainer.model).split(start - end)
    assert summed.norm == pytest.approx(float(clip(blocks, Unclipped()).norms.norm()))


def test_dropout_differs_by_user_and_round_and_repeats(trainer):
    dropping = build_trainer(small_config(model__dropout=0.3))
    start = flat_start(dropping)
    first = train_cohort(dropping, start, [4], round_=1).total
    assert train_cohort(dropping, start, [4], round_=1).total.equal(first)
    assert not train_cohort(dropping, start, [4], round_=2).total.equal(first)


@dataclasses.dataclass(frozen=True)
class Alike:
    """A data set whose users all have the one example of user 0, in which no order can differ."""

    whole: object

    def __getattr__(self, name):
        return getattr(self.whole, name)

    def user(self, index):
        return self.whole.user(0).take(torch.tensor([0]))


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_users_with_the_same_data_draw_dropout_of_their_own(engine):
    for dropout in (0.0, 0.3):
        trainer = build_trainer(small_config(model__dropout=dropout, runtime__engine=engine))
        trainer = dataclasses.replace(trainer, dataset=Alike(trainer.dataset))
        start = flat_start(trainer)
        one, other = (train_cohort(trainer, start, [user], round_=1).total for user in (4, 5))
        assert one.equal(other) == (dropout == 0)


def test_nodes_of_one_process_keep_their_users_apart(trainer):
    """Each numbers its own from 0, and all share one cache."""
    whole = trainer.dataset
    nodes = [
        dataclasses.replace(trainer, dataset=DatasetPartition(whole, part, 2)) for part in (0, 1)
    ]
    for _ in range(2):
        for part, node in enumerate(nodes):
            assert node.prepared(3).inputs.equal(whole.user(2 * 3 + part).inputs)
    assert len(trainer.cache) == 2


def test_a_cuda_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        assert resolve_device("auto").type == "cuda"
    with pytest.raises(InputError, match=r"runtime\.device"):
        resolve_device("cuda:99")
    assert resolve_device("cpu").type == "cpu"


def test_a_deployment_trains_each_user_alone():
    config = small_config(runtime__deployment=True, runtime__engine="stacked")
    assert build_trainer(config).stacked is None
    assert build_trainer(small_config(runtime__engine="stacked")).stacked is not None
