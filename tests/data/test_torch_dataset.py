"""Any map-style data set of torch's becomes users' examples."""

import random

import numpy as np
import pytest
import torch
from held_out import held_out
from in_process import small_config
from torch.utils.data import Dataset, TensorDataset

from fedpriv.data.torch_dataset import torch_users
from fedpriv.errors import EnvironmentFault, InputError
from fedpriv.federation.builders import build_trainer

IDS = np.repeat(np.arange(6), 3)
X = torch.arange(18 * 4, dtype=torch.float64).reshape(18, 2, 2)
Y = torch.arange(18) % 3
HELD_OUT = TensorDataset(X[:3], Y[:3])


class Fragile(Dataset):
    """Examples of which some raise."""

    def __init__(self, errors, noise=False):
        self.errors, self.noise = errors, noise

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        if index in self.errors:
            raise self.errors[index]
        drawn = random.random() + np.random.random() + torch.rand(()).item() if self.noise else 0
        return (X[index] + drawn).numpy(), int(Y[index])


def users_of(dataset):
    return {user_id: dataset.user(place) for place, user_id in enumerate(dataset.user_ids)}


def test_examples_are_their_users():
    dataset = torch_users(TensorDataset(X, Y), IDS, HELD_OUT, mean=1.0, std=2.0)
    assert dataset.user_ids == tuple("012345")
    assert (dataset.classes, dataset.input_shape) == (3, (2, 2))
    read = dataset.user(2)
    torch.testing.assert_close(read.inputs, ((X[6:9] - 1) / 2).float())
    assert read.targets.tolist() == Y[6:9].tolist()
    assert len(held_out(dataset)) == 3


def test_a_bad_example_is_one_of_one_user():
    errors = {0: KeyError("gone"), 4: OSError("cannot identify"), 5: ValueError("no")}
    dataset = torch_users(Fragile(errors), IDS, HELD_OUT)
    assert [len(user) for user in users_of(dataset).values()] == [2, 1, 3, 3, 3, 3]
    assert [user.skipped for user in users_of(dataset).values()] == [1, 2, 0, 0, 0, 0]
    with pytest.raises(InputError, match="example 0: cannot be decoded"):
        torch_users(Fragile(errors), IDS, HELD_OUT, on_bad="stop").user(0)


def test_a_disk_that_fails_is_nobodys_bad_example():
    dataset = torch_users(Fragile({0: OSError(5, "Input/output error", "/x")}), IDS, HELD_OUT)
    with pytest.raises(EnvironmentFault):
        dataset.user(0)


def test_what_is_drawn_is_drawn_alike_and_leaves_no_trace():
    dataset = torch_users(Fragile({}, noise=True), IDS, HELD_OUT)
    state = torch.random.get_rng_state()
    first, again = dataset.user(1), dataset.user(1)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, X[3:6].float())
    assert torch.equal(state, torch.random.get_rng_state())
    assert dataset.digest() == dataset.digest()


def test_a_digest_is_of_users_examples():
    digest = torch_users(TensorDataset(X, Y), IDS, HELD_OUT).digest()
    assert torch_users(TensorDataset(X.clone(), Y), IDS, HELD_OUT).digest() == digest
    other = X.clone()
    other[7, 0, 0] += 1
    assert torch_users(TensorDataset(other, Y), IDS, HELD_OUT).digest() != digest
    assert torch_users(TensorDataset(X, Y), IDS[::-1].copy(), HELD_OUT).digest() != digest


def test_made_up_users_and_numbers_to_predict():
    dataset = torch_users(
        TensorDataset(X, X[:, 0].float()),
        held_out=TensorDataset(X[:2], X[:2, 0].float()),
        predict="number",
        classes=2,
        users=4,
        partition={"kind": "iid"},
    )
    assert (dataset.task, dataset.classes, dataset.facts.users) == ("regression", 2, "dealt")
    assert sorted(len(user) for user in users_of(dataset).values()) == [4, 4, 5, 5]
    assert dataset.user(0).targets.shape[1:] == (2,)


def test_one_user_less_leaves_the_others_alone():
    whole = users_of(torch_users(Fragile({}, noise=True), IDS, HELD_OUT, examples_per_user=2))
    rest = torch.utils.data.Subset(Fragile({}, noise=True), range(3, 18))
    fewer = users_of(torch_users(rest, IDS[3:], HELD_OUT, examples_per_user=2))
    for user, examples in fewer.items():
        assert torch.equal(examples.inputs, whole[user].inputs)


def test_what_does_not_fit_is_one_line():
    with pytest.raises(InputError, match="user_ids: 17 for 18 examples"):
        torch_users(TensorDataset(X, Y), IDS[1:])
    with pytest.raises(InputError, match="do not say whose"):
        torch_users(TensorDataset(X, Y))


class Odd(Fragile):
    """Examples that are not what they should be."""

    def __init__(self, item):
        super().__init__({})
        self.item = item

    def __getitem__(self, index):
        return self.item(index)


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (lambda index: {"x": X[index], "y": 0}, r"it is a dict, and no pair of an input and"),
        (lambda index: (X[index],), r"it is a tuple, and no pair of an input and a target"),
        (lambda index: (X[index].to(torch.complex64), 0), r"an input is complex; write its parts"),
    ],
)
def test_an_example_that_is_none_is_told(item, told):
    dataset = torch_users(Odd(item), IDS, HELD_OUT)
    with pytest.raises(InputError, match=told):
        dataset.require_usable()
    # Held out it says nothing of classes, and ends nothing.
    with pytest.raises(InputError, match=r"^data\.classes: null takes the classes"):
        torch_users(Fragile({}), IDS, Odd(lambda index: {"x": X[index]}))


def test_a_data_set_without_length_is_told(tmp_path):
    (tmp_path / "lengthless.py").write_text(
        "class D:\n"
        "    def __len__(self):\n"
        "        raise RuntimeError('of\\nno length')\n"
        "    def __getitem__(self, index):\n"
        "        return [0.0], 0\n"
    )
    data = {"name": "torch", "dataset": {"name": "lengthless:D"}}
    with pytest.raises(InputError, match=r"^data\.dataset: lengthless:D has no length: of no"):
        build_trainer(small_config(code=str(tmp_path), data=data))
