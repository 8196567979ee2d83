"""Users as files: what is written is read again, to the bit, and nothing else is."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedpriv.data.registry import DATASETS, build_dataset
from fedpriv.data.user_files import write_users
from fedpriv.errors import InputError


def digits(users=6):
    return build_dataset(DATASETS.parse({"name": "digits", "users": users}), 17)


def read(folder, **options):
    return build_dataset(DATASETS.parse({"name": "user_files", "path": str(folder), **options}), 17)


@pytest.fixture
def folder(tmp_path):
    dataset = digits()
    write_users(dataset, range(dataset.population), tmp_path / "files")
    measured = next(dataset.evaluation())
    tensors = {"inputs": measured.inputs.contiguous(), "targets": measured.targets}
    save_file(tensors, tmp_path / "files" / "held_out.safetensors")
    return tmp_path / "files"


def test_what_is_written_is_read_again_to_the_bit(folder):
    written, found = digits(), read(folder)
    assert sorted(written.user_ids) == list(found.user_ids)
    for place, user_id in enumerate(found.user_ids):
        mine, theirs = found.user(place), written.user(written.user_ids.index(user_id))
        assert torch.equal(mine.inputs, theirs.inputs)
        assert torch.equal(mine.targets, theirs.targets)
    held_out = next(written.evaluation())
    assert torch.equal(next(found.evaluation()).inputs, held_out.inputs)
    assert (found.classes, found.input_shape, found.facts) == (
        written.classes,
        written.input_shape,
        written.facts,
    )


@pytest.mark.parametrize("user_id", ["a/b", "..", ".hidden", "@x", "ü %2F", "A B"])
def test_an_id_may_be_any_text_and_leaves_its_folder_in_peace(tmp_path, user_id):
    dataset = replace(digits(), user_ids=(user_id, *(f"u{i}" for i in range(5))))
    write_users(dataset, [0], tmp_path / "files")
    assert list(read(tmp_path / "files").user_ids) == [user_id]
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {"users"}


def test_a_node_has_its_own_users_and_no_held_out_examples(tmp_path):
    write_users(digits(), [1, 3], tmp_path / "node")
    assert read(tmp_path / "node").population == 2
    assert list(read(tmp_path / "node").evaluation()) == []


def test_the_digest_follows_ids_and_numbers_but_not_the_folder(folder, tmp_path):
    before = read(folder).digest()
    assert read(folder.rename(tmp_path / "elsewhere")).digest() == before
    file = next((tmp_path / "elsewhere" / "users").iterdir())
    numbers = load_file(file)
    numbers["inputs"] = numbers["inputs"].clone()
    numbers["inputs"][0, 0, 0, 0] += 1
    save_file(numbers, file)
    moved = read(tmp_path / "elsewhere").digest()
    assert moved != before
    file.rename(file.with_name("somebody.safetensors"))
    assert read(tmp_path / "elsewhere").digest() not in (before, moved)


def test_impossible_examples_are_left_out_and_counted(folder):
    file = folder / "users" / "user-0.safetensors"
    numbers = load_file(file)
    numbers["targets"] = torch.cat([torch.tensor([10, -1]), numbers["targets"]])
    inputs = torch.cat([numbers["inputs"][:2], numbers["inputs"]])
    inputs[2, 0, 0, 0] = float("nan")
    save_file({"inputs": inputs, "targets": numbers["targets"]}, file)
    user = read(folder).user(0)
    assert (len(user), user.skipped) == (len(inputs) - 3, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda numbers: {"inputs": numbers["inputs"]}, "wants tensors inputs"),
        (lambda numbers: numbers | {"inputs": numbers["inputs"][1:]}, "must be torch.float32"),
        (lambda numbers: numbers | {"inputs": numbers["inputs"].double()}, "must be torch.float32"),
        (lambda numbers: numbers | {"targets": numbers["targets"].int()}, "targets \\(int64\\)"),
    ],
)
def test_a_file_that_is_none_is_one_line_about_it(folder, change, said):
    file = folder / "users" / "user-0.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(InputError, match=said):
        read(folder).user(0)


def test_bad_folders_are_one_line(tmp_path, folder):
    with pytest.raises(InputError, match=r"data\.path must name the folder"):
        build_dataset(DATASETS.parse({"name": "user_files"}), 17)
    with pytest.raises(InputError, match="deploy prepare writes it"):
        read(tmp_path / "nowhere")
    (folder / "users" / "user-0.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be read"):
        read(folder).user(0)
    (folder / "facts.json").write_text('{"classes": 0}')
    with pytest.raises(InputError, match=r"facts\.json: classes"):
        read(folder)
