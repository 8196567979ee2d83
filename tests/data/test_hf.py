"""Rows of a `datasets` data set become users' examples, from a folder or as an object."""

import pickle

import datasets
import numpy as np
import pytest
import torch
from held_out import held_out
from own_data import CLASSES, USERS, hf_rows, pixels_of, rows_of, write_hf
from PIL import Image
from schema import data_options

from fedpriv.data import build_dataset
from fedpriv.data.hf import hf_users
from fedpriv.errors import InputError

IMAGE = {"size": 8, "mean": 0.0, "std": 1.0}
OTHERS = {f"other{number}": 4 for number in range(3)}


def built(folder, seed=3, **options):
    settings = {"name": "hf", "path": folder, "held_out": "test", "image": IMAGE}
    return build_dataset(data_options(**{**settings, **options}), seed)


def users_of(dataset):
    return {user_id: dataset.user(place) for place, user_id in enumerate(dataset.user_ids)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("hf") / "images")


def test_nothing_is_predicted_from_itself():
    with pytest.raises(InputError, match=r"^data\.input: height is what is predicted; leave"):
        hf_users(hf_rows("rows"), input=["x", "height"], target="height", predict="number")


def test_rows_are_their_users(folder):
    dataset = built(folder)
    assert dataset.user_ids == USERS
    assert (dataset.classes, dataset.input_shape, dataset.facts.held_out) == (
        2,
        (3, 8, 8),
        "others",
    )
    image = Image.fromarray(pixels_of(USERS[1], 4)).resize((8, 8), Image.Resampling.BILINEAR)
    read = dataset.user(1)
    np.testing.assert_allclose(
        read.inputs[0].permute(1, 2, 0).numpy(), np.asarray(image) / 255, atol=1e-6
    )
    assert read.targets.tolist() == [int(rows_of(USERS[1], n)[0] > 0) for n in range(4)]
    assert len(held_out(dataset)) == 12


def test_an_object_gives_what_its_folder_gives(folder):
    handed = hf_users(hf_rows(), hf_rows("images", OTHERS), image=IMAGE)
    again = pickle.loads(pickle.dumps(handed))
    for user, examples in users_of(built(folder)).items():
        for other in (handed, again):
            mine = other.user(other.user_ids.index(user))
            assert torch.equal(examples.inputs, mine.inputs)
            assert torch.equal(examples.targets, mine.targets)
    assert handed.digest() == built(folder).digest() == again.digest()


def test_a_digest_changes_with_a_users_row_alone():
    def digest(rows, others=OTHERS):
        return hf_users(rows, hf_rows("rows", others), input="x").digest()

    rows = hf_rows("rows")
    assert digest(rows) == digest(hf_rows("rows"), {"other": 4})
    shuffled = rows.select(range(len(rows) - 1, -1, -1)).select(range(len(rows) - 1, -1, -1))
    assert digest(shuffled) == digest(rows)
    changed = rows.to_list()
    changed[3]["x"][1] += 1
    assert digest(datasets.Dataset.from_list(changed)) != digest(rows)


def test_arrays_are_inputs_and_numbers_are_targets():
    options = {"predict": "number", "input": ["x", "height"], "target": "grade", "mean": 0.5}
    parts = (hf_rows("rows"), hf_rows("rows", OTHERS))
    dataset = hf_users(*(each.add_column("grade", each["height"]) for each in parts), **options)
    assert (dataset.task, dataset.classes, dataset.input_shape) == ("regression", 1, (4,))
    row = rows_of(USERS[0], 0)
    expected = np.array([*row, row[0] + row[1]]) - 0.5
    np.testing.assert_allclose(dataset.user(0).inputs[0].numpy(), expected, rtol=1e-5)


def test_a_bad_row_is_one_record_of_one_user():
    raw = hf_rows().cast_column("image", datasets.Image(decode=False)).to_list()
    features = hf_rows().features
    before = users_of(hf_users(hf_rows(), hf_rows("images", OTHERS), image=IMAGE))
    raw[0]["image"] = {"bytes": b"no image", "path": None}
    raw[5]["image"] = {"bytes": raw[5]["image"]["bytes"][:100], "path": None}
    raw[6]["label"] = -1
    broken = datasets.Dataset.from_list(raw, features=features)
    dataset = hf_users(broken, hf_rows("images", OTHERS), image=IMAGE)
    after = users_of(dataset)
    assert [(len(each), each.skipped) for each in after.values()][:3] == [(3, 1), (2, 2), (4, 0)]
    for user in USERS[2:]:
        assert torch.equal(before[user].inputs, after[user].inputs)


def test_rows_of_another_shape_are_bad_ones():
    rows = hf_rows("rows").to_list()
    rows[0]["x"] = rows[0]["x"][:2]
    dataset = hf_users(datasets.Dataset.from_list(rows), hf_rows("rows", OTHERS), input="x")
    assert (len(dataset.user(0)), dataset.user(0).skipped) == (3, 1)


def test_whom_no_part_holds_out_a_hash_does():
    dataset = hf_users(hf_rows("rows", {f"p{n}": 2 for n in range(40)}), input="x")
    assert 28 <= dataset.population <= 39
    assert dataset.facts.held_out == "others"
    assert dataset.classes == len(CLASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user": "who"}, r"data\.user: the data set has no column who"),
        ({"target": "y"}, r"data\.target: the data set has no column y"),
        ({"input": ["image", "label"]}, r"data\.input: .* name one column of images"),
        ({"shape": [3, 9, 9]}, r"data\.shape is \(3, 9, 9\), and data\.image makes \(3, 8, 8\)"),
        ({"split": "trian"}, r"data\.split: there is no part trian; did you mean train\?"),
        ({"path": None}, r"data\.path must name the folder"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_key(folder, options, message):
    with pytest.raises(InputError, match=message) as caught:
        built(folder, **options)
    assert "\n" not in str(caught.value)
