"""A part to measure on that the config does not name is no user, and neither is a whole part.

Of a simulation: at a node nobody's name ends anything.
"""

import re
import shutil

import pytest
from own_data import HELD_OUT, USERS, write_images, write_lines, write_table, write_texts
from schema import data_options

from fedpriv.data import build_dataset
from fedpriv.data.registry import DATASETS
from fedpriv.errors import InputError

TABLE = {"name": "table", "user": "user", "target": "target", "features": "x."}
KINDS = {
    "image_folder": (write_images, {"name": "image_folder", "image": {"size": 8}}),
    "table": (write_table, TABLE),
    "text": (write_texts, {"name": "text", "block": 8}),
}


def part_of(folder):
    return next(path for path in folder.iterdir() if path.name.startswith(HELD_OUT))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("called", ["test", "Val", "held-out"])
def test_a_forgotten_part_is_named_with_what_to_write(tmp_path, kind, called):
    write, options = KINDS[kind]
    folder = write(tmp_path / "data")
    part = part_of(folder)
    part = part.rename(part.with_name(called + part.suffix))
    options = {**options, "path": folder}
    with pytest.raises(InputError, match=rf"data\.held_out: .*; write held_out: {part.name}, or"):
        build_dataset(data_options(**options), 3).require_usable()
    named = build_dataset(data_options(**options, held_out=part.name), 3)
    named.require_usable()
    assert called not in named.user_ids
    part.rename(part.with_name(f"tester{part.suffix}"))
    build_dataset(data_options(**options), 3).require_usable()


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("called", ["val", "Valid", "testing"])
def test_a_second_part_beside_the_named_one_is_told_and_not_trained_on(tmp_path, kind, called):
    write, options = KINDS[kind]
    folder = write(tmp_path / "data")
    part = part_of(folder)
    second = part.with_name(called + part.suffix)
    (shutil.copytree if part.is_dir() else shutil.copy)(part, second)
    for named, other in ((part, second), (second, part)):
        options = {**options, "path": folder, "held_out": named.name}
        said = rf"data\.held_out: .* has {other.name}, .*; write held_out: {other.name}, or move it"
        with pytest.raises(InputError, match=said):
            build_dataset(data_options(**options), 3).require_usable()
    second.rename(tmp_path / "elsewhere")
    build_dataset(data_options(**{**options, "held_out": part.name}), 3).require_usable()


def test_a_forgotten_table_of_texts_is_told(tmp_path):
    folder = write_lines(tmp_path / "data")
    options = {"name": "text", "path": folder, "user": "role", "text": "line", "block": 8}
    with pytest.raises(InputError, match=r"has test\.csv, .* write held_out: test\.csv, or"):
        build_dataset(data_options(**options), 3).require_usable()
    named = build_dataset(data_options(**options, held_out="test.csv"), 3)
    named.require_usable()
    assert named.population == len(USERS)
    shutil.copy(folder / "test.csv", folder / "val.csv")
    with pytest.raises(InputError, match=r"has val\.csv, .*, since held_out is test\.csv; write"):
        build_dataset(data_options(**options, held_out="test.csv"), 3).require_usable()


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("image_folder", "in/(?P<user>[^/]+)/.*"),
        ("text", "in/(?P<user>[^/]+)/.*"),
        ("text", r"in/(?P<user>[^/.]+)\.txt"),
    ],
)
def test_a_part_that_a_pattern_takes_for_a_user_is_told(tmp_path, kind, pattern):
    write, options = KINDS[kind]
    write(tmp_path / "data" / "in")
    part_of(tmp_path / "data" / "in").rename(tmp_path / "data" / HELD_OUT)
    for user in USERS:
        if kind == "text":
            shutil.copy(tmp_path / "data" / HELD_OUT / "0.txt", tmp_path / f"data/in/{user}.txt")
    options = {**options, "path": tmp_path / "data", "pattern": pattern, "held_out": HELD_OUT}
    build_dataset(data_options(**options), 3).require_usable()
    # What the pattern does not read is nobody's, and what lies in a user's folder is the user's.
    for at in ("val", f"in/{USERS[0]}/val"):
        shutil.copytree(tmp_path / "data" / HELD_OUT, tmp_path / "data" / at)
    build_dataset(data_options(**options), 3).require_usable()
    shutil.copytree(tmp_path / "data" / HELD_OUT, tmp_path / "data" / "in" / "val")
    told = "in/val"
    if pattern.endswith("txt"):
        shutil.copy(tmp_path / "data" / HELD_OUT / "0.txt", tmp_path / "data/in/val.txt")
        told = r"in/val\.txt"
    with pytest.raises(InputError, match=rf"has {told}, .* write held_out: {told}, or move"):
        build_dataset(data_options(**options), 3).require_usable()


@pytest.mark.parametrize("kind", ["image_folder", "text"])
@pytest.mark.parametrize("held_out", [HELD_OUT, None])
def test_a_folder_of_all_users_is_not_one_user(tmp_path, kind, held_out):
    write, options = KINDS[kind]
    whole = write(tmp_path / "data" / "train")
    part = part_of(whole)
    part.rename(tmp_path / "data" / (HELD_OUT if held_out else "others"))
    options = {**options, "path": tmp_path / "data", "held_out": held_out}
    with pytest.raises(InputError, match=r"train would be one user; write the folder"):
        build_dataset(data_options(**options), 3).require_usable()


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("named", [True, False])
def test_a_named_part_that_is_not_there_is_said_with_its_path(tmp_path, kind, named):
    write, options = KINDS[kind]
    folder = write(tmp_path / "data")
    (folder / "hollow").mkdir()
    if kind == "text":
        options |= {} if named else {"tokenizer": {"kind": "bpe", "vocabulary": 300}}
    elif named:
        options = {**options, "classes": ["cat", "dog"]}
    for part, why in (("tset", "there is no {}"), ("hollow", "{} holds no")):
        said = re.escape(f"data.held_out: {why.format(folder / part)}")
        given = data_options(**options, path=folder, held_out=part)
        with pytest.raises(InputError, match=rf"^{said}.*; .* write held_out: null"):
            build_dataset(given, 3).require_usable()
    if named:  # as a node of a deployment may
        users = build_dataset(data_options(**options, path=folder, held_out="tset"), 3)
        assert len(users.user(0))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_path_that_is_not_there_is_said(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, options = KINDS[kind]
    for name in ("people.csv", "folder"):
        said = re.escape(f"data.path: {tmp_path / name} does not exist; name ")
        with pytest.raises(InputError, match=f"^{said}"):
            build_dataset(data_options(**options, path=name, held_out="test"), 3)


@pytest.mark.parametrize(
    "name",
    [
        *("common_voice", "fsdd", "hf", "idx_images", "image_folder", "librispeech"),
        *("mnist_writers", "speech_commands", "table", "text", "user_files"),
    ],
)
def test_a_path_that_is_not_there_is_told_alike_by_all_that_read_files(tmp_path, name):
    gone, users = tmp_path / "gone", {} if name == "user_files" else {"users": 2}
    told = {gone: f"data.path: {gone} does not exist; name ", None: "data.path must name "}
    for path, said in told.items():
        options = DATASETS.parse({"name": name, "path": path and str(path), **users})
        with pytest.raises(InputError) as caught:
            build_dataset(options, seed=0)
        assert str(caught.value).startswith(said)
