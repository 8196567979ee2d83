import errno

import pytest
import torch
from safetensors import SafetensorError

from fedpriv.errors import InputError
from fedpriv.training.checkpoint import (
    Checkpoint,
    checkpoint_files,
    digest_of,
    load_checkpoint,
    save_checkpoint,
    write_tensors,
)


def checkpoint(round_: int) -> Checkpoint:
    return Checkpoint(round_, "f" * 64, {"a": torch.arange(5.0), "b": torch.tensor([round_])})


def test_round_trip_and_retention(tmp_path):
    for round_ in range(1, 6):
        save_checkpoint(tmp_path, checkpoint(round_), keep=2)
    files = checkpoint_files(tmp_path)
    assert [file.name for file in files] == ["round-000004.safetensors", "round-000005.safetensors"]
    loaded = load_checkpoint(files[-1], "f" * 64)
    assert loaded.round == 5
    assert loaded.tensors["a"].equal(torch.arange(5.0))
    assert loaded.tensors["b"].item() == 5


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    (tmp_path / "round-000002.partial").write_bytes(b"torn")
    assert len(checkpoint_files(tmp_path)) == 1


@pytest.mark.parametrize("damage", [b"", b"hello", None])
def test_a_corrupt_checkpoint_is_refused_in_one_line(tmp_path, damage):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=2)
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    with pytest.raises(InputError, match="corrupt checkpoint") as caught:
        load_checkpoint(path, "f" * 64)
    assert "\n" not in str(caught.value)


def test_the_checkpoint_of_another_config_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=2)
    with pytest.raises(InputError, match="another configuration"):
        load_checkpoint(path, "0" * 64)


def test_flipped_numbers_are_found(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=2)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="numbers have changed"):
        load_checkpoint(path, "f" * 64)


def test_a_digest_tells_names_and_numbers_apart():
    tensors = {"a": torch.arange(3.0), "b": torch.arange(2)}
    others = [
        {"a": torch.arange(3.0), "c": torch.arange(2)},
        {"b": torch.arange(3.0), "a": torch.arange(2)},
        {"a": torch.arange(3.0), "b": torch.tensor([0, 2])},
        {"a": torch.arange(3.0)},
    ]
    digests = {digest_of(each) for each in [tensors, *others]}
    assert len(digests) == 5
    assert digest_of(dict(reversed(tensors.items()))) == digest_of(tensors)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_last_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {})
    before = path.read_bytes()

    def full(tensors, scratch, metadata):
        scratch.write_bytes(b"torn")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fedpriv.training.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_tensors(path, {"a": torch.zeros(3)}, {})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
