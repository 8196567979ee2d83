"""The sections below a field of the config, of which a component has one for each known name."""

from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedpriv.components import Slot


def sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The classes of sections that the field may hold."""
    slots = [each for each in field.metadata if isinstance(each, Slot)]
    if slots:
        return list(slots[0].known())
    parts = (field.annotation, *get_args(field.annotation))
    return [p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)]
