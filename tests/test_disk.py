"""File systems differ: what they cannot do is done otherwise, or told; nothing is half there."""

import errno
import fcntl
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from in_process import SMALL, Silent, drive_on, small_config, train_small

from fedpriv import disk, experiment
from fedpriv.errors import ClientFault, InputError
from fedpriv.privacy import Ledger
from fedpriv.reporting.picture import write_picture
from fedpriv.reporting.report import write_report
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.training.checkpoint import write_tensors
from fedpriv.training.memory_store import Journal, Memories, MemoryFormat, MemoryStore

NOT_THERE = [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK]


def raising(number):
    def call(*arguments):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=NOT_THERE, ids=errno.errorcode.get)
def without_flock(request, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(request.param))


def test_without_flock_two_processes_still_cannot_run_one_directory(without_flock, tmp_path):
    directory = RunDirectory.create(small_config(run_dir=str(tmp_path / "run")), "cpu")
    with directory.lock():
        # A process of its own, as open file descriptions do: no fork shares ours.
        child = os.fork()
        if child == 0:
            try:
                RunDirectory(tmp_path / "run").lock()
            except InputError as error:
                os._exit(3 if "another process" in str(error) else 4)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        with pytest.raises(InputError, match="another process"):
            directory.lock()
    directory.lock().close()


def test_without_any_locks_a_run_is_refused_before_its_folder_is_there(
    without_flock, tmp_path, monkeypatch
):
    monkeypatch.setattr(fcntl, "fcntl", raising(errno.ENOSYS))
    with pytest.raises(InputError, match=r"^run_dir: .* file system without locks"):
        RunDirectory.create(small_config(run_dir=str(tmp_path / "run")), "cpu")
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_lock_that_says_neither_is_no_other_process(tmp_path, monkeypatch):
    directory = RunDirectory.create(small_config(run_dir=str(tmp_path / "run")), "cpu")
    monkeypatch.setattr(fcntl, "flock", raising(errno.EIO))
    with pytest.raises(InputError, match="without locks"):
        directory.lock()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synchronised_is_no_error_and_a_file_is(
    number, tmp_path, monkeypatch
):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    directory, _ = train_small(tmp_path / "run", rounds=2, privacy__error_feedback="user")
    assert len(Ledger.open(directory.ledger)) == 2
    monkeypatch.setattr(os, "fsync", raising(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        disk.fsync(directory.ledger)


def test_an_error_of_a_folder_that_means_lost_data_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", raising(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        disk.fsync(tmp_path)


# ------------------------------------------------------------------ full disks


@pytest.fixture
def full(monkeypatch):
    """Every file takes what it is given, and fails when that should reach the disk."""
    return lambda: monkeypatch.setattr(os, "fsync", raising(errno.EDQUOT))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


WRITERS = {
    "a report": lambda run: write_report([run]),
    "a picture": write_picture,
    "metrics": lambda run: RunDirectory(run).keep_metrics(1),
    "a checkpoint": lambda run: write_tensors(
        run / "checkpoints" / "round-000009.safetensors", {"x": torch.ones(3)}, {}
    ),
    "the store's state": lambda run: MemoryStore(run / "memory", STORED)._write_state(),
    "a journal": lambda run: journal(run / "memory"),
}
STORED = MemoryFormat(population=3, parameters=2, dtype="float32", fingerprint="x")


def journal(folder: Path) -> None:
    with Memories(folder, 0).round(Journal(1, 0, 0, 0)) as memories:
        memories.write([1], torch.ones(1, 2))


def test_a_full_disk_leaves_what_was_there_and_no_part_of_anything_else(full, tmp_path):
    train_small(tmp_path / "run", rounds=2)
    (tmp_path / "run" / "report.html").write_text("the one before")
    MemoryStore(tmp_path / "run" / "memory", STORED)
    before = files(tmp_path)
    full()
    for writer, write in WRITERS.items():
        with pytest.raises(OSError) as caught:
            write(tmp_path / "run")
        assert disk.has_no_room(caught.value), writer
        assert files(tmp_path) == before, writer


def test_a_run_that_a_full_disk_stopped_goes_on_to_the_same_end(tmp_path, monkeypatch):
    _, whole = train_small(tmp_path / "whole")
    real, calls = os.fsync, []

    def fills_up(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fills_up)
    with pytest.raises(OSError):
        train_small(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", real)
    assert not list((tmp_path / "run").rglob("*.partial"))
    directory, prepared = experiment.reopen(tmp_path / "run")
    assert 0 < prepared.finished_rounds < SMALL["rounds"]
    experiment.train(prepared, directory, Silent(), drive_on(None))
    assert prepared.server.parameters().equal(whole.server.parameters())


def test_a_run_that_finds_no_room_at_its_beginning_leaves_no_folder(full, tmp_path):
    full()
    with pytest.raises(InputError, match=r"^run_dir: cannot write"):
        RunDirectory.create(small_config(run_dir=str(tmp_path / "new")), "cpu")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match=r"^run_dir: cannot write"):
        RunDirectory.create(small_config(run_dir=str(tmp_path / "mine")), "cpu")
    assert not list((tmp_path / "mine").iterdir())


def test_torn_files_of_a_killed_process_are_removed_by_the_next(tmp_path):
    directory = RunDirectory.create(small_config(run_dir=str(tmp_path / "run")), "cpu")
    torn = [directory.path / "report.html.partial", directory.checkpoints / "round-000002.partial"]
    for path in torn:
        path.write_bytes(b"half")
    directory.lock().close()
    assert not any(path.exists() for path in torn)


def test_workers_errors_are_known_by_their_text():
    worker = "<class 'OSError'>:<'[Errno 28] No space left on device'>"
    assert disk.has_no_room(ClientFault(worker))
    assert not disk.has_no_room(ClientFault("<class 'KeyError'>:<'x'>"))
    assert not disk.has_no_room(OSError(errno.EIO, "broken"))


def test_names_that_are_not_utf_8_are_written(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    disk.write_whole(tmp_path / "x", f"run {name}")
    assert BytesIO((tmp_path / "x").read_bytes()).read() == b"run caf\\udce9"


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as threads:
        heard = threads.submit(pipe.read_bytes)
        disk.write_whole(pipe, "said")
        assert heard.result(timeout=30) == b"said"
    assert pipe.is_fifo()
    target.write_text("old")
    link.symlink_to(target)
    disk.write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    with pytest.raises(IsADirectoryError):
        disk.write_whole(tmp_path, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]
