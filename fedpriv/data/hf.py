"""A data set of Hugging Face's `datasets`: a folder that save_to_disk wrote, or an object."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedpriv.data.classes import class_names, encoded, target_of
from fedpriv.data.content import Content, Files
from fedpriv.data.federated import Examples
from fedpriv.data.images import decoded
from fedpriv.data.partition import Indices
from fedpriv.data.parts import Inside, named_path, require_folder
from fedpriv.data.prediction import PredictOptions, first_shape, of_a_node
from fedpriv.data.records import (
    FederatedRecords,
    OwnOptions,
    RecordSource,
    Split,
    federate_records,
    needed,
    require_column,
    require_others,
    scaled,
    stacked,
)
from fedpriv.data.tables import as_numbers, as_text
from fedpriv.errors import InputError
from fedpriv.sections import NO_BEARING, KeptPath

# What is larger is told apart by its files, of which not everything is read.
_MOST_BYTES = 5 * 2**30


class ColumnsOptions(PredictOptions):
    """Which parts and columns of a `datasets` data set are what."""

    path: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None, description="folder that save_to_disk wrote"
    )
    split: str = Field(default="train", description="part with users' rows, where there are parts")
    held_out: Inside | None = Field(
        default=None,
        description="part to measure on, which is public, such as test; null: one user in eight, "
        "by a hash of the id, with all that they have",
    )
    input: str | tuple[str, ...] = Field(
        default="image",
        description="column to predict from: images, numbers or arrays of them; or several, of "
        "numbers",
    )
    target: str = Field(default="label", description="column to predict")
    shape: tuple[int, ...] | None = Field(
        default=None,
        description="shape of one input; null: that of images, or of the first held-out record",
    )


class HFOptions(ColumnsOptions, OwnOptions):
    """Whose the rows are, by a column."""

    name: str = Field(default="hf", description="hf: a folder of Hugging Face's datasets")
    user: str = Field(default="user", description="column of whose a row is")

    def decides_users(self) -> Mapping[str, Any]:
        """Return, by key, what decides who a user is: see `DataOptions`."""
        return of_a_node(self, {"user": "user", "split": "train"})


@dataclass(frozen=True, eq=False)
class HFRows:
    """Rows of a `datasets` data set, and of its held-out part after them: `Records`.

    `labels` are classes, int64 `[n]`, or numbers, float32 `[n, 1]`; `shape` is None while it is
    still looked for.
    """

    parts: Sequence[Any]
    inputs: Sequence[str]
    image: bool
    labels: NDArray[Any]
    names: Sequence[str]
    options: ColumnsOptions
    shape: tuple[int, ...] | None = None

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return one row's input and target."""
        where = f"row {row + 1}"
        if self.labels.ndim == 1:
            target = target_of(int(self.labels[row]), where, "its target", self.names)
        elif not np.isfinite(self.labels[row]).all():
            raise InputError(f"{where}: the target is no number")
        else:
            target = torch.from_numpy(self.labels[row])
        found = decoded(where, lambda: self._input(row))
        if self.shape is not None and tuple(found.shape) != self.shape:
            raise InputError(f"{where}: its shape is {tuple(found.shape)}, not {self.shape}")
        return found, target

    def _input(self, row: int) -> Tensor:
        from PIL import Image

        part, place = self._place(row)
        cells = part[place]
        if self.image:
            cell = cells[self.inputs[0]]
            file = BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
            with Image.open(file) as image:
                return self.options.image.of(image)
        values = [np.asarray(cells[name], dtype=np.float32) for name in self.inputs]
        whole = values[0] if len(values) == 1 else np.concatenate([v.reshape(-1) for v in values])
        whole = whole.reshape(1) if whole.ndim == 0 else whole
        if not np.isfinite(whole).all():
            raise ValueError("an input is no number")
        return scaled(torch.from_numpy(whole.copy()), self.options.mean, self.options.std)

    def _place(self, row: int) -> tuple[Any, int]:
        first = len(self.parts[0])
        return (self.parts[0], row) if row < first else (self.parts[1], row - first)

    def pack(self, read: Sequence[Any]) -> Examples:
        """Lay rows side by side."""
        whole = self.labels.ndim == 1
        like = torch.zeros((), dtype=torch.int64) if whole else torch.zeros(1)
        return stacked(read, self.shape or (0,), like)

    def tell(self, content: Content, rows: Indices, files: Files) -> None:
        """Add what rows hold; of more than some gigabytes, which rows of which files they are."""
        content.add(self.labels[rows].tobytes())
        if self._on_disk and self.parts[0].data.nbytes > _MOST_BYTES:
            content.add(self._files)
            content.add(rows.tobytes())
            return
        chosen = self.parts[0].with_format("arrow")[rows]
        for column in chosen.columns:
            content.add(repr(column.to_pylist()).encode("utf-8", "surrogatepass"))
        if self.image:
            cells = chosen.column(self.inputs[0]).to_pylist()
            for told in files.digests([c["path"] for c in cells if c and c["bytes"] is None]):
                content.add(told)

    @property
    def _on_disk(self) -> bool:
        return bool(self.parts[0].cache_files)

    @cached_property
    def _files(self) -> bytes:
        content = Content("arrow")
        paths = [Path(each["filename"]) for each in self.parts[0].cache_files]
        with Files(len(paths)) as files:
            for told in files.digests(paths):
                content.add(told)
        return content.hexdigest().encode()


def build_hf(options: HFOptions, seed: int) -> FederatedRecords:
    """Make users of the rows of a folder that `save_to_disk` wrote; a row is read with its user.

    Raises InputError for a folder that is none, and for a part or column that is not there.
    """
    users, held_out = load_parts(options)
    return _federated(users, held_out, options, seed)


def hf_users(
    dataset: Any, held_out: Any = None, *, seed: int = 0, **settings: Any
) -> FederatedRecords:
    """Make users of the rows of a `datasets.Dataset`, to be handed over as a run's `data`.

    Args:
        dataset: the users' rows.
        held_out: public rows to measure on; None: one user in eight is held out.
        seed: draws what `settings` leave to chance.
        settings: options of the data set `hf`, such as `user="writer"`.

    Raises:
        InputError: a column is not there, or does not fit.
    """
    return _federated(dataset, held_out, HFOptions(**settings), seed)


def load_parts(options: ColumnsOptions) -> tuple[Any, Any]:
    """Return users' rows and held-out ones, which are None where no part is named.

    Raises:
        InputError: the folder is none of `datasets`, or has no such part.
    """
    datasets = needed("datasets", f"data.name: {options.name}")
    what = f"the folder of {options.name}, which save_to_disk wrote"
    path = named_path(options.path, what)
    require_folder(path, what)
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"data.path: {path.absolute()} is no folder that save_to_disk wrote ({said})"
        ) from None
    if not isinstance(found, dict):
        if options.held_out is not None:
            raise InputError(
                f"data.held_out: {options.path} has no parts, so none is called "
                f"{options.held_out}; write null, or save a DatasetDict"
            )
        return found, None
    if options.split not in found:
        raise InputError(_no_part("data.split", options.split, list(found)))
    if options.held_out is not None and options.held_out not in found:
        raise InputError(_no_part("data.held_out", options.held_out, list(found)))
    return found[options.split], found[options.held_out] if options.held_out else None


def _no_part(key: str, name: str, there: list[str]) -> str:
    close = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(there)}"
    return f"{key}: there is no part {name}; {hint}"


def _federated(users: Any, held_out: Any, options: HFOptions, seed: int) -> FederatedRecords:
    owners = [""] * (len(users) + len(held_out or ()))
    if options.partition.kind == "natural" or options.user in users.column_names:
        require_column("data.user", options.user, users.column_names, "the data set")
        owners = column_texts(users, options.user)
        if held_out is not None:
            there = options.user in held_out.column_names
            owners += column_texts(held_out, options.user) if there else [""] * len(held_out)
    public = None if held_out is None else np.arange(len(owners)) >= len(users)
    split = Split.of(owners, options, public)
    return federate_records(source_of(users, held_out, split, options), options, seed)


def source_of(users: Any, held_out: Any, split: Split, options: ColumnsOptions) -> RecordSource:
    """Return the records of rows that are split already.

    Raises:
        InputError: a column is not there or does not fit, or nobody is held out to tell the shape.
    """
    parts = [users] if held_out is None else [users, held_out]
    inputs = [options.input] if isinstance(options.input, str) else list(options.input)
    for name, key in (*((each, "input") for each in inputs), (options.target, "target")):
        for part in parts:
            require_column(f"data.{key}", name, part.column_names, "the data set")
    image = _holds_images(users, inputs)
    require_others("data.input", inputs, [options.target])
    names, labels = _labels(parts, split, options)
    records = HFRows(
        parts=[_with_inputs(part, inputs, image) for part in parts],
        inputs=inputs,
        image=image,
        labels=labels,
        names=names,
        options=options,
    )
    shape = _shape(records, split, options)
    return RecordSource(
        title="hf (Hugging Face datasets)",
        records=replace(records, shape=shape),
        split=split,
        classes=len(names) or 1,
        input_shape=shape,
        example="image" if image else "row",
        labels=labels if names else None,
        task="classification" if names else "regression",
    )


def _holds_images(part: Any, inputs: Sequence[str]) -> bool:
    kinds = [type(part.features[name]).__name__ for name in inputs]
    if "Image" in kinds and len(kinds) > 1:
        raise InputError(f"data.input: {inputs} are images and others; name one column of images")
    for name in inputs:
        if getattr(part.features[name], "dtype", "") in ("string", "large_string"):
            raise InputError(
                f"data.input: {name} is text; write it to a table, and data.name: text"
            )
    return kinds == ["Image"]


def _with_inputs(part: Any, inputs: Sequence[str], image: bool) -> Any:
    from datasets import Image

    chosen = part.with_format(None).select_columns(list(inputs))
    # Decoded by ourselves: what a damaged one raises is one record's.
    return chosen.cast_column(inputs[0], Image(decode=False)) if image else chosen


def _labels(
    parts: Sequence[Any], split: Split, options: ColumnsOptions
) -> tuple[tuple[str, ...], NDArray[Any]]:
    cells = [cell for part in parts for cell in _cells(part, options.target)]
    if options.predict == "number":
        return (), as_numbers(cells)[:, None]
    known = getattr(parts[0].features[options.target], "names", None)
    if known is not None:
        # The column itself names its classes, in public: numbers stand for them.
        named = dict(enumerate(known))
        texts = [named.get(cell, "") for cell in cells]
        counted = isinstance(options.classes, int)
        names = class_names(known if counted else options.classes or known, ())
        if counted and options.classes != len(known):
            raise InputError(
                f"data.classes is {options.classes}, and {options.target} names {len(known)}"
            )
    else:
        texts = [as_text(cell) for cell in cells]
        names = class_names(options.classes, (texts[row] for row in split.held_out))
    return names, encoded(texts, names)


def _cells(part: Any, name: str) -> list[Any]:
    return part.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()


def column_texts(part: Any, name: str) -> list[str]:
    """Return a column as text; "" where a cell is empty."""
    return [as_text(cell) for cell in _cells(part, name)]


def _shape(records: HFRows, split: Split, options: ColumnsOptions) -> tuple[int, ...]:
    if records.image:
        if options.shape not in (None, options.image.shape):
            raise InputError(
                f"data.shape is {options.shape}, and data.image makes {options.image.shape}"
            )
        return options.image.shape
    return options.shape or first_shape(records, split.held_out)
