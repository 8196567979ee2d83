"""Parts of a folder: which one is measured on, and what is wrong where one is not what it seems."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

if TYPE_CHECKING:
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
