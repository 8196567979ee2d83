"""What configs may hold: the sections below a field, and options of data sets."""

from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedpriv.components import Slot
from fedpriv.data import DATASETS


def sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The classes of sections that the field may hold."""
    slots = [each for each in field.metadata if isinstance(each, Slot)]
    if slots:
        return list(slots[0].known())
    parts = (field.annotation, *get_args(field.annotation))
    return [p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)]


def data_options(**settings: Any) -> Any:
    """The options of a data set, by default of the digits."""
    plain = {
        key: value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
        for key, value in settings.items()
    }
    return DATASETS.parse({"name": "digits", **plain})
