"""What users bring of their own: records that are read when a user is trained, whatever from.

A source lists its records, and says whose each is. Here they become users, who keep what they
have, and held-out records, which no user has. What a model must know beforehand (classes, the
shape of an input) comes from the config or from held-out records, never from users' own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedpriv import counting
from fedpriv.data import partition
from fedpriv.data.classes import UNKNOWN
from fedpriv.data.content import Content, Files
from fedpriv.data.facts import DataFacts, Example, HeldOut
from fedpriv.data.federated import Examples
from fedpriv.data.options import DealtOptions, FolderOptions, KeptOptions
from fedpriv.data.partition import Indices, PartitionConfig, held_out_by_id
from fedpriv.data.parts import Inside
from fedpriv.data.sources import DEVELOPMENT_EVERY, PARTITION_STREAM, how_dealt, make_up
from fedpriv.errors import InputError
from fedpriv.imports import command_for

NOBODY = ""
"""The owner of records that do not say whose they are."""

HELD_OUT_EVERY = 8
"""One user in so many is held out where a data set names no held-out part."""

# Held-out records that are read together.
_PART = 256


class ReadOptions(KeptOptions):
    """What happens to records that cannot be used."""

    on_bad: Literal["skip", "stop"] = Field(
        default="skip",
        description="a record that cannot be read, or has no target: skip and count it, or stop "
        "the run",
    )


class OwnOptions(DealtOptions, ReadOptions):
    """Of a collection of somebody's own, which mostly says whose a record is."""

    partition: PartitionConfig = Field(
        default=PartitionConfig(kind="natural"),
        description="how the training examples are dealt to users",
    )


class OwnFolderOptions(OwnOptions, FolderOptions):
    """Of somebody's own files."""

    held_out: Inside | None = Field(
        default=None,
        description="the part of data.path to measure on, which is public; null: one user in "
        "eight, by a hash of the id, with all that they have",
    )


class Records(Protocol):
    """Records that lie somewhere, by row."""

    def read(self, row: int) -> Any:
        """Read one record.

        Raises InputError, naming it, for one that cannot be used, and EnvironmentFault where the
        machine is at fault.
        """

    def pack(self, read: Sequence[Any]) -> Examples:
        """Make examples of the records that were read of one user, or of held-out ones."""

    def tell(self, content: Content, rows: Indices, files: Files) -> None:
        """Add to `content` what tells these records from others; `files` looks into files."""


@dataclass(frozen=True)
class Split:
    """Whose records are whose, and which of them nobody holds.

    Attributes:
        owners: whose each row is, `NOBODY` where that is not said.
        named: whether it is said at all.
        training: rows of users.
        held_out: rows to measure on.
        strays: how many other rows are left out, since nobody knows whose they are.
    """

    owners: NDArray[np.object_]
    named: bool
    training: Indices
    held_out: Indices
    strays: int

    @classmethod
    def of(
        cls,
        owners: Sequence[str],
        options: KeptOptions,
        public: Sequence[bool] | NDArray[np.bool_] | None = None,
        unread: int = 0,
    ) -> Split:
        """Split rows; `public` marks those of a held-out part, None where there is none.

        `unread` more are of nobody.

        Which people are held out is a function of their names alone. Where no row says whose it
        is, it is every eighth row.
        """
        owner = np.array([*owners, None], dtype=object)[:-1]
        held = np.zeros(len(owner), bool) if public is None else np.asarray(public, bool)
        named = bool((owner[~held] != NOBODY).any())
        if public is None:
            held = _one_in(HELD_OUT_EVERY, owner, ~held, named, "")
        training = ~held
        if options.evaluation == "development":
            held = _one_in(DEVELOPMENT_EVERY, owner, training, named, "development ")
            training &= ~held
        known = (owner != NOBODY) | (not named)
        return cls(
            owners=owner,
            named=named,
            training=np.flatnonzero(training & known),
            held_out=np.flatnonzero(held),
            strays=int((training & ~known).sum()) + unread,
        )

    @property
    def whose(self) -> HeldOut:
        """Whose the held-out records are, as far as rows say."""
        held, users = set(self.owners[self.held_out]), set(self.owners[self.training])
        if NOBODY in held or not self.named:
            return "unnamed"
        return "others" if held.isdisjoint(users) else "same"

    @property
    def people(self) -> int:
        """How many different owners the rows of users name."""
        return len(set(self.owners[self.training]) - {NOBODY})

    def owned(
        self, paths: Sequence[str], public: Sequence[bool] | NDArray[np.bool_] | None
    ) -> Iterator[tuple[str, str]]:
        """Yield the paths that are users' own, each with the user's name, of all rows' paths.

        `public` as in `of`; who is held out by the name alone is a user here too.
        """
        held = [False] * len(paths) if public is None else public
        for path, owner, apart in zip(paths, self.owners, held, strict=True):
            if not apart and (owner != NOBODY or not self.named):
                yield path, owner

    def deal(
        self, options: OwnOptions, labels: NDArray[np.int64] | None, seed: int
    ) -> Mapping[str, Indices]:
        """Return the rows of each user, by id; `labels` are those of all rows, where known.

        Raises:
            InputError: users who cannot be had of these rows.
        """
        kind, rows = options.partition.kind, self.training
        if kind == "natural":
            return self._natural(options, seed)
        if labels is None and kind != "iid":
            raise InputError(
                f"data.partition.kind={kind} deals examples by their class, which is not known "
                "here before they are read; use iid or natural"
            )
        rng = np.random.default_rng(np.random.SeedSequence([seed, PARTITION_STREAM]))
        of_rows = np.zeros(len(rows), np.int64) if labels is None else labels[rows]
        dealt = make_up(of_rows, options, rng)
        return {f"user-{number}": rows[part] for number, part in enumerate(dealt)}

    def _natural(self, options: OwnOptions, seed: int) -> Mapping[str, Indices]:
        if not self.named and len(self.training):
            raise InputError(
                "data.partition.kind=natural: these data do not say whose a record is; use iid, "
                "dirichlet or shards, or name who has it"
            )
        owners = self.owners[self.training]
        names = sorted(set(owners))
        if options.users is not None:
            names = partition.choose(names, options.users, seed)
        elif not names:
            raise InputError("data.path: there is no user here, so data.users cannot be null")
        order = np.argsort(owners.astype(str), kind="stable")
        ordered = owners[order].astype(str)
        first = np.searchsorted(ordered, names, "left")
        after = np.searchsorted(ordered, names, "right")
        return {
            name: np.sort(self.training[order[start:end]])
            for name, start, end in zip(names, first, after, strict=True)
        }


def _one_in(
    every: int, owners: NDArray[np.object_], among: NDArray[np.bool_], named: bool, salt: str
) -> NDArray[np.bool_]:
    """Mark all rows of one owner in so many `among` these, or every so many-th row."""
    if not named:
        return among & ((np.cumsum(among) - 1) % every == 0)
    names = set(owners[among]) - {NOBODY}
    held = {name for name in names if held_out_by_id(salt + name, every)}
    return among & np.array([owner in held for owner in owners], bool)


@dataclass(frozen=True, eq=False)
class FederatedRecords:
    """Users who have records; see `FederatedDataset`.

    Attributes:
        records: all that there are.
        parts: the rows of each user.
        user_ids: their stable ids.
        held_out: the rows to measure on, those together that are packed together.
        classes: number of classes, of outputs, or of tokens.
        input_shape: shape of one input.
        task: what is learnt.
        on_bad: what happens to records that cannot be used.
        description: one line for reports; public.
        sizes: how many records users have, in words; private.
        facts: what is true of it, as far as that was checked.
        cap: the most examples of a user, where a record is no example, and the run's seed.
        misread: what seems wrong with whose records are whose: see the function.
        undrawn: how many people are left out, in words; "" for none; private.
    """

    records: Records
    parts: Sequence[Indices]
    user_ids: Sequence[str]
    held_out: Sequence[Indices]
    classes: int
    input_shape: tuple[int, ...]
    task: str
    on_bad: Literal["skip", "stop"]
    description: str
    sizes: str
    facts: DataFacts
    cap: tuple[int | None, int] = (None, 0)
    misread: str = ""
    undrawn: str = ""

    @property
    def population(self) -> int:
        """Number of users N."""
        return len(self.parts)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, in the order of a model's outputs; () where they are not."""
        return tuple(getattr(self.records, "names", ()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before training on these users; private."""
        of_records = getattr(self.records, "note", None)
        said = of_records(self.parts) if of_records is not None else ""
        return tuple(filter(None, (self.misread, self.undrawn, said)))

    def user(self, index: int) -> Examples:
        """Read one user's records: see `FederatedDataset.user`.

        Those that cannot be used are left out and counted, or raise InputError with
        `data.on_bad: stop`.
        """
        if not 0 <= index < self.population:
            raise IndexError(f"user index {index} is outside 0..{self.population - 1}")
        examples = self._read(self.parts[index])
        limit, seed = self.cap
        if limit is None or len(examples) <= limit:
            return examples
        places = [np.arange(len(examples))]
        (kept,) = partition.cap(places, [self.user_ids[index]], limit, seed)
        return replace(examples.take(torch.from_numpy(kept)), skipped=examples.skipped)

    def why_skipped(self, index: int) -> str:
        """Return the reason of a user's first record that cannot be used; private."""
        for row in self.parts[index]:
            try:
                self.records.read(int(row))
            except InputError as error:
                return str(error)
        return ""

    def evaluation(self) -> Iterator[Examples]:
        """Read the held-out records, some at a time."""
        read: list[Examples] = []
        for rows in self.held_out:
            read.append(self._read(rows))
            if sum(map(len, read)) >= _PART:
                yield Examples.join(read)
                read = []
        if read:
            yield Examples.join(read)

    def digest(self) -> str:
        """Return the SHA-256 of the users' ids and of what tells their records from others."""
        content = Content(f"records {self.classes} {self.input_shape} {self.task}")
        with Files(sum(map(len, self.parts))) as files:
            for user_id, rows in zip(self.user_ids, self.parts, strict=True):
                content.add_user(user_id, len(rows))
                self.records.tell(content, rows, files)
        return content.hexdigest()

    def require_usable(self) -> None:
        """Raise InputError, with the reason, where no user's record, or no held-out one, is usable.

        So it does where a whole part of a folder would be a user's. Every round would cost ε for
        noise alone, or for nonsense. It looks at private data, so in a deployment nothing may
        depend on it.
        """
        if self.misread:
            raise InputError(self.misread)
        self._require_usable(self.parts, "users'")
        self._require_usable(self.held_out, "held-out")

    def _require_usable(self, parts: Sequence[Indices], whose: str) -> None:
        reason = none = "there are none"
        for row in chain.from_iterable(parts):
            try:
                read = self.records.read(int(row))
            except InputError as error:
                if self.on_bad == "stop":
                    raise _stopped_by(error) from None
                reason = str(error) if reason == none else reason
            else:
                if len(self.records.pack([read])):
                    return
                reason = "one has nothing to learn from"
        mend = "" if whose == "users'" else "; name public ones in data.held_out"
        raise InputError(f"data: none of the {whose} records can be used: {reason}{mend}")

    def _read(self, rows: Iterable[int]) -> Examples:
        read, skipped = [], 0
        for row in rows:
            try:
                read.append(self.records.read(int(row)))
            except InputError as error:
                if self.on_bad == "stop":
                    raise _stopped_by(error) from None
                skipped += 1
        examples = self.records.pack(read)
        return replace(examples, skipped=examples.skipped + skipped)


def _stopped_by(error: InputError) -> InputError:
    return InputError(f"{error}; mend it, or leave such records out with data.on_bad: skip")


@dataclass(frozen=True)
class RecordSource:
    """Records before they are users': what a source provides.

    Attributes:
        title: what they are, for people; public.
        records: all of them.
        split: whose they are.
        classes: number of classes, of outputs, or of tokens.
        input_shape: shape of one input.
        example: what one example is.
        labels: the class of each row, where it is known without reading the row.
        task: what is learnt.
        several: whether a record may become several examples.
        misread: see `misread`.
        usable: which rows can be used, as far as that is known unread, beside their classes; None
            where it is not.
        lazy: whether others may turn out bad when they are read.
    """

    title: str
    records: Records
    split: Split
    classes: int
    input_shape: tuple[int, ...]
    example: Example
    labels: NDArray[np.int64] | None = None
    task: str = "classification"
    several: bool = False
    misread: str = ""
    usable: NDArray[np.bool_] | None = None
    lazy: bool = True

    @property
    def of_other_classes(self) -> NDArray[np.bool_]:
        """Which rows have a class that is none of the known ones, as far as that is known."""
        if self.labels is None or self.task != "classification":
            return np.zeros(len(self.split.owners), bool)
        return self.labels == UNKNOWN

    @property
    def bad(self) -> NDArray[np.bool_]:
        """Which other rows cannot be used, as far as that is known."""
        if self.usable is None:
            return np.zeros(len(self.split.owners), bool)
        return ~self.usable & ~self.of_other_classes


def federate_records(source: RecordSource, options: OwnOptions, seed: int) -> FederatedRecords:
    """Deal a collection's records to users, as the options ask.

    Raises:
        InputError: users who cannot be had of them.
    """
    users = source.split.deal(options, source.labels, seed)
    natural = options.partition.kind == "natural"
    return with_users(source, users, options, seed, natural, how_dealt(options))


def with_users(
    source: RecordSource,
    users: Mapping[str, Indices],
    options: ReadOptions,
    seed: int,
    natural: bool,
    dealt: str,
) -> FederatedRecords:
    """Return the data set of `users`, who are the people that the rows name where `natural`."""
    split, limit = source.split, options.examples_per_user
    user_ids = tuple(users)
    parts: Sequence[Indices] = list(users.values())
    if not source.several:
        parts = partition.cap(parts, user_ids, limit, seed)
    return FederatedRecords(
        records=source.records,
        parts=parts,
        user_ids=user_ids,
        held_out=_together(split, source.several),
        classes=source.classes,
        input_shape=source.input_shape,
        task=source.task,
        on_bad=options.on_bad,
        description=f"{source.title}: {counting.numbered(options.users or len(parts), 'user')} "
        f"({dealt}); {_held_out(source, options)}",
        sizes=_sizes(parts, source, options.on_bad),
        facts=DataFacts(
            users="person" if natural else "dealt",
            example=source.example,
            held_out=split.whose,
            public="none",
        ),
        cap=(limit if source.several else None, seed),
        misread=source.misread,
        undrawn=partition.undrawn(split.people, options.users) if natural else "",
    )


def _together(split: Split, by_owner: bool) -> list[Indices]:
    """Return the held-out rows in parts: those of one owner, where texts are joined, or so many."""
    rows = split.held_out
    if by_owner and len(rows):
        owners = split.owners[rows].astype(str)
        order = np.argsort(owners, kind="stable")
        ends = np.flatnonzero(owners[order][1:] != owners[order][:-1]) + 1
        return np.split(rows[order], ends)
    return [rows[first : first + _PART] for first in range(0, len(rows), _PART)]


def _held_out(source: RecordSource, options: ReadOptions) -> str:
    """Return how many records are measured on, in words; public."""
    rows = source.split.held_out
    left_out = int((source.of_other_classes | source.bad)[rows].sum())
    said = counting.numbered(len(rows) - left_out, f"{options.evaluation} record")
    said += _if_read(source, options.on_bad)
    return said + f", {left_out} that cannot be used left out" * bool(left_out)


def _sizes(parts: Sequence[Indices], source: RecordSource, on_bad: str) -> str:
    """Return how many records users are trained on, and why others are not, in words; private."""
    other, bad = source.of_other_classes, source.bad
    used = [int((~(other | bad)[part]).sum()) for part in parts]
    said = counting.in_words(used, "text" if source.several else "record")
    said += _if_read(source, on_bad)
    if source.several:
        said += f", to be cut into blocks of {source.input_shape[0]} tokens"
    if source.split.strays:
        said += f"; {counting.numbered(source.split.strays, 'record')} of nobody, left out"
    if wrong := sum(int(other[part].sum()) for part in parts):
        said += f"; {wrong:,} of other classes, left out"
    if wrong := sum(int(bad[part].sum()) for part in parts):
        said += f"; {wrong:,} that cannot be used, left out"
    return said


def _if_read(source: RecordSource, on_bad: str) -> str:
    """Say of a number of records that some may not count; nobody knows who has not read them."""
    return ", as far as they can be read" if source.lazy and on_bad == "skip" else ""


def stacked(
    read: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int], target: Tensor
) -> Examples:
    """Lay inputs and targets side by side; `target` is one that says what none would look like."""
    if not read:
        return Examples(torch.zeros(0, *shape), target.new_zeros(0, *target.shape))
    inputs, targets = zip(*read, strict=True)
    return Examples(torch.stack(inputs), torch.stack(targets))


def scaled(
    values: Tensor, mean: float | tuple[float, ...], std: float | tuple[float, ...]
) -> Tensor:
    """Return `(values - mean) / std`, by the first dimension where there are several of them."""
    beside = (-1, *(1 for _ in values.shape[1:]))
    middle, width = (torch.tensor(number, dtype=torch.float32) for number in (mean, std))
    if middle.dim():
        middle = middle.view(beside)
    if width.dim():
        width = width.view(beside)
    return (values - middle) / width


def needed(module: str, what: str) -> ModuleType:
    """Import what an extra of fedpriv brings.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if not (command := command_for(error.name or "")):
            raise
        raise InputError(f"{what} needs {error.name}: {command}") from None


def require_column(key: str, name: str, there: Sequence[str], where: object) -> str:
    """Return the name of a column.

    Raises:
        InputError: there is none of this name.
    """
    if name in there:
        return name
    close = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(there)[:200]}"
    raise InputError(f"{key}: {where} has no column {name}; {hint}")


def require_others(key: str, inputs: Sequence[str], targets: Sequence[str]) -> None:
    """Check that nothing is to be predicted from itself.

    Raises:
        InputError: a column is an input and a target.
    """
    if both := [name for name in inputs if name in targets]:
        raise InputError(f"{key}: {both[0]} is what is predicted; leave it out, or predict another")
