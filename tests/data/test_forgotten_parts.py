"""A part to measure on that the config does not name is no user, and neither is a whole part.

Of a simulation: at a node nobody's name ends anything.
"""

import re

import pytest
from own_data import HELD_OUT, write_images, write_table, write_texts
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
