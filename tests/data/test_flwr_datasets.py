"""Partitions of Flower Datasets become users: by a stand-in, and by the library where it is.

Its newest version needs an older `datasets` than ours are tested with, so that it is mostly absent.
"""

import abc
import importlib.util
import types

import datasets
import numpy as np
import pytest
from own_data import CLASSES, USERS, hf_rows, rows_of, write_hf, write_hf_rows
from schema import data_options

from fedpriv.data import build_dataset, flwr_datasets
from fedpriv.errors import InputError

ABSENT = importlib.util.find_spec("flwr_datasets") is None


class Partitioner(abc.ABC):
    """The part of Flower Datasets' own interface that is used."""

    def __init__(self, num_partitions: int, seed: int | None = 42) -> None:
        if num_partitions < 1:
            raise ValueError("at least\none partition")
        self.num_partitions, self.seed, self.dataset = num_partitions, seed, None

    @abc.abstractmethod
    def load_partition(self, partition_id: int) -> datasets.Dataset: ...


class IidPartitioner(Partitioner):
    def load_partition(self, partition_id):
        order = np.random.default_rng(self.seed).permutation(len(self.dataset))
        return self.dataset.select(order[partition_id :: self.num_partitions])


class Everything(IidPartitioner):
    def load_partition(self, partition_id):
        return self.dataset


class Columns(IidPartitioner):
    def load_partition(self, partition_id):
        return self.dataset.select_columns(["label"])


@pytest.fixture
def stand_in(monkeypatch):
    kinds = (Partitioner, IidPartitioner, Everything, Columns)
    module = types.SimpleNamespace(
        **{kind.__name__: kind for kind in kinds}, __all__=[kind.__name__ for kind in kinds]
    )
    monkeypatch.setattr(flwr_datasets, "needed", lambda *of: module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf_rows(tmp_path_factory.mktemp("flwr") / "rows")


def built(folder, seed=3, **options):
    settings = {"name": "flwr_datasets", "path": folder, "held_out": "test", "input": "x"}
    partitioner = {"name": options.pop("partitioner", "IidPartitioner")}
    partitioner |= options.pop("options", {})
    settings |= {"users": 4, "partitioner": partitioner}
    return build_dataset(data_options(**{**settings, **options}), seed)


def rows_held(dataset):
    return [sorted(map(tuple, user.inputs.tolist())) for user in map(dataset.user, range(4))]


def test_a_partition_is_a_user_with_its_rows(folder, stand_in):
    dataset = built(folder)
    assert dataset.user_ids == tuple(f"user-{number}" for number in range(4))
    assert (dataset.facts.users, dataset.facts.held_out) == ("dealt", "unnamed")
    everybodys = sorted(row for rows in rows_held(dataset) for row in rows)
    written = sorted(
        tuple(np.float32(rows_of(user, n)).tolist()) for user in USERS for n in range(4)
    )
    assert everybodys == written
    assert rows_held(built(folder)) == rows_held(dataset)
    assert rows_held(built(folder, seed=4)) != rows_held(dataset)
    assert rows_held(built(folder, seed=4, options={"seed": 3})) == rows_held(dataset)
    assert {len(built(folder, examples_per_user=2).user(n)) for n in range(4)} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partitioner": "IidPartioner"}, r"data\.partitioner: .* did you mean IidPartitioner\?"),
        ({"partitioner": "Partitioner"}, r"data\.partitioner: Flower Datasets has no Partitioner"),
        (
            {"options": {"num_partition": 2}},
            r"\.num_partition: .* num_partitions\?",
        ),
        ({"options": {"seed": None}}, r"data\.partitioner: seed: null deals users anew"),
        ({"users": None}, r"data\.partitioner\.num_partitions \(or data\.users\)"),
        ({"options": {"num_partitions": 0}}, r"refuses: at least one partition"),
        ({"options": {"num_partitions": 5}}, r"data\.users is 4, and IidPartitioner makes 5"),
        ({"partitioner": "Everything"}, r"gives a row to several users"),
        ({"partitioner": "Columns"}, r"splits columns"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_key(folder, stand_in, options, message):
    with pytest.raises(InputError, match=message) as caught:
        built(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not ABSENT, reason="Flower Datasets is installed")
def test_without_the_library_the_line_has_the_command(folder):
    with pytest.raises(InputError, match=r"pip install 'fedpriv\[flwr-datasets\]'"):
        built(folder)


@pytest.mark.skipif(ABSENT, reason="Flower Datasets is not installed")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("IidPartitioner", {}),
        ("DirichletPartitioner", {"partition_by": "label", "alpha": 0.5, "min_partition_size": 1}),
        ("ShardPartitioner", {"partition_by": "label", "num_shards_per_partition": 2}),
        ("PathologicalPartitioner", {"partition_by": "label", "num_classes_per_partition": 1}),
        ("LinearPartitioner", {}),
        ("ExponentialPartitioner", {}),
        ("SizePartitioner", {"partition_sizes": [5, 6, 7, 8]}),
    ],
)
def test_partitioners_of_the_library(folder, name, options):
    dataset = built(folder, partitioner=name, options=options)
    held = rows_held(dataset)
    assert sum(map(len, held)) >= 20
    assert rows_held(built(folder, partitioner=name, options=options)) == held
    assert dataset.digest() == built(folder, partitioner=name, options=options).digest()


@pytest.mark.skipif(ABSENT, reason="Flower Datasets is not installed")
def test_people_of_the_library(tmp_path):
    folder = write_hf(tmp_path / "images")
    dataset = built(
        folder,
        users=12,
        partitioner="NaturalIdPartitioner",
        options={"partition_by": "user"},
        input="image",
        classes=CLASSES,
    )
    assert dataset.user_ids == USERS
    assert (dataset.facts.users, dataset.facts.held_out) == ("person", "others")
    assert len(dataset.user(3)) == len(hf_rows()) // len(USERS)
