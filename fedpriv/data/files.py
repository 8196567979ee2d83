"""Files and folders as data sets meet them: hidden ones, text ones, and those out of reach."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fedpriv.errors import EnvironmentFault, FedprivError, InputError

BYTE_ORDER_MARK = "\ufeff"

_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")

_OF_THE_NAME = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
)
"""What may be wrong with one name. All else (no permission, a broken disk, a server that does not
answer, too many open files) is wrong with the machine."""


def is_hidden(name: str) -> bool:
    """Say whether a file or folder is never data: `._clip.flac`, `.DS_Store`, `@eaDir`."""
    return name.startswith((".", "@"))


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """List what a folder holds and is not hidden, by name; nothing for no such folder.

    Raises EnvironmentFault for a folder that cannot be read: globbing would pass it over, and
    whoever is in it would be missing without a word.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        if error.errno in _OF_THE_NAME:
            return []
        raise unreachable(folder, error) from None
    return sorted(found, key=lambda entry: entry.name)


def unreachable(path: Path | str, error: OSError) -> EnvironmentFault:
    """Return the fault of a path that the machine does not let us read."""
    return EnvironmentFault(
        f"{path}: cannot be read ({error.strerror or error}): a fault of the disk or of "
        "permissions, not of the data; mend it and start again"
    )


def failure(path: Path, error: OSError) -> FedprivError:
    """Return what an error of opening or reading a data set's file means.

    It is an InputError where one file is missing, which may be skipped, and an EnvironmentFault
    where its folder is missing or empty too: what is not unpacked or not mounted is no user's
    fault.
    """
    if error.errno not in _OF_THE_NAME:
        return unreachable(path, error)
    if error.errno == errno.ENOENT and not _holds_anything(path.parent):
        return EnvironmentFault(
            f"{path.parent}: this folder is missing or empty, and {path.name!r} should be in it: "
            "unpack the data set, or mount its disk, and start again"
        )
    return InputError(f"{path}: cannot be read ({error.strerror})")


def _holds_anything(folder: Path) -> bool:
    with suppress(OSError), os.scandir(folder) as entries:
        return next(entries, None) is not None
    return False


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Read a text file: its lines with their numbers, from 1, without what ends them.

    A line ends with `\n`, or `\r\n`, and with nothing else: a lone carriage return, or one of the
    other characters that split lines elsewhere, stays where it is. Byte-order marks are left out.
    Bytes that are no UTF-8 become surrogates, so that who reads can refuse the one line.

    Raises OSError, and InputError for a file in UTF-16.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(_UTF_16_MARKS):
                raise InputError(f"{path}: is in UTF-16; save it as UTF-8")
            text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")
            yield number, text.removeprefix(BYTE_ORDER_MARK)


def is_clean(text: str) -> bool:
    """Say whether all bytes of a line were UTF-8."""
    return text.isascii() or not any("\udc80" <= c <= "\udcff" for c in text)
