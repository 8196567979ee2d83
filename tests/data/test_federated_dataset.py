import numpy as np
import pytest
import torch
from held_out import held_out

from fedpriv.data.federated import (
    Examples,
    LabelledImages,
    PartitionedImages,
    PixelScale,
)
from fedpriv.errors import InputError
from fedpriv.transfer import moved_to


@pytest.fixture
def dataset():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 4)
    pool = LabelledImages(images, torch.tensor([0, 1, 2, 3, 4]))
    return PartitionedImages(
        pool=pool,
        parts=[np.array([0, 4]), np.array([], dtype=np.int64), np.array([2])],
        user_ids=["anna", "ben", "cleo"],
        held_out=pool.take(np.array([1])),
        scale=PixelScale(maximum=4, mean=0.5, std=0.25),
        classes=5,
        description="three people",
    )


def test_a_user_gets_their_own_scaled_examples(dataset):
    anna = dataset.user(0)
    assert len(anna) == 2
    assert anna.inputs.dtype == torch.float32
    assert anna.targets.dtype == torch.int64
    assert anna.targets.tolist() == [0, 4]
    assert anna.inputs.shape == (2, *dataset.input_shape) == (2, 3, 2, 4)
    assert anna.inputs[:, 0, 0, 0].tolist() == [-2.0, 2.0]


def test_evaluation_is_scaled_alike(dataset):
    assert held_out(dataset).targets.tolist() == [1]
    assert held_out(dataset).inputs[0, 0, 0, 0].item() == -1.0


def test_changing_a_users_tensors_leaves_the_pool_alone(dataset):
    dataset.user(0).targets.zero_()
    held_out(dataset).targets.zero_()
    assert dataset.user(0).targets.tolist() == [0, 4]
    assert held_out(dataset).targets.tolist() == [1]


def test_empty_user_is_refused_by_id(dataset):
    with pytest.raises(InputError, match="empty user: ben has no examples"):
        dataset.user(1)


@pytest.mark.parametrize("index", [-1, 3])
def test_user_outside_the_population(dataset, index):
    with pytest.raises(IndexError, match=r"outside 0\.\.2"):
        dataset.user(index)


def test_examples_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 inputs but 3 targets"):
        Examples(torch.zeros(2, 1), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 images but 3 labels"):
        LabelledImages(torch.zeros(2, 1, 1, 1), torch.zeros(3, dtype=torch.int64))


def test_to_a_gpu_users_examples_go_from_page_locked_memory_and_nobody_waits(monkeypatch):
    """What is asked of PyTorch, since tests run where there is no GPU."""
    asked = []

    def pin_memory(tensor):
        asked.append(("pin", tensor))
        return tensor.clone()

    def to(tensor, device, non_blocking=False):
        asked.append((str(device), tensor, non_blocking))
        return tensor

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "pin_memory", pin_memory)
        patched.setattr(torch.Tensor, "to", to)
        examples = Examples(torch.rand(2, 3), torch.tensor([0, 1]))
        moved = examples.to(torch.device("cuda:1"))
        assert [(what[0], what[2:]) for what in asked] == [("pin", ()), ("cuda:1", (True,))] * 2
        assert [asked[1][1], asked[3][1]] == [moved.inputs, moved.targets]
        assert asked[0][1] is examples.inputs
        asked.clear()
        examples.to(torch.device("cpu"))
        assert [(what[0], what[2:]) for what in asked] == [("cpu", (False,))] * 2


def test_between_other_devices_nothing_is_pinned():
    rows = torch.rand(2, 3)
    assert moved_to(torch.device("cpu"), rows) is rows
    assert moved_to(torch.device("meta"), rows).is_meta
