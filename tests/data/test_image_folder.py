"""Image files become users' examples: by their folders or by a pattern, read when needed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from held_out import held_out
from own_data import CLASSES, HELD_OUT, USERS, pixels_of, write_images
from PIL import Image
from schema import data_options

from fedpriv.data import build_dataset
from fedpriv.errors import EnvironmentFault, InputError

FORM = {"size": 8, "color": "grey"}


def built(folder, seed=3, **options):
    settings = {"name": "image_folder", "path": folder, "held_out": HELD_OUT, "image": FORM}
    return build_dataset(data_options(**{**settings, **options}), seed)


def users_of(dataset):
    return {user_id: dataset.user(place) for place, user_id in enumerate(dataset.user_ids)}


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images")


def test_folders_are_users_and_classes(folder):
    dataset = built(folder)
    assert dataset.user_ids == USERS
    assert (dataset.classes, dataset.input_shape) == (2, (1, 8, 8))
    assert [user.targets.tolist() for user in users_of(dataset).values()] == [[0, 0, 1]] * 10
    assert held_out(dataset).targets.tolist() == [0, 0, 1, 1]
    facts = dataset.facts
    assert (facts.users, facts.example, facts.held_out) == ("person", "image", "unnamed")


def test_pixels_are_those_that_pillow_gives_resized_and_scaled(folder):
    (read,) = users_of(built(folder, image={"size": [6, 8], "mean": [0.1, 0.2, 0.3], "std": 0.25}))[
        USERS[2]
    ].inputs[:1]
    image = Image.fromarray(pixels_of(USERS[2], 0, 10)).resize((8, 6), Image.Resampling.BILINEAR)
    expected = (np.asarray(image) / 255 - [0.1, 0.2, 0.3]) / 0.25
    np.testing.assert_allclose(read.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_a_pattern_reads_users_of_file_names(tmp_path):
    for user in USERS:
        for number, label in enumerate(CLASSES):
            path = tmp_path / label / f"{user}-{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels_of(user, number)).save(path)
    Image.fromarray(pixels_of("x", 0)).save(tmp_path / "cat" / "nobody.png")
    dataset = built(tmp_path, pattern=r"(?P<class>\w+)/(?P<user>\w+)-\d+\.png", held_out=None)
    assert set(dataset.user_ids) < set(USERS)
    assert "1 record of nobody, left out" in dataset.sizes
    assert {len(user) for user in users_of(dataset).values()} == {2}
    assert dataset.facts.held_out == "others"


def test_whom_no_part_holds_out_a_hash_does_whoever_else_is_there(tmp_path):
    people = {f"p{number}": 2 for number in range(40)}
    write_images(tmp_path / "all", people)
    shutil.rmtree(tmp_path / "all" / HELD_OUT)
    whole = built(tmp_path / "all", held_out=None)
    held = set(people) - set(whole.user_ids)
    assert 1 <= len(held) <= 12
    assert len(held_out(whole)) == 2 * len(held)
    one_less = {name: count for name, count in people.items() if name != whole.user_ids[0]}
    write_images(tmp_path / "less", one_less)
    shutil.rmtree(tmp_path / "less" / HELD_OUT)
    fewer = built(tmp_path / "less", held_out=None)
    assert fewer.user_ids == whole.user_ids[1:]
    development = built(tmp_path / "all", held_out=None, evaluation="development")
    tuned_on = set(whole.user_ids) - set(development.user_ids)
    assert 1 <= len(tuned_on) <= 12
    assert not held & set(development.user_ids)
    assert len(held_out(development)) == 2 * len(tuned_on)


def test_a_bad_file_is_one_record_of_one_user(folder):
    before = users_of(built(folder))
    whole = (folder / USERS[1] / "cat" / "0.png").read_bytes()
    (folder / USERS[1] / "cat" / "0.png").write_bytes(whole[:200])
    (folder / USERS[2] / "dog" / "1.jpg").write_bytes(b"")
    (folder / USERS[3] / "horse").mkdir()
    shutil.copy(folder / USERS[3] / "cat" / "0.png", folder / USERS[3] / "horse")
    (folder / USERS[4] / "cat" / "notes.txt").write_text("no image")
    Image.fromarray(np.ones((9, 9), np.uint16)).save(folder / USERS[5] / "cat" / "deep.png")
    dataset = built(folder)
    after = users_of(dataset)
    assert [len(after[user]) for user in USERS[:6]] == [3, 2, 2, 3, 3, 3]
    assert [after[user].skipped for user in USERS[:6]] == [0, 1, 1, 1, 0, 1]
    assert "1 of other classes, left out" in dataset.sizes
    # One horse of 32 images; which of the others are broken only who reads them knows.
    assert "31 in all, as far as they can be read" in dataset.sizes
    for user in (USERS[0], *USERS[3:]):
        assert torch.equal(before[user].inputs, after[user].inputs)
    stops = built(folder, on_bad="stop")
    with pytest.raises(InputError, match=r"0\.png: cannot be decoded"):
        stops.user(1)
    assert len(stops.user(0)) == 3


def test_all_bad_is_told_before_anything_is_spent(folder):
    for path in folder.rglob("user*/*/*"):
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"none of the users' records can be used: .*decoded"):
        built(folder).require_usable()


def test_a_cap_is_drawn_for_each_user_alone(tmp_path):
    counts = dict.fromkeys(USERS, 6)
    kept = users_of(built(write_images(tmp_path / "one", counts), examples_per_user=3))
    other = {**counts, USERS[0]: 9}
    again = users_of(built(write_images(tmp_path / "two", other), examples_per_user=3))
    assert {len(user) for user in kept.values()} == {3}
    for user in USERS[1:]:
        assert torch.equal(kept[user].inputs, again[user].inputs)


def test_made_up_users_get_images_by_class(folder):
    dataset = built(folder, users=5, partition={"kind": "shards", "shards_per_user": 1})
    assert dataset.facts.users == "dealt"
    assert all(len(user.targets.unique()) <= 2 for user in users_of(dataset).values())
    assert sum(len(user) for user in users_of(dataset).values()) == 30


def test_a_digest_is_of_the_images_and_not_of_their_place(folder, tmp_path):
    digest = built(folder).digest()
    shutil.copytree(folder, tmp_path / "copy")
    assert built(tmp_path / "copy").digest() == digest
    path = tmp_path / "copy" / USERS[7] / "cat" / "0.png"
    Image.fromarray(pixels_of("other", 0)).save(path)
    assert built(tmp_path / "copy").digest() != digest
    (folder / HELD_OUT / "cat" / "0.png").unlink()
    assert built(folder).digest() == digest  # public


def test_nothing_is_decoded_before_a_user_is_read(folder, monkeypatch):
    opened = []
    own = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(Path(file.name)) or own(file))
    dataset = built(folder)
    assert not opened
    dataset.user(3)
    assert {path.parts[-3] for path in opened} == {USERS[3]}


def test_a_folder_that_holds_itself_is_gone_through_once(folder):
    (folder / USERS[0] / "cat" / "again").symlink_to(folder)
    assert len(built(folder).user(0)) >= 3


def test_a_disk_that_fails_is_nobodys_bad_image(folder, monkeypatch):
    dataset = built(folder)

    def failing(path, *arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(EnvironmentFault):
        dataset.user(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, r"data\.path: /.*/nowhere does not exist"),
        ({"path": "empty/file"}, r"data\.path: .*file is not a folder"),
        ({"path": None}, r"data\.path must name the folder"),
        (
            {"held_out": None, "path": "flat"},
            r"no path says whose it is, such as cat/0\.png; lay .* user/class/file, .*kind: iid",
        ),
        (
            {"held_out": None, "path": "flat/cat", "classes": None},
            r"no path says whose it is or its class, such as 0\.png; lay images as user/class/file",
        ),
        (
            {"held_out": None, "path": "broken", "classes": None},
            r"none of the images can be used: \S*0\.png: cannot be decoded \([^<>/]*\)$",
        ),
        ({"pattern": "(?P<user>x)"}, r"data\.pattern: .* reads none of the 34 paths"),
        ({"path": "empty"}, r"data\.path: .*empty has no images"),
        ({"held_out": "tset"}, r"data\.held_out: there is no /.*/images/tset; .*held_out: null"),
        ({"held_out": "hollow"}, r"data\.held_out: /.*/images/hollow holds no images"),
        ({"classes": ["cat"]}, r"data\.classes: two or more"),
        ({"classes": ["cat", "cat"]}, r"data\.classes: two or more are needed, each once"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_key(folder, monkeypatch, options, message):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty").mkdir()
    (folder.parent / "empty" / "file").touch()
    (folder / "hollow").mkdir()
    broken = folder.parent / "broken" / "u" / "cat" / "0.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no image")
    write_images(folder.parent / "f", {"u": 3})
    shutil.copytree(folder.parent / "f" / "u", folder.parent / "flat")
    with pytest.raises(InputError, match=message) as caught:
        built(folder, **{"classes": 2 if "path" in options else None, **options})
    assert "\n" not in str(caught.value)
