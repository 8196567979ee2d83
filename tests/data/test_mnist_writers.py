import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from held_out import held_out
from schema import data_options

from fedpriv.data import PartitionConfig, build_dataset
from fedpriv.errors import InputError

NATURAL = PartitionConfig(kind="natural")


def config(path, **changes):
    return data_options(name="mnist_writers", path=path, **{"partition": NATURAL, **changes})


def pixels(examples):
    """The fixture paints image i with pixel i: recover i."""
    return ((examples.inputs[:, 0, 0, 0] * 0.3081 + 0.1307) * 255).round().long().tolist()


def test_every_writer_is_a_user_with_their_own_images(mnist_folder, writers):
    dataset = build_dataset(config(mnist_folder), seed=1)
    assert dataset.population == 10
    assert list(dataset.user_ids) == [f"writer-{writer}" for writer in sorted(set(writers))]
    for index, writer in enumerate(sorted(set(writers))):
        assert pixels(dataset.user(index)) == np.flatnonzero(writers == writer).tolist()
    assert len(held_out(dataset)) == 20


def test_development_moves_one_writer_in_eight_out_of_the_population(mnist_folder, writers):
    dataset = build_dataset(config(mnist_folder, evaluation="development"), seed=1)
    hashes = {w: hashlib.sha256(f"writer-{w}".encode()).digest() for w in set(writers)}
    held = [writer for writer, found in hashes.items() if int.from_bytes(found[:4], "big") % 8 == 0]
    assert len(held) == 2
    assert dataset.population == 8
    assert not {f"writer-{writer}" for writer in held} & set(dataset.user_ids)
    assert pixels(held_out(dataset)) == np.flatnonzero(np.isin(writers, held)).tolist()
    used = [pixel for index in range(8) for pixel in pixels(dataset.user(index))]
    assert sorted(used) == np.flatnonzero(~np.isin(writers, held)).tolist()


def test_what_is_said_of_it_is_true(mnist_folder):
    """Whose the t10k images are, no file that is read says; held-out writers are told apart."""

    def facts(**changes):
        found = build_dataset(config(mnist_folder, **changes), seed=1).facts
        return found.users, found.held_out

    iid = {"partition": PartitionConfig(kind="iid"), "users": 5}
    assert facts() == ("person", "unnamed")
    assert facts(evaluation="development") == ("person", "others")
    assert facts(**iid) == ("dealt", "unnamed")
    assert facts(**iid, evaluation="development") == ("dealt", "others")


def test_development_of_a_single_writer_leaves_nobody(mnist_folder, labels):
    rows = np.zeros((60, 8), dtype=">i4")
    rows[:, 0], rows[:, 2] = labels, 2
    header = bytes([0, 0, 12, 2]) + np.array(rows.shape, dtype=">u4").tobytes()
    (mnist_folder / "qmnist-train-labels-idx2-int").write_bytes(header + rows.tobytes())
    with pytest.raises(InputError, match="evaluation=development leaves no training examples"):
        build_dataset(config(mnist_folder, evaluation="development"), seed=1)


def test_the_number_of_users_must_have_a_place_for_each_writer(mnist_folder):
    assert build_dataset(config(mnist_folder, users=10), seed=1).population == 10
    assert build_dataset(config(mnist_folder, users=12), seed=1).population == 10
    with pytest.raises(InputError, match=r"data\.users must be null or at least 10 .*got 9"):
        build_dataset(config(mnist_folder, users=9), seed=1)
    with pytest.raises(InputError, match=r"data\.users must be null or at least 8 .*development"):
        build_dataset(config(mnist_folder, users=7, evaluation="development"), seed=1)


def test_other_partitions_pool_the_writers(mnist_folder):
    iid = PartitionConfig(kind="iid")
    dataset = build_dataset(config(mnist_folder, partition=iid, users=20), seed=1)
    assert [len(dataset.user(index)) for index in range(20)] == [3] * 20
    assert dataset.user_ids[0] == "user-0"


def test_examples_per_user_caps_the_writers(mnist_folder):
    dataset = build_dataset(config(mnist_folder, examples_per_user=5), seed=1)
    assert sorted(len(dataset.user(i)) for i in range(10)) == [4, 4, 4, 5, 5, 5, 5, 5, 5, 5]


@pytest.mark.parametrize("label", [9, 11])
def test_a_label_that_does_not_match_costs_its_writer_one_image(
    split_writer, mnist_folder, labels, writers, label
):
    labels[30] = label
    split_writer("train", labels)
    dataset = build_dataset(config(mnist_folder), seed=1)
    assert list(dataset.user_ids) == [f"writer-{writer}" for writer in sorted(set(writers))]
    for index, writer in enumerate(sorted(set(writers))):
        images = np.flatnonzero(writers == writer)
        assert pixels(dataset.user(index)) == [image for image in images if image != 30]
        assert dataset.user(index).skipped == int(30 in images)


def test_labels_in_another_order_are_refused(split_writer, mnist_folder, labels):
    split_writer("train", np.roll(labels, 1))
    expected = (
        "qmnist-train-labels-idx2-int: QMNIST does not match MNIST: "
        r"class 0 at row 0 where train-labels has 9 \(rows that differ: 60\)"
    )
    with pytest.raises(InputError, match=expected):
        build_dataset(config(mnist_folder), seed=1)


def test_rows_that_are_not_one_an_image_are_refused(split_writer, mnist_folder, labels):
    split_writer("train", labels[:59])
    with pytest.raises(InputError, match=r"expected 59 rows of 8 columns, found shape \[60, 8\]"):
        build_dataset(config(mnist_folder), seed=1)


def test_missing_writers_file_says_where_it_is_distributed(mnist_folder):
    (mnist_folder / "qmnist-train-labels-idx2-int").unlink()
    expected = r"lacks qmnist-train-labels-idx2-int .*github\.com/facebookresearch/qmnist"
    with pytest.raises(InputError, match=expected):
        build_dataset(config(mnist_folder), seed=1)


@pytest.fixture
def real_folder():
    root = os.environ.get("FEDPRIV_DATA")
    if root is None or not (Path(root) / "qmnist").is_dir():
        pytest.skip("set FEDPRIV_DATA to a folder that holds qmnist/ to test on the real files")
    return Path(root) / "qmnist"


def test_real_writers(real_folder):
    dataset = build_dataset(config(real_folder), seed=1)
    sizes = [len(dataset.user(index)) for index in range(dataset.population)]
    assert (len(sizes), min(sizes), max(sizes), sum(sizes)) == (539, 19, 131, 60_000)
    evaluation = held_out(dataset)
    assert evaluation.inputs.shape == (10_000, 1, 28, 28)
    assert abs(evaluation.inputs.mean()) < 0.02
    assert evaluation.inputs.std() == pytest.approx(1.0, abs=0.02)


def test_real_development_writers(real_folder):
    dataset = build_dataset(config(real_folder, evaluation="development"), seed=1)
    assert dataset.population == 539 - 52
    in_population = sum(len(dataset.user(index)) for index in range(dataset.population))
    assert in_population + len(held_out(dataset)) == 60_000
