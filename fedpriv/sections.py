"""What all sections of a config have in common: unknown keys, numbers, and paths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator


def user_path(path: Path) -> Path:
    """Return `path` as the user means it: `~` at its beginning is their home.

    Raises:
        ValueError: there is no such home, or no file can have this name.
    """
    if "\0" in str(path):
        raise ValueError("no path holds a NUL character")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("there is no such home folder; write the path in full") from None


#: Every path in a config: here, and nowhere else, is decided what it means.
UserPath = Annotated[Path, AfterValidator(user_path)]


def kept_path(path: Path) -> Path:
    """Return `path` as any working directory understands it: see `user_path`.

    A run that is resumed elsewhere must not read other files, which are other people's.
    """
    return user_path(path).absolute()


#: A path that a run's own config keeps, for those who go on with the run.
KeptPath = Annotated[Path, AfterValidator(kept_path)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, numbers are finite, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return refuse_truth(value, cls.model_fields[info.field_name].annotation)


def refuse_truth(value: Any, annotation: Any) -> Any:
    """Return `value`, unless it is, or lists, a truth value where numbers are wanted.

    To Python true is the number 1, so that pydantic would take it for one.

    Raises:
        ValueError: it is no number.
    """
    wanted = _leaves(annotation)
    if bool not in wanted and wanted & {int, float} and _holds_truth(value):
        raise ValueError("true and false are no numbers")
    return value


def _leaves(annotation: Any) -> set[Any]:
    """Return the types that an annotation such as `tuple[float, ...] | None` is made of."""
    inner = get_args(annotation)
    return set().union(*map(_leaves, inner)) if inner else _hashable(annotation)


def _hashable(annotation: Any) -> set[Any]:
    return set() if isinstance(annotation, list) else {annotation}


def _holds_truth(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_truth, value))
    return isinstance(value, bool)
