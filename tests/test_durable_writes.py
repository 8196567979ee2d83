"""What must outlive a loss of power is on the disk before anything rests on it.

A test cannot cut the power; it looks at the order in which the system is asked to sync, rename and
remove.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fedpriv.privacy import (
    CentralMechanism,
    GaussianMechanism,
    GlobalClipping,
    Header,
    Ledger,
    PoissonSampling,
)
from fedpriv.privacy.ledger import Release
from fedpriv.training.checkpoint import Checkpoint, save_checkpoint
from fedpriv.training.memory_store import Journal, Memories, MemoryFormat, MemoryStore

HEADER = Header("abc", 1000, 1e-5, "add_or_remove_one")
FORMAT = MemoryFormat(population=9, parameters=3, dtype="float32", fingerprint="a run")


@dataclass(frozen=True)
class Done:
    """Something that was asked of the system, and the size that the file had then."""

    what: str
    path: Path
    size: int = 0


class Disk:
    """Writes down what is asked of the system while it is done."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[Done] = []
        for name in ("rename", "replace", "unlink"):
            self._watch(patch, name)
        sync, write = os.fsync, os.pwrite

        def fsync(file: int) -> None:
            sync(file)
            self._note("sync", self._path(file))

        def pwrite(file: int, *of_what) -> int:
            self._note("write", self._path(file))
            return write(file, *of_what)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "pwrite", pwrite)

    def _watch(self, patch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(os, name)

        def watched(path, *others, **keywords):
            result = original(path, *others, **keywords)
            # Of a file that gets a name, the name that it gets.
            self._note("name" if others else "remove", Path(others[0] if others else path))
            if others:
                assert Path(path) != Path(others[0])  # it was written under another one
            return result

        patch.setattr(os, name, watched)

    @staticmethod
    def _path(file: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{file}"))

    def _note(self, what: str, path: Path) -> None:
        size = path.stat().st_size if path.is_file() else 0
        self.done.append(Done(what, path, size))

    def order(self, *steps: tuple[str, str], since: int = 0) -> list[Done]:
        """Find each (what, end of the file's name) after the one before it, or fail."""
        found, rest = [], iter(self.done[since:])
        for what, name in steps:
            for done in rest:
                if done.what == what and done.path.name.endswith(name):
                    found.append(done)
                    break
            else:
                raise AssertionError(f"no {what} of {name} in its place: {self.done}")
        return found


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def release(round_: int) -> Release:
    mechanism = GaussianMechanism(1.0, GlobalClipping(0.5))
    return Release.of(round_, 0, CentralMechanism(PoissonSampling(1000, 50.0), mechanism), "d" * 64)


def test_a_new_ledger_is_found_again(tmp_path, disk):
    """A file whose folder is not on the disk may be gone, and what it charged with it."""
    Ledger.create(tmp_path / "ledger.jsonl", HEADER)
    disk.order(("sync", "ledger.jsonl"), ("sync", tmp_path.name))


def test_a_torn_line_is_gone_before_another_is_written(tmp_path, disk):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.create(path, HEADER)
    ledger.append(release(1))
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"kind": "release", "rou')
    disk.done.clear()
    Ledger.open(path).append(release(2))
    cut, appended = disk.order(("sync", "ledger.jsonl"), ("sync", "ledger.jsonl"))
    assert cut.size == whole
    assert appended.size == path.stat().st_size > whole


def test_a_checkpoint_is_whole_before_it_has_its_name_and_before_older_ones_go(tmp_path, disk):
    for round_ in (1, 2):
        numbers = {"numbers": torch.arange(1000.0)}
        save_checkpoint(tmp_path, Checkpoint(round_, "abc", numbers), keep=1)
    written, *_ = disk.order(
        ("sync", "round-000002.partial"),
        ("name", "round-000002.safetensors"),
        ("sync", tmp_path.name),
        ("remove", "round-000001.safetensors"),
    )
    assert written.size == (tmp_path / "round-000002.safetensors").stat().st_size


def write(store: MemoryStore, users: list[int]) -> Journal:
    journal = Journal(store.round + 1, 0, 0, store.session)
    with Memories(store.folder, 0).round(journal) as memories:
        memories.write(users, torch.ones(len(users), 3))
    return journal


def test_a_journal_is_whole_before_it_has_its_name(tmp_path, disk):
    store = MemoryStore(tmp_path / "memory", FORMAT)
    disk.done.clear()
    journal = write(store, [2, 5])
    written, *_ = disk.order(("sync", ".partial"), ("name", journal.file), ("sync", "memory"))
    assert written.size == (store.folder / journal.file).stat().st_size > 0


def test_memories_are_on_the_disk_before_the_store_says_so_and_journals_go_last(tmp_path, disk):
    store = MemoryStore(tmp_path / "memory", FORMAT)
    journal = write(store, [2, 5])
    disk.done.clear()
    store.commit(1, [journal])
    for name in ("vectors.bin", "index.bin"):
        written = [i for i, d in enumerate(disk.done) if (d.what, d.path.name) == ("write", name)]
        disk.order(
            ("sync", name),
            ("sync", "state.json.partial"),
            ("name", "state.json"),
            ("sync", "memory"),
            ("remove", journal.file),
            since=written[-1],
        )
