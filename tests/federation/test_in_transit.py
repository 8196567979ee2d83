"""Exact sums on their way: they lie apart, for their owner alone, and nothing of them stays."""

import os
import stat
import subprocess
import sys
import tempfile

import pytest

from fedpriv.federation.simulation import _folder_in_transit

DIE_WITH_A_SUM = """
import os, signal
from fedpriv.federation.simulation import _folder_in_transit
with _folder_in_transit() as folder:
    (folder / "sum.npy").write_text("exact")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_is_its_owners_alone_and_goes(temporary):
    with _folder_in_transit() as folder:
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        (folder / "sum.npy").write_text("exact")
    assert not list(temporary.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(temporary):
    (temporary / "fedpriv-in-transit-being-made").mkdir()
    (temporary / "somebody-else").mkdir()
    with _folder_in_transit() as in_use:
        (in_use / "sum.npy").write_text("exact")
        environment = os.environ | {"TMPDIR": str(temporary)}
        died = subprocess.run([sys.executable, "-c", DIE_WITH_A_SUM], env=environment)
        assert died.returncode < 0
        assert len(list(temporary.rglob("sum.npy"))) == 2
        with _folder_in_transit() as folder:
            assert list(temporary.rglob("sum.npy")) == [in_use / "sum.npy"]
            assert not list(folder.iterdir())
        assert (in_use / "sum.npy").exists()
    assert sorted(path.name for path in temporary.iterdir()) == [
        "fedpriv-in-transit-being-made",
        "somebody-else",
    ]
