"""The partitioners of Flower Datasets, on a folder of Hugging Face's `datasets`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field

from fedpriv.data import partition
from fedpriv.data.hf import ColumnsOptions, column_texts, load_parts, source_of
from fedpriv.data.partition import Indices
from fedpriv.data.prediction import of_a_node
from fedpriv.data.records import FederatedRecords, Split, needed, require_column, with_users
from fedpriv.draws import drawing_from
from fedpriv.errors import InputError
from fedpriv.sections import Section

# The one whose partitions are people, whom a column names.
_NATURAL = "NaturalIdPartitioner"
# Says, in what a partitioner returns, which rows it chose.
_ROW = "fedpriv row"


class PartitionerConfig(Section):
    """A partitioner's name and its own options."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        default="IidPartitioner", description="name of a class in flwr_datasets.partitioner"
    )


class PartitionerOptions(ColumnsOptions):
    """Which partitioner deals the rows."""

    name: str = Field(
        default="flwr_datasets", description="flwr_datasets: partitioners of Flower Datasets"
    )
    partitioner: PartitionerConfig = Field(
        default=PartitionerConfig(),
        description="the partitioner's name, and its keyword arguments; num_partitions is "
        "data.users and seed the run's where they are not given",
    )

    def decides_users(self) -> Mapping[str, Any]:
        """Return, by key, what decides who a user is: see `DataOptions`."""
        return {"partitioner": self.partitioner, **of_a_node(self, {"split": "train"})}


def build_flwr_datasets(options: PartitionerOptions, seed: int) -> FederatedRecords:
    """Make a user of each partition; rows are read with their user.

    Raises InputError for a partitioner that there is not, and for options that it refuses.
    """
    module = needed("flwr_datasets.partitioner", f"data.name: {options.name}")
    make = _class_of(module, options.partitioner.name)
    arguments = _arguments(make, options, seed)
    rows, held_out = load_parts(options)
    natural = options.partitioner.name == _NATURAL
    owners = [""] * (len(rows) + len(held_out or ()))
    if natural:
        column = require_column(
            "data.partitioner: partition_by",
            str(arguments.get("partition_by")),
            rows.column_names,
            "the data set",
        )
        owners = column_texts(rows, column)
        if held_out is not None:
            there = column in held_out.column_names
            owners += column_texts(held_out, column) if there else [""] * len(held_out)
    public = None if held_out is None else np.arange(len(owners)) >= len(rows)
    split = Split.of(owners, options, public)
    source = source_of(rows, held_out, split, options)
    with drawing_from(seed):
        users = _partitioned(make, arguments, rows, split, options, seed)
    return with_users(source, users, options, seed, natural, options.partitioner.name)


def _class_of(module: Any, name: str) -> type:
    known = {
        each: found
        for each in module.__all__
        if issubclass(found := getattr(module, each), module.Partitioner)
        and not inspect.isabstract(found)
    }
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    raise InputError(f"data.partitioner: Flower Datasets has no {name}; {hint}")


def _arguments(make: type, options: PartitionerOptions, seed: int) -> dict[str, Any]:
    """Return a partitioner's arguments, with the run's where they are not given.

    Raises:
        InputError: it has no such argument, needs another, or would deal otherwise every time.
    """
    taken, own = inspect.signature(make).parameters, options.partitioner.model_extra or {}
    for name in own:
        if name not in taken:
            close = difflib.get_close_matches(name, taken, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(taken)}"
            raise InputError(
                f"data.partitioner.{name}: {options.partitioner.name} has none; {hint}"
            )
    given = dict(own)
    if options.users is not None:
        given.setdefault("num_partitions", options.users)
    given.setdefault("seed", seed)
    given = {name: value for name, value in given.items() if name in taken}
    if given.get("seed", 0) is None:
        raise InputError(
            "data.partitioner: seed: null deals users anew in every process; write a number, or "
            "nothing for the run's seed"
        )
    for name, parameter in taken.items():
        if parameter.default is parameter.empty and name not in given:
            also = " (or data.users)" if name == "num_partitions" else ""
            raise InputError(f"data.partitioner.{name}{also}: {options.partitioner.name} needs it")
    return given


def _partitioned(
    make: type,
    arguments: Mapping[str, Any],
    rows: Any,
    split: Split,
    options: PartitionerOptions,
    seed: int,
) -> Mapping[str, Indices]:
    """Return the rows of each partition, by the id of its user.

    Raises:
        InputError: the partitioner fails, or gives something other than each row to one user.
    """
    from datasets import Dataset

    plain = rows.with_format(None).select(split.training).add_column(_ROW, split.training)
    try:
        partitioner = make(**arguments)
        partitioner.dataset = plain
        number = int(partitioner.num_partitions)
        parts = [partitioner.load_partition(index) for index in range(number)]
    except Exception as error:  # whatever its own code raises
        said = " ".join(str(error).split())[:200]
        raise InputError(f"data.partitioner: {options.partitioner.name} refuses: {said}") from None
    if any(not isinstance(part, Dataset) or _ROW not in part.column_names for part in parts):
        raise InputError(
            f"data.partitioner: {options.partitioner.name} splits columns; users have rows of "
            "their own"
        )
    chosen = [np.sort(np.array(part[_ROW][:], dtype=np.int64)) for part in parts]
    everything = np.concatenate([*chosen, np.zeros(0, np.int64)])
    if len(np.unique(everything)) < len(everything):
        raise InputError(
            f"data.partitioner: {options.partitioner.name} gives a row to several users, who would "
            "then be protected less"
        )
    return _by_user(chosen, split, options, seed)


def _by_user(
    chosen: list[Indices], split: Split, options: PartitionerOptions, seed: int
) -> Mapping[str, Indices]:
    if options.partitioner.name == _NATURAL:
        users = {str(split.owners[part[0]]): part for part in chosen if len(part)}
        names = sorted(users)
        if options.users is not None:
            names = partition.choose(names, options.users, seed)
        return {name: users[name] for name in names}
    if options.users is not None and options.users < len(chosen):
        raise InputError(
            f"data.users is {options.users}, and {options.partitioner.name} makes {len(chosen)} of "
            "them"
        )
    return {f"user-{number}": part for number, part in enumerate(chosen)}
