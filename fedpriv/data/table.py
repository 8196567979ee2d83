"""A table with a row for each example: whose it is, what is to be predicted, and from what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from fedpriv.counting import numbered
from fedpriv.data.classes import class_names, encoded, target_of
from fedpriv.data.content import Content, Files
from fedpriv.data.federated import Examples
from fedpriv.data.files import is_clean
from fedpriv.data.partition import Indices
from fedpriv.data.parts import misread, nothing_held_out
from fedpriv.data.prediction import PredictOptions, of_a_node
from fedpriv.data.records import (
    FederatedRecords,
    OwnFolderOptions,
    RecordSource,
    Split,
    federate_records,
    require_column,
    require_others,
    scaled,
    stacked,
)
from fedpriv.data.tables import Table, matching, read_table
from fedpriv.errors import InputError


class TableOptions(PredictOptions, OwnFolderOptions):
    """Which columns of a table are what."""

    name: str = Field(default="table", description="table: rows of a CSV or Parquet file")
    user: str = Field(default="user", description="column of whose a row is")
    target: str | tuple[str, ...] = Field(
        default="target", description="column to predict; several, where they are numbers"
    )
    features: str | tuple[str, ...] | None = Field(
        default=None,
        description="columns of numbers to predict from, or a regular expression of their names; "
        "null: all others",
    )
    files: str | None = Field(
        default=None,
        description="column of image files to predict from, in place of numbers; their paths "
        "begin where the table lies",
    )

    @field_validator("features")
    @classmethod
    def _is_an_expression(cls, features: Any) -> Any:
        try:
            re.compile(features if isinstance(features, str) else "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return features

    def decides_users(self) -> Mapping[str, Any]:
        """Return, by key, what decides who a user is: see `DataOptions`."""
        return of_a_node(self, {"user": "user"})


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of numbers, or of paths of images, and their targets: `Records`.

    `labels` are classes, int64 `[n]`, with `shown` as the table has them, or numbers, float32
    `[n, outputs]`, of the columns `targets`. `columns` are those of `features`.
    """

    table: Table
    features: NDArray[np.float32] | None
    files: Sequence[str]
    labels: NDArray[Any]
    shown: Sequence[str]
    names: Sequence[str]
    options: TableOptions
    columns: Sequence[str]
    targets: Sequence[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.options.image.shape if self.features is None else self.features.shape[1:]

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Which rows `read` takes, whatever their class: of images, those that name a file."""
        if self.features is not None:
            usable: NDArray[np.bool_] = np.asarray(np.isfinite(self.features).all(axis=1))
        else:
            usable = np.array([_names_a_file(name) for name in self.files], bool)
        if self.labels.ndim > 1:
            usable &= np.isfinite(self.labels).all(axis=1)
        return usable

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return one row's input and target."""
        where = self.table.where(row)
        target = self._target(row, where)
        if self.features is None:
            if not _names_a_file(name := self.files[row]):
                raise InputError(f"{where}: names no file")
            return self.options.image.read(self.table.folder / name), target
        values = self.features[row]
        if not np.isfinite(values).all():
            raise InputError(f"{where}: {_first(values, self.columns)} is no number")
        return scaled(torch.from_numpy(values), self.options.mean, self.options.std), target

    def _target(self, row: int, where: str) -> Tensor:
        if self.labels.ndim == 1:
            return target_of(int(self.labels[row]), where, self.shown[row], self.names)
        values = self.labels[row]
        if not np.isfinite(values).all():
            raise InputError(f"{where}: {_first(values, self.targets)} is no number")
        return torch.from_numpy(values)

    def pack(self, read: Sequence[Any]) -> Examples:
        """Lay rows below one another."""
        whole = self.labels.ndim == 1
        like = torch.zeros((), dtype=torch.int64) if whole else torch.zeros(self.labels.shape[1])
        return stacked(read, self.shape, like)

    def note(self, parts: Sequence[Indices]) -> str:
        """Say where cells are not UTF-8, of which a user or class is not recognised; else ""."""
        named = (self.options.user, *self.targets)
        there = [name for name in named if name in self.table.frame.columns]
        cells = zip(*map(self.table.texts, there), strict=True)
        wrong = [row for row, said in enumerate(cells) if not all(map(is_clean, said))]
        if not wrong:
            return ""
        return (
            f"data.path: {numbered(len(wrong), 'row')} of {', '.join(there):.80}: not in UTF-8, "
            f"first {self.table.where(wrong[0])}: such users and classes are taken for others; "
            "save the file as UTF-8"
        )

    def tell(self, content: Content, rows: Indices, files: Files) -> None:
        """Add what rows say, and the images that they name."""
        content.add(self.labels[rows].tobytes())
        if self.features is not None:
            content.add(self.features[rows].tobytes())
            return
        named = [self.files[row] for row in rows]
        content.add(repr(named).encode("utf-8", "surrogateescape"))
        for told in files.digests([self.table.folder / name.replace("\0", "") for name in named]):
            content.add(told)


def build_table(options: TableOptions, seed: int) -> FederatedRecords:
    """Make users of the rows of a table, or of several; images are read when a user is trained.

    A row whose target or features cannot be used is a bad record of its user alone.
    Raises InputError for a missing file or column.
    """
    table = read_table(options.path, options.held_out)
    owners, targets = _owners(table, options), _target_columns(table, options)
    split = Split.of(owners, options, table.public, unread=table.unread)
    held = table.public is not None and bool(table.public.any())
    absent = nothing_held_out(table.folder, options.held_out, held, "rows of a table")
    named: tuple[str, ...] = ()
    shown: Sequence[str] = ()
    if options.predict == "class":
        shown = table.texts(targets[0])
        named = class_names(options.classes, (shown[row] for row in split.held_out), absent)
        labels: NDArray[Any] = encoded(shown, named)
    else:
        labels = table.numbers(targets)
    columns = [] if options.files is not None else _feature_columns(table, options, targets)
    features = None if options.files is not None else table.numbers(columns)
    records = Rows(
        table=table,
        features=features,
        files=() if options.files is None else table.texts(options.files),
        labels=labels,
        shown=shown,
        names=named,
        options=options,
        columns=columns,
        targets=targets,
    )
    source = RecordSource(
        title=f"table ({table.files[0][0].name})",
        records=records,
        split=split,
        classes=len(named) or len(targets),
        input_shape=records.shape,
        example="row",
        labels=labels if named else None,
        misread=absent or misread(table.folder, options, ((name, "") for name in table.owned)),
        task="classification" if named else "regression",
        usable=records.usable,
        lazy=options.files is not None,
    )
    return federate_records(source, options, seed)


def _owners(table: Table, options: TableOptions) -> list[str]:
    if options.partition.kind != "natural" and options.user not in table.frame.columns:
        return [""] * len(table.frame)
    if table.columns:  # a server may have a held-out part alone
        require_column("data.user", options.user, table.columns, table.files[0][0])
    return table.texts(table.column("data.user", options.user))


def _target_columns(table: Table, options: TableOptions) -> list[str]:
    names = [options.target] if isinstance(options.target, str) else list(options.target)
    if not names or (len(names) > 1 and options.predict == "class"):
        raise InputError(
            f"data.target: one column has the class, got {names}; several are for data.predict: "
            "number"
        )
    if options.files is not None:
        table.column("data.files", options.files)
    return [table.column("data.target", name) for name in names]


def _names_a_file(name: str) -> bool:
    return bool(name) and "\0" not in name


def _first(values: NDArray[np.float32], names: Sequence[str]) -> str:
    """Return the name of the first of `values` that is no finite number."""
    return f"{names[int(np.isfinite(values).argmin())]:.60}"


def _feature_columns(table: Table, options: TableOptions, targets: Sequence[str]) -> list[str]:
    others = {options.user, *targets}
    there = [str(name) for name in table.frame.columns if str(name) not in others]
    if isinstance(options.features, tuple):
        chosen = [table.column("data.features", name) for name in options.features]
        require_others("data.features", chosen, targets)
    elif options.features is not None:
        chosen = matching(options.features, there)
    else:
        chosen = there
    if not chosen:
        raise InputError(f"data.features: {options.features} names no column; there are {there}")
    for key in ("mean", "std"):
        value = getattr(options, key)
        if isinstance(value, tuple) and len(value) not in (1, len(chosen)):
            raise InputError(f"data.{key} has {len(value)} numbers for {len(chosen)} features")
    return chosen
