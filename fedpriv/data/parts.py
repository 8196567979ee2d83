"""Parts of a folder: which one is measured on, and what is wrong where one is not what it seems."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from fedpriv.errors import InputError

if TYPE_CHECKING:
    from fedpriv.data.options import FolderOptions
    from fedpriv.data.records import OwnFolderOptions

# What people call the part of a folder that is measured on, and the one that is trained on.
_MEASURED = ("test", "testing", "val", "valid", "validation", "eval", "heldout", "held_out")
_TRAINED = ("train", "training")


def inside(name: str) -> str:
    """Return a name within `data.path`, which is the node's own in a deployment.

    Raises:
        ValueError: it leads elsewhere.
    """
    if not name or name.startswith(("/", "\\", "~")) or ".." in name.split("/") or "\0" in name:
        raise ValueError("write a name within data.path, such as test")
    return name.rstrip("/")


Inside = Annotated[str, AfterValidator(inside)]


def misread(
    folder: Path, options: OwnFolderOptions, paths: Iterable[str], owners: Iterable[str] = ()
) -> str:
    """Return what is wrong where a part is taken for what users have; "" where nothing seems to be.

    `paths`, from `folder` on, are those of files that are users' own, or are in folders there;
    `owners` are named after such a folder.
    """
    named = {path.partition("/")[0] for path in paths} if options.held_out is None else set()
    for name in sorted(named):
        if name.partition(".")[0].lower().replace("-", "_") in _MEASURED:
            return (
                f"data.held_out: {folder} has {name}, which is what a part to measure on is "
                f"called, and here it would be users'; write held_out: {name}, or rename it"
            )
    whole = sorted(owner for owner in set(owners) if owner.lower() in _TRAINED)
    if whole and options.partition.kind == "natural":
        return (
            f"data.path: all of {folder / whole[0]} would be one user; write the folder that "
            f"holds a folder for each user, such as path: {folder / whole[0]}, or a data.pattern"
        )
    return ""


def require_there(path: Path, what: str) -> None:
    """Check that `data.path` is there, which should be `what`.

    Raises:
        InputError: it is not.
    """
    if not path.exists():
        raise absent(path, what)


def absent(path: Path, what: str) -> InputError:
    """Return what is wrong where `path`, which should be `what`, is not there."""
    return InputError(f"data.path: {path.absolute()} does not exist; name {what}")


def named_path(path: Path | None, what: str) -> Path:
    """Return `data.path`, which should be `what`, there or not.

    Raises:
        InputError: the config names none.
    """
    if path is None:
        raise InputError(f"data.path must name {what}")
    return path.expanduser()


def require_path(options: FolderOptions, home: str) -> Path:
    """Return `data.path`, the folder of a data set that is distributed at `home`.

    Raises:
        InputError: it is none.
    """
    what = f"the folder of {options.name} ({home})"
    path = named_path(options.path, what)
    require_folder(path, what)
    return path


def require_folder(path: Path, what: str) -> None:
    """Check that a folder at or below `data.path` is there, which should be `what`.

    Raises:
        InputError: it is not.
    """
    require_there(path, what)
    if not path.is_dir():
        raise InputError(f"data.path: {path.absolute()} is not a folder; name {what}")


def nothing_held_out(folder: Path, part: str | None, found: bool, what: str) -> str:
    """Return what is wrong where the part to measure on is named and has no records here.

    "" where it has, or none is named. `what` are the files that a part would have. A node of a
    deployment may well be without it, where the config names the classes.
    """
    if part is None or found:
        return ""
    whole = (folder / part).absolute()
    why = f"{whole} holds no {what}" if os.path.lexists(whole) else f"there is no {whole}"
    return (
        f"data.held_out: {why}; name what is there, within the folder of data.path, or write "
        "held_out: null to hold out one user in eight"
    )
