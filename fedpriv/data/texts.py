"""Texts of one's own, in files or in a table, for a model of the next token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from fedpriv.data.content import Content, Files
from fedpriv.data.federated import Examples
from fedpriv.data.files import failure, is_clean
from fedpriv.data.image_folder import checked_pattern, files_below
from fedpriv.data.partition import Indices
from fedpriv.data.parts import misread, nothing_held_out, require_there
from fedpriv.data.prediction import of_a_node
from fedpriv.data.records import (
    NOBODY,
    FederatedRecords,
    OwnFolderOptions,
    RecordSource,
    Split,
    federate_records,
)
from fedpriv.data.tables import SUFFIXES as TABLES
from fedpriv.data.tables import Table, read_table
from fedpriv.data.tokens import (
    NO_TOKEN,
    ByteTokens,
    TokenizerConfig,
    Tokens,
    learnt,
    read_tokens,
)
from fedpriv.errors import InputError

SUFFIXES = frozenset({".txt", ".text", ".md"})
"""Files that are texts; others in a folder are passed over."""

# A file with more bytes is a bad text: a user's memory is everybody's.
_LONGEST = 64 * 2**20


class TextOptions(OwnFolderOptions):
    """Where texts lie, and how they are cut into examples."""

    name: str = Field(
        default="text", description="text: text files by user, or a table with a column of texts"
    )
    pattern: str | None = Field(
        default=None,
        description="regular expression of a file's whole path below data.path, with /, which has "
        "a group (?P<user>...); null: user/file, or user.txt",
    )
    user: str = Field(default="user", description="column of whose a text is, in a table")
    text: str = Field(default="text", description="column of texts, in a table")
    tokenizer: TokenizerConfig = Field(
        default=TokenizerConfig(), description="what texts are cut into"
    )
    block: int = Field(default=128, ge=1, le=65_536, description="tokens of an example")
    join: str | None = Field(
        default="\n",
        description="put between texts of one user, which are then cut as one; null: each text is "
        "cut alone, and its last example filled up",
    )

    @field_validator("pattern")
    @classmethod
    def _names_a_user(cls, pattern: str | None) -> str | None:
        return checked_pattern(pattern)

    def caps(self) -> Mapping[str, Any]:
        """Return, by key, what lets one text move another: see `DataOptions`."""
        return {**super().caps(), "join": self.join}

    def decides_users(self) -> Mapping[str, Any]:
        """Return, by key, what decides who a user is: see `DataOptions`."""
        plain = {"pattern": None, "user": "user", "tokenizer": TokenizerConfig()}
        return of_a_node(self, plain)


class Texts(Protocol):
    """Texts that lie somewhere, by row."""

    def text(self, row: int) -> str:
        """Return a text; raise InputError for one that cannot be used."""

    def size(self, row: int) -> int:
        """Return how many bytes a text has, unread; 0 for one that is not there."""

    def tell(self, content: Content, rows: Indices, files: Files) -> None:
        """Add to `content` what tells texts from others."""


@dataclass(frozen=True)
class TextFiles:
    """Text files: `Texts`."""

    folder: Path
    paths: Sequence[str]

    def text(self, row: int) -> str:
        """Read a file, which is UTF-8."""
        return read_text(self.folder / self.paths[row])

    def size(self, row: int) -> int:
        """Return the file's size: see `Texts`."""
        try:
            return (self.folder / self.paths[row]).stat().st_size
        except OSError:  # told when the file is read
            return 0

    def tell(self, content: Content, rows: Indices, files: Files) -> None:
        """Add the files' names and bytes."""
        for told in files.digests([self.folder / self.paths[row] for row in rows]):
            content.add(told)


@dataclass(frozen=True)
class TextColumn:
    """A column of a table: `Texts`."""

    table: Table
    texts: Sequence[str]

    def text(self, row: int) -> str:
        """Return a cell, which must be UTF-8."""
        text = self.texts[row]
        if not _is_text(text):
            raise InputError(f"{self.table.where(row)}: its text is empty, or not UTF-8")
        return text

    def size(self, row: int) -> int:
        """Return the cell's size: see `Texts`."""
        return len(self.texts[row].encode("utf-8", "surrogateescape"))

    def tell(self, content: Content, rows: Indices, files: Files) -> None:
        """Add the cells."""
        for row in rows:
            content.add(self.texts[row].encode("utf-8", "surrogateescape"))


def _is_text(cell: str) -> bool:
    return bool(cell) and is_clean(cell)


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Texts as blocks of tokens, each with the tokens one place later: `Records`.

    `between` are the tokens between texts that are cut as one; None where each is cut alone.
    """

    texts: Texts
    tokens: Tokens
    block: int
    between: NDArray[np.int64] | None

    def read(self, row: int) -> NDArray[np.int64]:
        """Return one text's tokens."""
        found = self.tokens.encode(self.texts.text(row))
        if not len(found):
            raise InputError(f"text {row + 1}: is empty")
        return found

    def pack(self, read: Sequence[NDArray[np.int64]]) -> Examples:
        """Cut texts into blocks; what their last one lacks has no target."""
        texts = list(read)
        if self.between is not None and texts:
            parts = [part for text in texts for part in (self.between, text)]
            texts = [np.concatenate(parts[1:])]
        blocks = [self._cut(text) for text in texts]
        empty = np.zeros((2, 0, self.block), np.int64)
        inputs, targets = np.concatenate([empty, *blocks], axis=1)
        return Examples(torch.from_numpy(inputs), torch.from_numpy(targets))

    def _cut(self, text: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the inputs and targets of one text: `[2, blocks, block]`."""
        count = -(-(len(text) - 1) // self.block)
        whole = np.zeros((2, count * self.block), np.int64)
        whole[1] = NO_TOKEN
        whole[0, : len(text) - 1], whole[1, : len(text) - 1] = text[:-1], text[1:]
        return whole.reshape(2, count, self.block)

    def note(self, parts: Sequence[Indices]) -> str:
        """Say where blocks are padding at least by half; "" where some may be fuller.

        A token has a byte or more, so no text has more tokens than bytes.
        """
        longest = 0
        for rows in parts:
            sizes = [self.texts.size(int(row)) for row in rows]
            if self.between is None:
                here = max(sizes, default=0)
            else:
                here = sum(sizes) + len(self.between) * (len(sizes) - 1)
            longest = max(longest, here)
            if 2 * longest > self.block:
                return ""
        whose = "text has" if self.between is None else "user's texts together have"
        return (
            f"data.block is {self.block} tokens and no {whose} more than {longest}: the rest of "
            f"each block is padding, which takes as long to train on; write block: {longest} or "
            "less"
        )

    def tell(self, content: Content, rows: Indices, files: Files) -> None:
        """Add the texts, and what they are cut into."""
        content.add(self.tokens.sha256)
        self.texts.tell(content, rows, files)


def build_text(options: TextOptions, seed: int) -> FederatedRecords:
    """Make users of text files, or of a table's rows; texts are read when their user is trained.

    Raises InputError for a missing folder or column, and for a tokenizer that cannot be made.
    """
    if options.path is None:
        raise InputError("data.path must name a folder of texts, or a table")
    require_there(options.path, "a folder of texts, or a table")
    texts, owners, public = _from_files(options) or _from_table(options)
    split = Split.of(owners, options, public)
    absent = _absent(options, public)
    tokens = _tokens(options, texts, public, absent)
    between = None if options.join is None else tokens.encode(options.join)
    source = RecordSource(
        title=f"text ({options.path.resolve().name}, {options.tokenizer.kind})",
        records=TokenBlocks(texts, tokens, options.block, between),
        split=split,
        classes=tokens.size,
        input_shape=(options.block,),
        example="block",
        task="next_token",
        several=True,
        usable=_usable(texts),
        lazy=isinstance(texts, TextFiles),
        misread=absent or misread(_folder(options), options, _owned(texts, split, public)),
    )
    return federate_records(source, options, seed)


def _absent(options: TextOptions, public: NDArray[np.bool_] | None) -> str:
    folder = _folder(options)
    found = public is not None and bool(public.any())
    return nothing_held_out(folder, options.held_out, found, "texts")


def _folder(options: TextOptions) -> Path:
    assert options.path is not None
    return options.path if options.path.is_dir() else options.path.parent


def _owned(
    texts: Texts, split: Split, public: NDArray[np.bool_] | None
) -> Iterable[tuple[str, str]]:
    """Return the files that are users' own, as `misread` reads them."""
    if isinstance(texts, TextFiles):
        return split.owned(texts.paths, public)
    assert isinstance(texts, TextColumn)
    return [(name, "") for name in texts.table.owned]


def _usable(texts: Texts) -> NDArray[np.bool_] | None:
    if not isinstance(texts, TextColumn):
        return None
    return np.array([_is_text(cell) for cell in texts.texts], bool)


def read_text(path: Path) -> str:
    """Read a whole text.

    Raises:
        InputError: there is none, or it is not UTF-8, or much too long.
        EnvironmentFault: the machine does not let it be read.
    """
    try:
        with path.open("rb") as file:
            found = file.read(_LONGEST + 1)
    except OSError as error:
        raise failure(path, error) from None
    if len(found) > _LONGEST:
        raise InputError(f"{path}: has more than {_LONGEST // 2**20} MiB; cut it into several")
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8") from None


_Found = tuple[Texts, list[str], NDArray[np.bool_] | None]


def _from_files(options: TextOptions) -> _Found | None:
    """Return text files, with whose each is and which are public; None where there are none."""
    folder, held_out = options.path, options.held_out
    assert folder is not None
    if not folder.is_dir():
        return None
    unowned = options.tokenizer.public
    paths = [
        path
        for path in files_below(folder)
        if Path(path).suffix.lower() in SUFFIXES
        and not (unowned and unowned != held_out and _is_in(path, unowned))
    ]
    if not paths:
        return None
    public = np.array([held_out is not None and _is_in(path, held_out) for path in paths])
    owners = [
        NOBODY if held else _owner(path, options.pattern)
        for path, held in zip(paths, public, strict=True)
    ]
    if options.pattern and not any(owners):
        raise InputError(
            f"data.pattern: {options.pattern} reads none of the paths below {folder}, such as "
            f"{paths[0]}"
        )
    return TextFiles(folder, paths), owners, public if held_out else None


def _is_in(path: str, part: str) -> bool:
    return path == part or path.startswith(f"{part}/")


def _owner(path: str, pattern: str | None) -> str:
    if pattern is not None:
        found = re.fullmatch(pattern, path)
        return (found["user"] or NOBODY) if found else NOBODY
    first, _, rest = path.partition("/")
    return first if rest else Path(first).stem


def _from_table(options: TextOptions) -> _Found:
    path = options.path
    assert path is not None
    try:
        table = read_table(path, options.held_out)
    except InputError as error:
        if "is no table" not in str(error):
            raise
        raise InputError(
            f"data.path: {path} holds no texts; it should be a folder of user/file, or of files "
            f"{{user}}.txt, or a table ({', '.join(TABLES)})"
        ) from None
    owners = [NOBODY] * len(table.frame)
    if options.partition.kind == "natural" or options.user in table.frame.columns:
        owners = table.texts(table.column("data.user", options.user))
    column = table.texts(table.column("data.text", options.text))
    return TextColumn(table, column), owners, table.public


def _tokens(
    options: TextOptions, texts: Texts, public: NDArray[np.bool_] | None, absent: str
) -> Tokens:
    config, folder = options.tokenizer, _folder(options)
    if config.kind == "bytes":
        return ByteTokens()
    if config.file is not None:
        return read_tokens(folder / config.file)
    if config.public is not None:
        return learnt(_public(folder / config.public), config.vocabulary)
    if public is None or not public.any():
        raise InputError(
            absent
            or "data.tokenizer.public: bpe learns from public text, and no held-out part is named; "
            "name a file of public text within data.path"
        )
    return learnt((texts.text(int(row)) for row in np.flatnonzero(public)), config.vocabulary)


def _public(path: Path) -> Iterator[str]:
    names = files_below(path) if path.is_dir() else [""]
    if not path.exists():
        raise InputError(
            f"data.tokenizer.public: there is no {path}; name a file or folder of public text "
            "within the folder of data.path"
        )
    for name in names:
        yield read_text(path / name)
