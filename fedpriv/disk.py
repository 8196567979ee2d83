"""Files that survive a crash or a full disk whole, and locks, on whatever file system there is."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import IO, Any

from fedpriv.errors import ClientFault

# What a file system answers to a call that it does not know.
_NOT_THERE = {
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOLCK,
    errno.ENOTTY,
}
# What an open file description's lock answers where another has the file.
_TAKEN = {errno.EAGAIN, errno.EACCES}
# Room can be made, and quotas raised; a disk with errors may be mounted anew.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
# What a path answers that this process cannot follow, or may not.
_BARRED = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.ESTALE,
}


class NoLocksError(OSError):
    """The file system has no locks."""


def fsync(path: Path) -> None:
    """Return when a file's contents, or a folder's entries, are on the disk.

    Some file systems cannot be asked that of a folder; theirs are on the disk when they will be.
    """
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if folder:  # which may be written to by those who cannot read it
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in {*_NOT_THERE, errno.EBADF, errno.EISDIR}:
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, contents: str | bytes) -> None:
    """Write a file durably, whole or not at all; nothing else is left behind either way.

    A link stays a link, to a new file. A device or a pipe stays what it is and is written to.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    data = contents if isinstance(contents, bytes) else contents.encode(errors="backslashreplace")
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            file.write(data)
        return
    path = path.resolve()
    scratch = path.with_name(path.name + ".partial")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def lock(file: IO[Any]) -> None:
    """Take an open file for whoever holds it, until it is closed; it must be open for writing.

    Where the file system has no `flock` (Lustre without that option, some FUSE and SMB mounts) the
    lock is one of the open file description, which Linux has too. It does the same.

    Raises:
        BlockingIOError: somebody else has it.
        NoLocksError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        _lock_description(file, error)


def _lock_description(file: IO[Any], cause: OSError) -> None:
    none = NoLocksError(cause.errno, "this file system has no locks")
    if not hasattr(fcntl, "F_OFD_SETLK"):
        raise none from None
    # `struct flock`: type, whence, start, length (0: all of it), and a process, which must be 0.
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, whole)
    except OSError as error:
        if error.errno in _TAKEN:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        if error.errno in _NOT_THERE:
            raise none from None
        raise


def hold_room(path: Path, size: int) -> None:
    """Write a file that holds so many bytes of room on its disk until it is removed.

    Raises:
        OSError: there is no room, and so no file.
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            # Where a file system cannot, what is written later finds room or does not.
            if error.errno not in _NOT_THERE:
                path.unlink()
                raise OSError(*error.args, str(path.parent)) from None


def has_no_room(error: BaseException) -> bool:
    """Say whether something could not be written because its disk takes no more, for now.

    It may have been a worker that wrote: its error comes as text.
    """
    if isinstance(error, ClientFault):
        return any(os.strerror(number) in str(error) for number in _NO_ROOM)
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def barred(error: OSError) -> str | None:
    """Say which path this process cannot follow, or may not; None where that is not the fault.

    A path may be asked about in many places before anything is read there.
    """
    if error.errno not in _BARRED or error.filename is None:
        return None
    return (
        f"{os.fsdecode(error.filename)}: cannot be reached ({error.strerror}): a fault of the "
        "path, its disk or its permissions; mend it and start again"
    )


def no_room(error: Exception) -> str:
    """Say that a disk is full."""
    reason = error.strerror if isinstance(error, OSError) else "a worker could not write"
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return f"a disk is full ({where}{reason}); nothing that is finished is lost: make room"
