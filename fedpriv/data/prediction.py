"""What is predicted, from what: options that sources of numbers and images have in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from pydantic import Field, field_validator

from fedpriv.components import Options
from fedpriv.data.classes import Classes
from fedpriv.data.images import ImageForm
from fedpriv.data.partition import Indices
from fedpriv.data.records import ReadOptions, Records
from fedpriv.errors import InputError


class PredictOptions(ReadOptions):
    """Classes or numbers, from numbers or images."""

    predict: Literal["class", "number"] = Field(
        default="class", description="class: classification; number: regression"
    )
    classes: Classes = None
    mean: float | tuple[float, ...] = Field(
        default=0.0,
        description="subtracted from numbers: public, one or one for each along their first "
        "dimension",
    )
    std: float | tuple[float, ...] = Field(
        default=1.0, description="what they are then divided by: as mean"
    )
    image: ImageForm = Field(default=ImageForm(), description="what images become")

    @field_validator("std")
    @classmethod
    def _divides(cls, std: Any) -> Any:
        if min(std if isinstance(std, tuple) else (std,), default=0) <= 0:
            raise ValueError("must be above 0")
        return std


def of_a_node(options: Options, plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys of options that are not `plain`, and what held-out records decide.

    See `DataOptions.decides_users`. Which records are held out, and so what is taken from them as
    public, a server must not say of a node's users either.
    """
    values = {key: getattr(options, key, None) for key in type(options).model_fields}
    kept: dict[str, Any] = {key: values[key] for key in plain if values[key] != plain[key]}
    if values.get("held_out") is not None:
        kept["held_out"] = values["held_out"]
    read = ("shape",) if values.get("predict") == "number" else ("classes", "shape")
    kept |= {key: None for key in read if key in values and values[key] is None}
    return kept


def first_shape(records: Records, rows: Indices) -> tuple[int, ...]:
    """Return the shape of the first held-out record that can be read.

    Raises:
        InputError: there is none.
    """
    for row in rows:
        with suppress(InputError):
            return tuple(records.read(int(row))[0].shape)
    raise InputError(
        "data.shape: null takes it from the first held-out record, and none can be read here; "
        "write the shape of an input"
    )
