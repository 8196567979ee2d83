"""Arrays on their way: they lie apart, for their owner alone, in files of one process at a time."""

import os
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from fedpriv.federation.in_transit import folder_in_transit, free, get, put, remove_others

DIE_WITH_A_SUM = """
import os, signal
from fedpriv.federation.in_transit import folder_in_transit
with folder_in_transit() as folder:
    (folder / "sum.npy").write_text("exact")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_is_its_owners_alone_and_goes(temporary):
    with folder_in_transit() as folder:
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        (folder / "sum.npy").write_text("exact")
    assert not list(temporary.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(temporary):
    (temporary / "fedpriv-in-transit-being-made").mkdir()
    (temporary / "somebody-else").mkdir()
    with folder_in_transit() as in_use:
        (in_use / "sum.npy").write_text("exact")
        environment = os.environ | {"TMPDIR": str(temporary)}
        died = subprocess.run([sys.executable, "-c", DIE_WITH_A_SUM], env=environment)
        assert died.returncode < 0
        assert len(list(temporary.rglob("sum.npy"))) == 2
        with folder_in_transit() as folder:
            assert list(temporary.rglob("sum.npy")) == [in_use / "sum.npy"]
            assert not list(folder.iterdir())
        assert (in_use / "sum.npy").exists()
    assert sorted(path.name for path in temporary.iterdir()) == [
        "fedpriv-in-transit-being-made",
        "somebody-else",
    ]


def test_a_file_is_used_again_once_it_was_freed_and_for_arrays_of_its_kind(tmp_path):
    arrays = [np.arange(5.0), np.arange(5.0) + 1, np.arange(6.0), np.arange(5, dtype=np.int16)]
    files = [put(array, tmp_path) for array in arrays]
    assert len(set(files)) == 4
    inodes = {path.stat().st_ino for path in files}
    for array, path in zip(arrays, files, strict=True):
        np.testing.assert_array_equal(get(path), array)
        free(path)
        assert not path.exists()
    again = [put(-array, tmp_path) for array in arrays]
    assert {path.stat().st_ino for path in again} == inodes
    assert not set(again) & set(files)
    for array, path in zip(arrays, again, strict=True):
        assert get(path).dtype == array.dtype
        np.testing.assert_array_equal(get(path), -array)
    put(arrays[0], tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_writing_into_what_was_read_changes_no_file(tmp_path):
    path = put(np.arange(3.0), tmp_path)
    get(path)[:] = 7
    assert get(path).tolist() == [0, 1, 2]


def test_what_somebody_may_still_write_is_removed_and_not_used_again(tmp_path):
    slow, done = put(np.zeros(4), tmp_path), put(np.ones(4), tmp_path)
    writing = np.load(slow, mmap_mode="r+")
    free(done)
    remove_others(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"free-{done.name}"]
    first, second = put(np.full(4, 2.0), tmp_path), put(np.full(4, 3.0), tmp_path)
    writing[:] = np.nan
    assert (get(first).tolist(), get(second).tolist()) == ([2] * 4, [3] * 4)


def test_processes_never_hold_one_file_at_the_same_time(tmp_path):
    for path in [put(np.zeros(1_000), tmp_path) for _ in range(3)]:
        free(path)
    with ProcessPoolExecutor(4, get_context("spawn")) as processes:
        kept = processes.map(_write_and_look, [tmp_path] * 4, range(4))
        assert list(kept) == [True] * 4


def _write_and_look(folder: Path, number: int) -> bool:
    """Write this process's number again and again; say whether nobody else's ever came in."""
    for _ in range(200):
        path = put(np.full(1_000, float(number)), folder)
        if not (get(path) == number).all():
            return False
        free(path)
    return True
