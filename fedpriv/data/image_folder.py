"""A folder of image files: `user/class/file`, or any other names that a pattern reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fedpriv.data.classes import Classes, class_names, encoded, target_of
from fedpriv.data.content import Content, Files
from fedpriv.data.federated import Examples
from fedpriv.data.files import visible
from fedpriv.data.images import SUFFIXES, ImageForm
from fedpriv.data.partition import Indices
from fedpriv.data.parts import misread, named_path, nothing_held_out, require_folder
from fedpriv.data.prediction import of_a_node
from fedpriv.data.records import (
    NOBODY,
    FederatedRecords,
    OwnFolderOptions,
    RecordSource,
    Split,
    federate_records,
    stacked,
)
from fedpriv.errors import InputError

# Images that are tried where nothing else can be said of a folder.
_TRIED = 20


class ImageFolderOptions(OwnFolderOptions):
    """Where images lie, and what their paths say."""

    name: str = Field(
        default="image_folder", description="image_folder: image files, in folders by user or not"
    )
    pattern: str | None = Field(
        default=None,
        description="regular expression of a whole path below data.path, with /, which has a group "
        "(?P<user>...), and (?P<class>...) unless the file's folder is the class; "
        "null: user/class/file",
    )
    classes: Classes = None
    image: ImageForm = Field(default=ImageForm(), description="what images become")

    @field_validator("pattern")
    @classmethod
    def _names_a_user(cls, pattern: str | None) -> str | None:
        return checked_pattern(pattern)

    def decides_users(self) -> Mapping[str, Any]:
        """Return, by key, what decides who a user is: see `DataOptions`."""
        return of_a_node(self, {"pattern": None})


def checked_pattern(pattern: str | None) -> str | None:
    """Return a pattern of paths.

    Raises:
        ValueError: it is no regular expression, or has no group `user`.
    """
    try:
        groups = re.compile(pattern or "(?P<user>)").groupindex
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    if "user" not in groups:
        raise ValueError("it needs a group for the user, such as (?P<user>[^/]+)/.*")
    return pattern


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files and the class of each: `Records`."""

    folder: Path
    paths: Sequence[str]
    labels: Sequence[int]
    named: Sequence[str]
    names: Sequence[str]
    form: ImageForm

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Decode one file."""
        path = self.folder / self.paths[row]
        target = target_of(int(self.labels[row]), path, self.named[row], self.names)
        return self.form.read(path), target

    def pack(self, read: Sequence[Any]) -> Examples:
        """Lay images side by side."""
        return stacked(read, self.form.shape, torch.zeros((), dtype=torch.int64))

    def tell(self, content: Content, rows: Indices, files: Files) -> None:
        """Add the files' names, classes and bytes."""
        found = files.digests([self.folder / self.paths[row] for row in rows])
        for row, told in zip(rows, found, strict=True):
            content.add(self.named[row].encode("utf-8", "surrogateescape"))
            content.add(told)


def build_image_folder(options: ImageFolderOptions, seed: int) -> FederatedRecords:
    """Make users of the image files below `data.path`; they are decoded when a user is trained.

    In `user/class/file` the user is the first folder and the class the last; in the held-out part
    `class/file` does as well. Files whose user or class no path says belong to nobody.
    Raises InputError for a missing folder, and for one without images.
    """
    what = f"the folder of {options.name}"
    folder = named_path(options.path, what)
    require_folder(folder, what)
    paths = [path for path in files_below(folder) if Path(path).suffix.lower() in SUFFIXES]
    if not paths:
        raise InputError(
            f"data.path: {folder} has no images; it should hold "
            f"{'files that data.pattern reads' if options.pattern else 'user/class/file'}"
        )
    inside = f"{options.held_out}/" if options.held_out else None
    public = [inside is not None and path.startswith(inside) for path in paths]
    said = [
        _said(path.removeprefix(inside) if inside and held else path, options.pattern, held)
        for path, held in zip(paths, public, strict=True)
    ]
    owners, named = [owner for owner, _ in said], [label for _, label in said]
    if options.pattern and not any(o for o, held in zip(owners, public, strict=True) if not held):
        raise InputError(
            f"data.pattern: {options.pattern} reads none of the {len(paths)} paths below {folder}, "
            f"such as {paths[0]}"
        )
    split = Split.of(owners, options, public if inside else None)
    absent = nothing_held_out(folder, options.held_out, any(public), "images")
    if not options.pattern:
        every = zip(public, paths, owners, named, strict=True)
        _require_layout(folder, options, [said for held, *said in every if not held])
    if options.classes is None and not absent and not len(split.held_out):
        _require_one_decodes(folder, options.image, paths[:_TRIED])
    names = class_names(options.classes, (named[row] for row in split.held_out), absent)
    labels = encoded(named, names)
    source = RecordSource(
        title=f"image_folder ({folder.resolve().name})",
        records=ImageFiles(folder, paths, labels.tolist(), named, names, options.image),
        split=split,
        classes=len(names),
        input_shape=options.image.shape,
        example="image",
        labels=labels,
        misread=absent
        or misread(
            folder,
            options,
            # An image that lies in no folder is in no part.
            (each for each in split.owned(paths, public) if "/" in each[0]),
        ),
    )
    return federate_records(source, options, seed)


def _require_layout(
    folder: Path, options: ImageFolderOptions, own: Sequence[Sequence[str]]
) -> None:
    """Check that paths of users' images, with owner and class, say these where they are asked.

    Raises:
        InputError: none of them does.
    """
    whose = options.partition.kind != "natural" or any(owner for _, owner, _ in own)
    classes = any(named for _, _, named in own)
    if not own or (whose and classes):
        return
    unsaid = ["whose it is"] * (not whose) + ["its class"] * (not classes)
    raise InputError(
        f"data.path: {folder}: no path says {' or '.join(unsaid)}, such as {own[0][0]}; lay images "
        "as user/class/file, or write a data.pattern that reads your paths"
        + "; partition: {kind: iid} makes users up"
        * classes
    )


def _require_one_decodes(folder: Path, form: ImageForm, paths: Sequence[str]) -> None:
    """Check that not all images are broken, before anything is asked about their classes.

    Raises:
        InputError: they are, with the reason of the first.
    """
    reason = ""
    for path in paths:
        try:
            form.read(folder / path)
        except InputError as error:
            reason = reason or str(error)
        else:
            return
    raise InputError(f"data.path: none of the images can be used: {reason}")


def files_below(folder: Path) -> list[str]:
    """List the files below a folder, by their paths from there, sorted; hidden ones are not data.

    A folder that holds itself, by a link, is gone through once.
    """

    def walk(at: Path, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        status = os.stat(at)
        if (this := (status.st_dev, status.st_ino)) in above:
            return
        for entry in visible(at):
            if entry.is_dir():
                yield from walk(Path(entry.path), above | {this})
            elif entry.is_file():
                yield os.path.relpath(entry.path, folder).replace(os.sep, "/")

    return sorted(walk(folder, frozenset()))


def _said(path: str, pattern: str | None, public: bool) -> tuple[str, str]:
    """Return whose an image is and its class, as its path says; of nobody where it does not."""
    parts = path.split("/")
    folder = parts[-2] if len(parts) > 1 else ""
    if pattern is None:
        return (parts[0] if len(parts) > 2 else NOBODY), folder
    if (found := re.fullmatch(pattern, path)) is None:
        return NOBODY, folder if public else ""
    groups = found.groupdict()
    return groups["user"] or NOBODY, groups.get("class") or folder
