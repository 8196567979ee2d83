import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from held_out import held_out
from schema import data_options
from scipy.stats import kstest, norm

from fedpriv.data import Examples, build_dataset
from fedpriv.data.federated import DatasetPartition
from fedpriv.errors import InputError
from fedpriv.models import ViTOptions, build_model


def made(**changes):
    return build_dataset(data_options(name="synthetic_images", **{"users": 40, **changes}), seed=5)


def lognormal(**sizes):
    return {"sizes": {"kind": "lognormal", **sizes}}


def test_a_user_is_a_function_of_the_data_sets_seed_and_its_number_alone():
    one, larger = made(), made(users=1000)
    assert torch.equal(one.user(7).inputs, larger.user(7).inputs)
    assert torch.equal(one.user(7).targets, larger.user(7).targets)
    assert not torch.equal(one.user(7).inputs, one.user(8).inputs)
    assert not torch.equal(one.user(7).inputs, made(synthetic={"seed": 1}).user(7).inputs)
    other_run = build_dataset(data_options(name="synthetic_images", users=40), seed=6)
    assert torch.equal(one.user(7).inputs, other_run.user(7).inputs)
    assert one == made()
    assert hash(one) == hash(made())


def test_its_people_are_made_up_and_it_has_no_sizes_to_hide():
    for dataset in (made(), made(synthetic=lognormal(median=8)), DatasetPartition(made(), 0, 2)):
        assert (dataset.facts.users, dataset.facts.held_out) == ("made_up", "made_up")
        assert dataset.sizes == ""


def test_shapes_and_kinds_of_numbers():
    dataset = made(examples_per_user=3, synthetic={"side": 12})
    examples = dataset.user(0)
    assert examples.inputs.shape == (3, *dataset.input_shape) == (3, 1, 12, 12)
    assert examples.inputs.dtype == torch.float32
    assert examples.targets.dtype == torch.int64
    assert dataset.classes == 10
    everything = torch.cat([made().user(index).inputs for index in range(40)])
    assert abs(everything.mean()) < 0.2
    assert 0.8 < everything.std() < 2.5


def test_nobody_held_out_is_a_user_and_the_two_held_out_parts_differ():
    test, development = (held_out(made(evaluation=kind)) for kind in ("test", "development"))
    assert len(test) == len(development) == 1000
    rows = [
        {row.numpy().tobytes() for row in part}
        for part in (test.inputs, development.inputs, *(made().user(i).inputs for i in range(40)))
    ]
    assert sum(map(len, rows)) == len(set.union(*rows))


def test_ten_million_users_take_no_memory():
    tracemalloc.start()
    dataset = made(users=10_000_000)
    last = dataset.user(9_999_999)
    ids = DatasetPartition(dataset, 1, 2).user_ids
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(last) == 10
    assert (len(ids), ids[0], ids[-1]) == (5_000_000, "user-1", "user-9999999")
    assert len(dataset.user_ids) == dataset.population == 10_000_000


@pytest.mark.parametrize("index", [-1, 40])
def test_user_outside_the_population(index):
    with pytest.raises(IndexError, match=r"outside 0\.\.39"):
        made().user(index)


def test_lognormal_sizes_have_the_distribution_that_was_asked_for():
    dataset = made(users=2000, synthetic={"side": 4, **lognormal(median=20, sigma=0.5, max=100)})
    sizes = np.array([len(dataset.user(index)) for index in range(2000)])
    assert sizes.min() >= 1
    assert sizes.max() <= 100
    # Rounding moves a size by a fortieth of the median at most.
    assert kstest(np.log(sizes / 20) / 0.5, norm.cdf).statistic < 0.06


def test_sizes_are_cut_at_one_and_at_the_largest():
    dataset = made(users=200, synthetic={"side": 4, **lognormal(median=3, sigma=3, max=7)})
    sizes = {len(dataset.user(index)) for index in range(200)}
    assert (min(sizes), max(sizes)) == (1, 7)


def test_dirichlet_users_see_few_labels():
    def distinct(**partition):
        dataset = made(examples_per_user=20, partition=partition)
        return np.mean([len(dataset.user(i).targets.unique()) for i in range(40)])

    assert distinct(kind="dirichlet", alpha=0.05) < 4 < 7 < distinct(kind="iid")


def test_a_small_vision_transformer_learns_it_from_users_and_not_from_shuffled_labels():
    dataset = made(users=150, synthetic={"side": 14})
    train = Examples.join([dataset.user(index) for index in range(150)])
    assert accuracy_after_training(train, held_out(dataset)) > 0.6
    shuffled = train.targets[torch.randperm(1500, generator=torch.Generator().manual_seed(1))]
    assert accuracy_after_training(Examples(train.inputs, shuffled), held_out(dataset)) < 0.2


def accuracy_after_training(train, test):
    model = build_model(ViTOptions(dim=32, depth=1, heads=2, patch=7), (1, 14, 14), 10, seed=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(4):
        for batch in torch.arange(len(train)).split(30):
            optimizer.zero_grad()
            F.cross_entropy(model(train.inputs[batch]), train.targets[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(test.inputs).argmax(1) == test.targets).float().mean())


def test_its_description_says_that_it_is_synthetic_and_how_many_examples_users_have():
    for text in ("synthetic images", "made up", "40 users (iid)", "10 training examples each"):
        assert text in made().description
    uneven = made(synthetic=lognormal(median=8, max=50)).description
    assert "1 to 50 training examples each, lognormal with median 8 and sigma 1" in uneven
    assert "\n" not in uneven


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": None}, r"data\.users must be set for synthetic_images"),
        ({"partition": {"kind": "shards"}}, r"data\.partition\.kind must be iid or dirichlet"),
        ({"partition": {"kind": "natural"}}, r"data\.partition\.kind must be iid or dirichlet"),
        (
            {"examples_per_user": 5, "synthetic": lognormal()},
            r"data\.examples_per_user must be null .* write data\.synthetic\.sizes\.max",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_key(changes, message):
    with pytest.raises(InputError, match=message):
        made(**changes)
