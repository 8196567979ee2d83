"""Arrays on their way between the processes of one machine: files that are used again and again.

A file that is new needs memory that is new, which now and then takes ten times as long to have as
it takes to fill. So whoever has read a file for the last time frees it, and whoever writes an array
takes a free one. A file is in one process's hands at a time: taking and freeing rename it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from fedpriv.disk import NoLocksError, lock

_PREFIX = "fedpriv-in-transit-"
_FREE = "free-"


@contextmanager
def folder_in_transit() -> Iterator[Path]:
    """Make a folder for parameters and sums that are on their way, and remove it again.

    The sums are exact, and stay until they are written over: so it is its owner's alone, and does
    not lie in the run directory, which others may be shown. Folders that killed processes have left
    are removed too: nobody holds their locks any more.
    """
    for left in Path(gettempdir()).glob(f"{_PREFIX}*"):
        # Another's folder, one in use, or one that is just being made.
        with suppress(OSError), (left / "lock").open("r+") as file:
            lock(file)
            shutil.rmtree(left)
    with TemporaryDirectory(prefix=_PREFIX) as name:
        folder = Path(name) / "arrays"
        folder.mkdir()
        made = Path(name) / "lock-in-the-making"
        with made.open("w") as file:
            with suppress(NoLocksError):  # without one nobody removes it but we
                lock(file)
                made.rename(Path(name) / "lock")  # nobody ever finds it unlocked
            yield folder


def put(array: NDArray[Any], folder: Path) -> Path:
    """Write a flat array to a file of `folder` that is nobody's, and return the file.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    alike = f"{array.dtype}-{array.size}-"
    path = folder / f"{alike}{uuid4()}.npy"
    for free_one in folder.glob(f"{_FREE}{alike}*"):
        with suppress(FileNotFoundError):  # another was there before us
            free_one.rename(path)
            np.load(path, mmap_mode="r+")[:] = array
            return path
    try:
        np.save(path, array)
    except OSError as error:
        path.unlink(missing_ok=True)
        # NumPy says how much it could not write, but not why.
        number = error.errno or errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from None
    return path


def get(path: Path) -> NDArray[Any]:
    """Return the array of a file, which must not be freed before it has been read."""
    array: NDArray[Any] = np.load(path, mmap_mode="c")
    return array


def free(path: Path) -> None:
    """Let others take a file, which nobody may read or write any more."""
    path.rename(path.with_name(f"{_FREE}{path.name}"))


def remove_others(folder: Path) -> None:
    """Remove the files that are not free: of those who hold them nobody knows what they do."""
    for path in folder.iterdir():
        if not path.name.startswith(_FREE):
            path.unlink()
