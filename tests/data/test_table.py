"""Rows of a table become users' examples; no cell decides how another is read."""

import re

import numpy as np
import pandas as pd
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from held_out import held_out
from own_data import (
    CASES,
    CLASSES,
    USERS,
    rows_of,
    table_rows,
    write_parquet,
    write_table,
    write_table_of_images,
)
from schema import data_options

from fedpriv.data import build_dataset, records
from fedpriv.errors import InputError


def built(folder, seed=3, **options):
    settings = {"name": "table", "path": folder, "held_out": "test.csv", "features": "x."}
    return build_dataset(data_options(**{**settings, **options}), seed)


def users_of(dataset):
    return {user_id: dataset.user(place) for place, user_id in enumerate(dataset.user_ids)}


@pytest.fixture
def folder(tmp_path):
    return write_table(tmp_path / "table")


def test_rows_are_their_users(folder):
    dataset = built(folder, mean=0.5, std=2.0)
    assert dataset.user_ids == USERS
    assert (dataset.classes, dataset.input_shape, dataset.facts.held_out) == (2, (3,), "others")
    read = dataset.user(4)
    expected = np.array([rows_of(USERS[4], number) for number in range(4)], np.float32)
    np.testing.assert_allclose(read.inputs.numpy(), (expected - 0.5) / 2, rtol=1e-6)
    assert read.targets.tolist() == [int(row[0] > 0) for row in expected]
    assert len(held_out(dataset)) == 12


def test_parquet_gives_what_csv_gives(folder, tmp_path):
    csv = users_of(built(folder))
    write_parquet(tmp_path / "parquet")
    parquet = users_of(built(tmp_path / "parquet", held_out="test.parquet"))
    assert csv.keys() == parquet.keys()
    for user, examples in csv.items():
        assert torch.equal(examples.inputs, parquet[user].inputs)
        assert torch.equal(examples.targets, parquet[user].targets)


def test_numbers_are_predicted_as_they_are(folder):
    dataset = built(folder, predict="number", target=["height", "x2"], features=["x0", "x1"])
    assert (dataset.task, dataset.classes, dataset.input_shape) == ("regression", 2, (2,))
    read = dataset.user(0)
    assert read.targets.dtype == torch.float32
    rows = np.array([rows_of(USERS[0], number) for number in range(4)])
    np.testing.assert_allclose(read.targets[:, 0], rows[:, 0] + rows[:, 1], rtol=1e-5)


BAD_ROWS = {
    "a feature that is no number": {"x1": "a lot"},
    "a feature that is missing": {"x2": ""},
    "an infinite feature": {"x0": "1e60"},
    "a class that nobody knows": {"target": "horse"},
    "no class": {"target": ""},
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_one_record_of_one_user(case, folder):
    before = users_of(built(folder))
    rows = table_rows()
    rows[5] |= BAD_ROWS[case]
    pd.DataFrame(rows).to_csv(folder / "people.csv", index=False)
    after = users_of(built(folder))
    assert (len(after[USERS[1]]), after[USERS[1]].skipped) == (3, 1)
    for user in set(USERS) - {USERS[1]}:
        assert torch.equal(before[user].inputs, after[user].inputs)
        assert torch.equal(before[user].targets, after[user].targets)
    with pytest.raises(InputError, match=r"people\.csv: row 6: "):
        built(folder, on_bad="stop").user(1)


def test_rows_of_nobody_and_with_too_many_cells_are_left_out_and_counted(folder):
    with (folder / "people.csv").open("a") as file:
        file.write("user01,1,2,3,cat,1,2,3,4\n,1,2,3,cat,0\n007,1,2,3,dog,0\nuser02,1\n")
    dataset = built(folder)
    assert dataset.user_ids == ("007", *USERS)
    assert "2 records of nobody, left out" in dataset.sizes
    assert len(dataset.user(dataset.user_ids.index("user01"))) == 4
    short = dataset.user(dataset.user_ids.index("user02"))
    assert (len(short), short.skipped) == (4, 1)


def test_images_that_a_table_names_are_read_with_their_user(tmp_path):
    folder = write_table_of_images(tmp_path)
    options = {"user": "who", "target": "kind", "files": "file", "classes": CLASSES}
    dataset = built(folder / "people.tsv", held_out=None, image={"size": 8}, **options)
    assert dataset.input_shape == (3, 8, 8)
    whole = users_of(dataset)
    (folder / "images" / dataset.user_ids[0] / "cat" / "0.png").unlink()
    again = users_of(dataset)
    first, *others = dataset.user_ids
    assert (len(again[first]), again[first].skipped) == (2, 1)
    for user in others:
        assert torch.equal(whole[user].inputs, again[user].inputs)


def test_a_digest_is_of_users_rows(folder, tmp_path):
    digest = built(folder).digest()
    copy = write_table(tmp_path / "copy")
    assert built(copy).digest() == digest
    rows = table_rows()
    rows[3]["x1"] += 1
    pd.DataFrame(rows).to_csv(copy / "people.csv", index=False)
    assert built(copy).digest() != digest


def test_people_in_both_parts_are_told(folder):
    pd.DataFrame(table_rows({USERS[0]: 3})).to_csv(folder / "test.csv", index=False)
    assert built(folder, classes=CLASSES).facts.held_out == "same"


def test_what_is_no_table_is_one_line(folder):
    (folder / "people.csv").write_bytes(b"")
    with pytest.raises(InputError, match=r"data\.path: \S+people\.csv is empty; write"):
        built(folder)
    (folder / "people.csv").unlink()
    (folder / "people.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"people\.parquet: cannot be read as a table"):
        built(folder)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_name_that_means_two_columns_is_refused(folder, form):
    """The second would be renamed, and be a feature: that of what is predicted, say."""
    table = pyarrow.csv.read_csv(folder / "people.csv")
    names = ["target" if name == "x1" else name for name in table.column_names]
    twice = table.rename_columns(names)
    if form == "csv":
        pyarrow.csv.write_csv(twice, folder / "people.csv")
    else:
        (folder / "people.csv").unlink()
        pyarrow.parquet.write_table(twice, folder / "people.parquet")
    with pytest.raises(InputError, match=rf"people\.{form}: several columns are called 'target';"):
        built(folder)


def rewritten(folder, change, encoding="utf-8"):
    """The folder, whose users' table is another text."""
    path = folder / "people.csv"
    path.write_bytes(change(path.read_text("utf-8")).encode(encoding))
    return folder


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        (lambda text: text.replace("user", "who", 1), {}, r"data\.user: .*has no column user;"),
        (lambda text: text.replace("x1", "x9", 1), {}, r"people\.csv: row 1: x1 is no number$"),
        (str, {"features": ("x0", "user")}, r"people\.csv: row 1: user is no number$"),
        (
            str,
            {"features": "x.", "target": "user", "predict": "number", "user": "target"},
            r"row \d+: user is no number$",
        ),
        (str, {"features": ("x0", "target")}, r"^data\.features: target is what is predicted"),
        (str, {"classes": ("cat", "cow")}, r"'dog' is none of the 2 classes \('cat', 'cow'\)"),
    ],
)
def test_columns_and_classes_that_do_not_go_together_are_named(folder, change, options, told):
    rewritten(folder, change)
    if "classes" in options:
        rows = [{**row, "target": "dog"} for row in table_rows()]
        pd.DataFrame(rows).to_csv(folder / "people.csv", index=False)
    with pytest.raises(InputError, match=told) as caught:
        built(folder, **options).require_usable()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "parquet"])
def test_a_table_that_is_no_text_says_so(folder, encoding):
    if encoding == "parquet":
        pd.read_csv(folder / "people.csv").to_parquet(folder / "people.csv")
    else:
        rewritten(folder, str, encoding)
    with pytest.raises(InputError, match=r"people\.csv: is no text in UTF-8; save it so, or end"):
        built(folder)


def test_held_out_records_of_one_class_do_not_tell_the_classes(folder):
    rows = [{**row, "target": "cat"} for row in table_rows({"other": 3})]
    pd.DataFrame(rows).to_csv(folder / "test.csv", index=False)
    with pytest.raises(InputError, match=r"all of these are 'cat'; name the classes$"):
        built(folder)


def test_without_pyarrow_the_line_has_the_command(tmp_path, monkeypatch):
    write_parquet(tmp_path)

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(records, "import_module", absent)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'fedpriv\[parquet\]'"):
        built(tmp_path, held_out="test.parquet")


def counted(dataset):
    """How many users and records its words say are trained on, and how many are measured on."""
    users = re.match(r"(\d+) users with .* each, (\d+) in all", dataset.sizes)
    measured = re.search(r"; (\d+) test record", dataset.description)
    return int(users[1]), int(users[2]), int(measured[1])


def read_from(dataset):
    """How many there are, by reading all of them."""
    users = users_of(dataset).values()
    return len(users), sum(map(len, users)), sum(map(len, dataset.evaluation()))


@pytest.mark.parametrize("predict", ["class", "number"])
@pytest.mark.parametrize("limit", [None, 3])
def test_what_cannot_be_used_is_in_no_count_of_what_is(folder, predict, limit):
    rows = table_rows()
    rows[0] |= BAD_ROWS["a feature that is no number"]
    rows[9]["target"], rows[9]["height"] = "horse", "high"
    rows[14]["user"] = ""
    pd.DataFrame(rows).to_csv(folder / "people.csv", index=False)
    held = pd.read_csv(folder / "test.csv", dtype=str)
    held.loc[[2, 7], "x0"] = "much"
    held.to_csv(folder / "test.csv", index=False)
    options = {"classes": list(CLASSES)}
    if predict == "number":
        options = {"predict": "number", "target": "height", "features": "x."}
    dataset = built(folder, held_out="test.csv", examples_per_user=limit, **options)
    assert counted(dataset) == read_from(dataset)
    assert counted(dataset)[2] == 10
    assert "2 that cannot be used left out" in dataset.description
    assert "1 record of nobody, left out" in dataset.sizes
    assert "as far as they can be read" not in dataset.sizes + dataset.description
    if limit is None:
        wrong = "1 of other classes, left out" if predict == "class" else "2 that cannot be used"
        assert wrong in dataset.sizes


def test_of_what_is_only_read_later_no_count_is_claimed(tmp_path):
    folder = write_table_of_images(tmp_path)
    options = CASES["table of images"]["data"]
    skips, stops = (
        build_dataset(data_options(**{**options, "path": folder / "people.tsv", "on_bad": on}), 3)
        for on in ("skip", "stop")
    )
    for said in (skips.sizes, skips.description):
        assert "as far as they can be read" in said
    assert "as far as" not in stops.sizes + stops.description


def test_cells_that_are_not_utf_8_are_told_and_cost_nobody_else(folder):
    assert built(folder).notes == ()
    path = folder / "people.csv"
    lines = path.read_text().splitlines()
    for row in (3, 8):
        lines[row] = lines[row].replace("cat", "chät").replace("dog", "chät")
    path.write_bytes("\n".join(lines).encode("latin-1"))
    dataset = built(folder)
    (note,) = dataset.notes
    assert note.startswith("data.path: 2 rows of user, target: not in UTF-8")
    assert f"first {path}: row 3: " in note
    assert note.endswith("save the file as UTF-8")
    assert [dataset.user(place).skipped for place in range(4)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.csv", b"", "is empty; write the columns' names in its first line"),
        ("x.csv", b"user;x0;target\na;1;cat\n", "commas are read .* has semicolons; save it with"),
        ("x.csv", b"user\tx0\ttarget\na\t1\tcat\n", "commas are read .* has tabs; save it with"),
        ("x.tsv", b"user,x0,target\na,1,cat\n", "tabs are read .* has commas; save it with tabs"),
        ("x.csv", b'user,x0,target\na,"1,cat\n', 'cannot be read .*; close each quote \\("\\)'),
        ("x.csv", b"user,x0,x0\na,1,2\n", "several columns are called 'x0'; give each a name"),
        ("x.parquet", b"PAR1xxxx", "cannot be read as a table .*; write it anew, or end its name"),
    ],
)
@pytest.mark.parametrize("key", ["path", "held_out"])
def test_a_file_that_is_no_table_is_told_with_its_key_and_what_to_write(
    folder, key, name, content, told
):
    (folder / name).write_bytes(content)
    options = {"path": folder / name} if key == "path" else {"held_out": name}
    if key == "held_out":
        options["path"] = folder / "people.csv"
    with pytest.raises(InputError, match=rf"^data\.{key}: \S+{re.escape(name)}.*{told}") as caught:
        built(folder, **options)
    assert "\n" not in str(caught.value)
