"""Classes by name, and the place of each among a model's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedpriv.errors import InputError

UNKNOWN = -1
"""The label of a record whose class is none of the known ones."""

# With more classes a column is taken for one of numbers.
_MOST_CLASSES = 10_000
# Of classes that a message names.
_SHOWN = 5

Classes = Annotated[
    Annotated[int, Field(ge=1, le=_MOST_CLASSES)] | tuple[str | int, ...] | None,
    Field(
        default=None,
        description="the classes: their names, in the order of a model's outputs, or how many "
        "there are where they are called 0, 1, 2, ...; null: those of the held-out records. Users' "
        "records of any other class are left out",
    ),
]


def class_names(
    named: int | Sequence[str | int] | None, public: Iterable[str], absent: str = ""
) -> tuple[str, ...]:
    """Return the classes in the order of a model's outputs; `public` are those of held-out records.

    Never those of users' records: which there are is theirs. `absent` is why there may be no
    held-out record: see `nothing_held_out`.

    Raises:
        InputError: there are none, or too many to be classes, or two of one name.
    """
    if isinstance(named, int):
        names = tuple(map(str, range(named)))
    elif named is not None:
        names = tuple(map(str, named))
    else:
        names = tuple(sorted(set(public) - {""}, key=_by_number))
        if not names:
            raise InputError(
                absent
                or "data.classes: null takes the classes from held-out records, and there are none "
                "here; name the classes, and public records in data.held_out"
            )
        if len(names) > _MOST_CLASSES:
            raise InputError(
                f"data.classes: the held-out records have {len(names)} classes, such as "
                f"{names[0]!r:.40}; write data.predict: number for numbers"
            )
        if len(names) == 1:
            raise InputError(
                f"data.classes: null takes the classes from held-out records, and all of these are "
                f"{names[0]!r:.40}; name the classes"
            )
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"data.classes: two or more are needed, each once, got {list(names)}")
    return names


def _by_number(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() and len(name) < 10 else (2**60, name)


def encoded(labels: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Return the place of each label among the classes, `UNKNOWN` where it is none of them."""
    place = {name: number for number, name in enumerate(names)}
    return np.array([place.get(label, UNKNOWN) for label in labels], dtype=np.int64)


def target_of(label: int, where: object, shown: object, names: Sequence[str]) -> Tensor:
    """Return a class as a target.

    Raises:
        InputError: it is none.
    """
    if label == UNKNOWN:
        some = ", ".join(map(repr, names[:_SHOWN])) + ", ..." * (len(names) > _SHOWN)
        raise InputError(
            f"{where}: {shown!r:.60} is none of the {len(names)} classes ({some:.200})"
        )
    return torch.tensor(label)
