"""What a model must know of data beforehand is the same, whatever users have."""

import datasets
import pandas as pd
import pytest
import torch
from own_data import (
    CLASSES,
    HELD_OUT,
    USERS,
    hf_rows,
    table_rows,
    write_images,
    write_table,
    write_texts,
)
from PIL import Image
from schema import data_options
from torch.utils.data import TensorDataset

from fedpriv.data import build_dataset
from fedpriv.data.hf import hf_users
from fedpriv.data.torch_dataset import torch_users

RARE = "unicorn"


def image_folder(folder, rare):
    write_images(folder)
    if rare:
        path = folder / USERS[0] / RARE / "0.png"
        path.parent.mkdir()
        Image.new("RGB", (40, 40)).save(path)
    return build_dataset(data_options(name="image_folder", path=folder, held_out=HELD_OUT), 3)


def table(folder, rare):
    write_table(folder)
    rows = table_rows()
    rows[0]["target"] = RARE if rare else rows[0]["target"]
    pd.DataFrame(rows).to_csv(folder / "people.csv", index=False)
    options = {"name": "table", "path": folder, "held_out": "test.csv", "features": "x."}
    return build_dataset(data_options(**options), 3)


def hf(folder, rare):
    rows = hf_rows("rows").to_list()
    if rare:
        rows[0] |= {"label": RARE, "x": [0.0] * 5}
    others = hf_rows("rows", {"other": 9})
    return hf_users(datasets.Dataset.from_list(rows), others, input="x")


def torch_data_set(folder, rare):
    inputs, targets = torch.zeros(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    targets[0] = 7 if rare else 0
    held_out = TensorDataset(inputs[:2], torch.tensor([0, 1]))
    return torch_users(TensorDataset(inputs, targets), list("aabbcc"), held_out)


def text(folder, rare):
    write_texts(folder)
    if rare:
        (folder / USERS[0] / "0.txt").write_text("unicorn " * 99)
    tokenizer = {"kind": "bpe", "vocabulary": 300}
    options = {"name": "text", "path": folder, "held_out": HELD_OUT, "tokenizer": tokenizer}
    return build_dataset(data_options(**options), 3)


@pytest.mark.parametrize("make", [image_folder, table, hf, torch_data_set, text])
def test_nothing_public_changes_with_what_one_user_has(make, tmp_path):
    plain, other = make(tmp_path / "plain", False), make(tmp_path / "other", True)
    assert (other.classes, other.input_shape, other.task) == (
        plain.classes,
        plain.input_shape,
        plain.task,
    )
    assert other.description.replace("other", "plain") == plain.description
    assert getattr(plain.records, "names", CLASSES) == getattr(other.records, "names", CLASSES)
    assert plain.user_ids == other.user_ids
    whole = [plain.user(place) for place in range(1, plain.population)]
    again = [other.user(place) for place in range(1, plain.population)]
    for one, same in zip(whole, again, strict=True):
        assert torch.equal(one.inputs, same.inputs)
        assert torch.equal(one.targets, same.targets)
    assert plain.digest() != other.digest()
