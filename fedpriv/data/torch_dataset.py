"""Any map-style `torch.utils.data.Dataset`, with whose each of its examples is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedpriv.components import Options, Slot
from fedpriv.counting import numbered
from fedpriv.data.classes import UNKNOWN, class_names, encoded, target_of
from fedpriv.data.content import Content, Files
from fedpriv.data.federated import Examples
from fedpriv.data.images import decoded
from fedpriv.data.partition import Indices
from fedpriv.data.prediction import PredictOptions, first_shape, of_a_node
from fedpriv.data.records import (
    FederatedRecords,
    OwnOptions,
    RecordSource,
    Split,
    federate_records,
    scaled,
    stacked,
)
from fedpriv.data.registry import TORCH_DATASETS
from fedpriv.data.tables import as_text
from fedpriv.draws import drawing_from
from fedpriv.errors import InputError
from fedpriv.failures import failure_of
from fedpriv.sections import NO_BEARING, KeptPath

# Up to so many examples, all are read to tell data apart; of more, some of each user.
_MOST_READ = 100_000
_SOME = 3
# What examples draw, they draw from this seed, whoever else has some.
_ALIKE = 0


class TorchDatasetOptions(Options):
    """What makes the data set, with its options."""

    name: str = Field(description="package.module:object, which returns the data set")


class ExampleOptions(PredictOptions, OwnOptions):
    """What the examples of a data set become."""

    shape: tuple[int, ...] | None = Field(
        default=None,
        description="shape of one input; null: that of the first held-out example",
    )


class TorchOptions(ExampleOptions):
    """Which data set, and what of it says whose an example is."""

    name: str = Field(default="torch", description="torch: a map-style data set of torch")
    path: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None, description="folder that its maker may ask for, as the argument path"
    )
    dataset: Annotated[TorchDatasetOptions, Slot(TORCH_DATASETS)] = Field(
        description="what makes the users' examples: package.module:object, or a section with that "
        "name and its options"
    )
    held_out: Annotated[TorchDatasetOptions | None, Slot(TORCH_DATASETS, optional=True)] = Field(
        default=None,
        description="what makes examples to measure on, which are public; null: one user in eight, "
        "by a hash of the id, with all that they have",
    )
    user_ids: str = Field(
        default="user_ids", description="attribute of the data set: whose each example is"
    )

    def decides_users(self) -> Mapping[str, Any]:
        """Return, by key, what decides who a user is: see `DataOptions`."""
        return {"dataset": self.dataset, **of_a_node(self, {"user_ids": "user_ids"})}


@dataclass(frozen=True, eq=False)
class TorchExamples:
    """The examples of a data set, and of its held-out one after them: `Records`.

    `labels` are the classes of all, where they are known without reading; `shape` is None while it
    is still looked for.
    """

    parts: Sequence[Any]
    labels: NDArray[np.int64] | None
    names: Sequence[str]
    options: ExampleOptions
    shape: tuple[int, ...] | None = None

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return one example's input and target; whatever it draws, it draws alike every time."""
        where = f"data.dataset: example {row}"
        pair: list[Any] = []

        def found() -> Tensor:
            pair.extend(_pair(example_at(self.parts, row)))
            return self._input(pair[0])

        with drawing_from(_ALIKE):
            value = decoded(where, found)
        if self.shape is not None and tuple(value.shape) != self.shape:
            raise InputError(f"{where}: its shape is {tuple(value.shape)}, not {self.shape}")
        if not value.isfinite().all():
            raise InputError(f"{where}: an input is no number")
        return value, self._target(pair[1], where)

    def _input(self, given: Any) -> Tensor:
        if hasattr(given, "convert") and hasattr(given, "mode"):  # Pillow's
            return self.options.image.of(given)
        values = given if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given))
        if values.is_complex():
            raise ValueError("an input is complex; write its parts as real numbers")
        values = values.detach().to(torch.float32)
        values = values.reshape(1) if values.dim() == 0 else values
        return scaled(values, self.options.mean, self.options.std)

    def _target(self, given: Any, where: str) -> Tensor:
        if self.options.predict == "class":
            text = label_text(given)
            label = self.names.index(text) if text in self.names else UNKNOWN
            return target_of(label, where, text, self.names)
        numbers = decoded(where, lambda: torch.as_tensor(given, dtype=torch.float32).reshape(-1))
        if len(numbers) != self._outputs or not numbers.isfinite().all():
            raise InputError(f"{where}: its target is not {self._outputs} numbers")
        return numbers

    @property
    def _outputs(self) -> int:
        return self.options.classes if isinstance(self.options.classes, int) else 1

    def pack(self, read: Sequence[Any]) -> Examples:
        """Lay examples side by side."""
        whole = self.options.predict == "class"
        like = torch.zeros((), dtype=torch.int64) if whole else torch.zeros(self._outputs)
        return stacked(read, self.shape or (0,), like)

    def tell(self, content: Content, rows: Indices, files: Files) -> None:
        """Add the examples; of very many, the first, the middle and the last."""
        if len(self.parts[0]) > _MOST_READ and len(rows) > _SOME:
            rows = rows[[0, len(rows) // 2, -1]]
        for row in rows:
            try:
                for each in self.read(int(row)):
                    content.add_tensor(each)
            except InputError as error:
                content.add(str(error).encode("utf-8", "surrogatepass"))


def build_torch(options: TorchOptions, seed: int) -> FederatedRecords:
    """Make users of the examples of a data set, which are read when their user is trained.

    Raises InputError for what is no map-style data set, or does not say whose its examples are.
    """
    users = _made(options.dataset, "data.dataset", options)
    held_out = _made(options.held_out, "data.held_out", options) if options.held_out else None
    owners = _attribute(users, options.user_ids, len(users))
    if owners is None and options.partition.kind == "natural":
        raise InputError(
            f"data.user_ids: {options.dataset.name} has no attribute {options.user_ids} with an id "
            "for each example; name it, or write another data.partition.kind"
        )
    others = None if held_out is None else _attribute(held_out, options.user_ids, len(held_out))
    return _federated(users, owners, held_out, others, options, seed)


def torch_users(
    dataset: Any,
    user_ids: Sequence[Any] | None = None,
    held_out: Any = None,
    *,
    seed: int = 0,
    **settings: Any,
) -> FederatedRecords:
    """Make users of the examples of a map-style data set, to be handed over as a run's `data`.

    Args:
        dataset: the users' examples, pairs of an input and a target.
        user_ids: whose each is; None where users are made up.
        held_out: public examples to measure on; None: one user in eight is held out.
        seed: draws what `settings` leave to chance.
        settings: options of the data set `torch`, such as `classes=10`.

    Raises:
        InputError: the data set is none, or does not fit.
    """
    options = ExampleOptions(name="torch", **settings)
    if user_ids is not None and len(user_ids) != len(dataset):
        raise InputError(
            f"user_ids: {len(user_ids)} for {numbered(len(dataset), 'example')}; write one each"
        )
    return _federated(dataset, user_ids, held_out, None, options, seed)


def _federated(
    users: Any,
    owners: Sequence[Any] | None,
    held_out: Any,
    others: Sequence[Any] | None,
    options: ExampleOptions,
    seed: int,
) -> FederatedRecords:
    parts = [users] if held_out is None else [users, held_out]
    ids = _ids(owners, len(users))
    if held_out is not None:
        ids += _ids(others, len(held_out))
    public = None if held_out is None else np.arange(len(ids)) >= len(users)
    split = Split.of(ids, options, public)
    names, labels = _labels(parts, split, options)
    records = TorchExamples(parts, labels, names, options)
    shape = options.shape or first_shape(records, split.held_out)
    records = replace(records, shape=shape)
    source = RecordSource(
        title=f"torch ({type(users).__name__})",
        records=records,
        split=split,
        classes=len(names) or records._outputs,
        input_shape=shape,
        example="unknown",
        labels=labels,
        task="classification" if names else "regression",
    )
    return federate_records(source, options, seed)


def _made(made: TorchDatasetOptions, key: str, options: TorchOptions) -> Any:
    dataset = TORCH_DATASETS.of(made).build(made, path=options.path)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(
            f"{key}: {made.name} made a {type(dataset).__name__}, which is no map-style data set: "
            "it needs __len__ and __getitem__"
        )
    try:
        len(dataset)
    except Exception as error:  # whatever its own code raises
        raise InputError(f"{key}: {made.name} has no length: {failure_of(error)}") from None
    return dataset


def _attribute(dataset: Any, name: str, length: int) -> Sequence[Any] | None:
    """Return what an attribute says of each example; None where there is none of this length."""
    found = getattr(dataset, name, None)
    try:
        return found if found is not None and len(found) == length else None
    except TypeError:
        return None


def _ids(owners: Sequence[Any] | None, length: int) -> list[str]:
    return [""] * length if owners is None else list(map(label_text, owners))


def label_text(given: Any) -> str:
    """Return a class or an id as text, of whatever type it is."""
    if isinstance(given, Tensor | np.ndarray | np.generic) and given.ndim == 0:
        given = given.item()
    return as_text(given)


def example_at(parts: Sequence[Any], row: int) -> Any:
    """Return one example of data sets that follow one another."""
    first = len(parts[0])
    return parts[0][row] if row < first else parts[1][row - first]


def _pair(given: Any) -> tuple[Any, Any]:
    if not isinstance(given, tuple | list) or len(given) < 2:
        raise ValueError(f"it is a {type(given).__name__}, and no pair of an input and a target")
    return given[0], given[1]


def _labels(
    parts: Sequence[Any], split: Split, options: ExampleOptions
) -> tuple[tuple[str, ...], NDArray[np.int64] | None]:
    if options.predict == "number":
        return (), None
    known = [_attribute(part, "targets", len(part)) for part in parts]
    texts = None
    if all(each is not None for each in known):
        texts = [label_text(each) for some in known for each in some or ()]
    public: Sequence[str] = ()
    if options.classes is None:
        held = split.held_out
        public = [_label_at(parts, int(row)) if texts is None else texts[row] for row in held]
    names = class_names(options.classes, public)
    return names, None if texts is None else encoded(texts, names)


def _label_at(parts: Sequence[Any], row: int) -> str:
    with drawing_from(_ALIKE):
        try:
            return label_text(_pair(example_at(parts, row))[1])
        except (MemoryError, OSError):
            raise
        except Exception:  # a bad record, which says nothing of classes
            return ""
