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


def misread(folder: Path, options: OwnFolderOptions, owned: Iterable[tuple[str, str]]) -> str:
    """Return what is wrong where a part is taken for what users have; "" where nothing seems to be.

    `owned` are the files that are users' own, each by its path from `folder` on, with the user's
    name where the path says it, else "".
    """
    pairs = set(owned)
    parts = sorted(filter(None, (_measured_part(*pair) for pair in pairs)))
    if parts:
        since = f", since held_out is {options.held_out}" if options.held_out else ""
        return (
            f"data.held_out: {folder} has {parts[0]}, which is what a part to measure on is "
            f"called, and here it would be users'{since}; write held_out: {parts[0]}, or move it "
            f"out of {folder}, or rename it if it is a user's"
        )
    whole = sorted({owner for _, owner in pairs if owner.lower() in _TRAINED})
    if whole and options.partition.kind == "natural" and not getattr(options, "pattern", None):
        return (
            f"data.path: all of {folder / whole[0]} would be one user; write the folder that "
            f"holds a folder for each user, such as path: {folder / whole[0]}, or a data.pattern"
        )
    return ""


def _measured_part(path: str, owner: str) -> str:
    """Return the part of a path, from its start on, that is called as what is measured on is.

    That is the first name, or the one that a pattern takes for a user's. Others, such as a class
    or a text of a user, may be called anything.
    """
    names = path.split("/")
    for depth, name in enumerate(names):
        bare = name.partition(".")[0]
        is_users = depth == 0 or (owner and owner in (name, bare))
        if is_users and bare.lower().replace("-", "_") in _MEASURED:
            return "/".join(names[: depth + 1])
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
