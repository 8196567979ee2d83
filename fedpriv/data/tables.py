"""Tables in files, CSV and Parquet, as they are written: no cell decides how others are read."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedpriv.data.files import unreachable, visible
from fedpriv.data.parts import require_there
from fedpriv.data.records import needed, require_column
from fedpriv.errors import InputError

_SEPARATORS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
_PARQUET = ".parquet"
SUFFIXES = (*_SEPARATORS, _PARQUET)
"""Files that are tables; others in a folder are passed over."""


@dataclass(frozen=True)
class Table:
    """The rows of one or several files, those of the held-out part last.

    Attributes:
        frame: their cells: text of CSV, and what Parquet has.
        files: each file, with its number of rows.
        public: which rows are of the held-out part; None where there is no such part.
        unread: how many lines have too many cells, and were left out.
        folder: where the files lie.
        columns: of the users' files, each once.
        owned: what the users' files are called, where all of a folder were read.
    """

    frame: pd.DataFrame
    files: Sequence[tuple[Path, int]]
    public: NDArray[np.bool_] | None
    unread: int
    folder: Path
    columns: Sequence[str]
    owned: Sequence[str]

    def where(self, row: int) -> str:
        """Return a row's place, in words."""
        for path, count in self.files:
            if row < count:
                return f"{path}: row {row + 1}"
            row -= count
        raise IndexError(row)

    def column(self, key: str, name: str) -> str:
        """Return the name of a column that a config names under `key`.

        Raises:
            InputError: there is none of this name.
        """
        return require_column(key, name, list(map(str, self.frame.columns)), self.files[0][0])

    def texts(self, name: str) -> list[str]:
        """Return a column as text; "" where a cell is empty."""
        return [as_text(value) for value in self.frame[name].to_numpy(dtype=object)]

    def numbers(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Return columns as float32 `[rows, columns]`; NaN where a cell is no finite number."""
        columns = [as_numbers(self.frame[name].to_numpy(dtype=object)) for name in names]
        return np.stack(columns, axis=1) if columns else np.zeros((len(self.frame), 0), np.float32)


def read_table(path: Path | None, held_out: str | None) -> Table:
    """Read the file `path`, or all tables in that folder; `held_out` is one beside it, or in it.

    Raises:
        InputError: there is none, or a file is no table.
    """
    if path is None:
        raise InputError("data.path must name a CSV or Parquet file, or a folder of them")
    require_there(path, "a file that ends with .csv, say, or a folder of such files")
    folder = path if path.is_dir() else path.parent
    public = _tables(folder / held_out) if held_out else []
    users = [each for each in _tables(path) if each not in public]
    if not users and not (public and path.is_dir()):  # a server may have a held-out part alone
        raise InputError(
            f"data.path: {path} is no table; it should be a file that ends with "
            f"{', '.join(SUFFIXES)}, or a folder of such files"
        )
    frames, files, unread = [], [], 0
    for file in (*users, *public):
        frame, left_out = _read(file, "data.held_out" if file in public else "data.path")
        frames.append(frame)
        files.append((file, len(frame)))
        unread += left_out
    frame = pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]
    first = sum(count for _, count in files[: len(users)])
    held = np.arange(len(frame)) >= first if held_out else None
    columns = dict.fromkeys(str(name) for each in frames[: len(users)] for name in each.columns)
    owned = [file.name for file in users] if path.is_dir() else []
    return Table(frame, files, held, unread, folder, list(columns), owned)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a regular expression matches as a whole."""
    return [name for name in names if re.fullmatch(pattern, name)]


def _tables(path: Path) -> list[Path]:
    if path.is_dir():
        return [Path(each.path) for each in visible(path) if _is_table(each.name)]
    return [path] if path.is_file() and _is_table(path.name) else []


def _is_table(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _read(path: Path, key: str) -> tuple[pd.DataFrame, int]:
    """Read one file, which is named under `key`; return how many lines were left out, too."""
    try:
        if path.name.lower().endswith(_PARQUET):
            needed("pyarrow", f"{path}: reading Parquet")
            from pyarrow.parquet import read_schema

            _require_names_of_their_own(path, read_schema(path).names)
            return pd.read_parquet(path, engine="pyarrow"), 0
        return _read_text(path)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    except UnicodeError:
        raise InputError(
            f"{key}: {path}: is no text in UTF-8; save it so, or end its name with {_PARQUET} if "
            "it is that"
        ) from None
    except pd.errors.EmptyDataError:
        raise InputError(
            f"{key}: {path} is empty; write the columns' names in its first line, and rows below"
        ) from None
    except Exception as error:  # whatever a reader raises on files that are none of its own
        # pyarrow's OSErrors of such files have no number.
        if isinstance(error, OSError) and error.errno is not None:
            raise unreachable(path, error) from None
        raise InputError(
            f"{key}: {path}: cannot be read as a table ({_said(error)}); {_mend(path)}"
        ) from None


def _mend(path: Path) -> str:
    if path.name.lower().endswith(_PARQUET):
        return "write it anew, or end its name as what it is"
    return 'close each quote (") that is opened, and write as many cells in each row as columns'


def _read_text(path: Path) -> tuple[pd.DataFrame, int]:
    suffix = next(each for each in _SEPARATORS if path.name.lower().endswith(each))
    read = partial(
        pd.read_csv,
        path,
        sep=_SEPARATORS[suffix],
        dtype=object,  # as text: what a cell holds must not change how others are read
        keep_default_na=False,
        na_filter=False,
        index_col=False,
        encoding="utf-8-sig",
        encoding_errors="surrogateescape",
        low_memory=False,
    )
    names = read(header=None, nrows=1).iloc[0]
    _require_separated(path, names, _SEPARATORS[suffix])
    _require_names_of_their_own(path, names)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", pd.errors.ParserWarning)
        frame = read(on_bad_lines="warn")
    left_out = sum(str(each.message).count("Skipping line") for each in told)
    return frame, left_out


def _require_separated(path: Path, names: Sequence[str], separator: str) -> None:
    """Refuse a table whose cells another separator keeps apart: all would be one column."""
    called = {",": "commas", "\t": "tabs", ";": "semicolons"}
    found = [each for each in called if each in str(names[0]) and each != separator]
    if len(names) == 1 and found:
        raise InputError(
            f"{path}: {called[separator]} are read between its cells, and its first line has "
            f"{called[found[0]]}; save it with {called[separator]}"
        )


def _require_names_of_their_own(path: Path, names: Iterable[str]) -> None:
    """Refuse a table of which a name means two columns: pandas would rename one, in silence."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise InputError(
            f"{path}: several columns are called {twice[0]!r}; give each a name of its own"
        )


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def as_text(value: object) -> str:
    """Return a cell as text; "" where it is empty."""
    if value is None or value is pd.NA or value is pd.NaT or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():  # as a column of whole numbers with gaps
        return str(int(value))
    return str(value)


def as_numbers(values: Sequence[object]) -> NDArray[np.float32]:
    """Return cells as float32; NaN where one is no finite number."""
    plain = [
        value if isinstance(value, str | int | float | np.generic) else None for value in values
    ]
    numbers = pd.to_numeric(pd.Series(plain, dtype=object), errors="coerce").to_numpy(np.float64)
    with np.errstate(over="ignore"):
        rounded = numbers.astype(np.float32)
    return np.where(np.isfinite(rounded), rounded, np.float32(np.nan))
