"""What all sections of a config have in common: unknown keys, numbers, and paths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)


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


#: A number above 0.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
#: A learning rate. Beyond these bounds nothing is learnt and floating point overflows.
Rate = Annotated[float, Field(gt=0, le=1e6)]

#: Every path in a config: here, and nowhere else, is decided what it means.
UserPath = Annotated[Path, AfterValidator(user_path)]


def kept_path(path: Path) -> Path:
    """Return `path` as any working directory understands it: see `user_path`.

    A run that is resumed elsewhere must not read other files, which are other people's.
    """
    return user_path(path).absolute()


#: A path that a run's own config keeps, for those who go on with the run.
KeptPath = Annotated[Path, AfterValidator(kept_path)]


#: Marks a field that bears on nothing that a run releases: `Annotated[int, NO_BEARING]`.
NO_BEARING = object()


class Section(BaseModel):
    """A part of the config: unknown keys are errors, numbers are finite, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def bearing(self) -> dict[str, Any]:
        """Return the values that bear on what a run releases, as far as they are no defaults.

        A key that comes later, with a default, leaves the values of earlier configs as they are.
        """
        kept = dict[str, Any](self.model_extra or {})
        for name, about in type(self).model_fields.items():
            value, default = getattr(self, name), about.get_default(call_default_factory=True)
            if any(each is NO_BEARING for each in about.metadata) or alike(value, default):
                continue
            inner = value.bearing() if isinstance(value, Section) else value
            # A section that there need not be says something by being there.
            if inner != {} or default is None:
                kept[name] = inner
        return kept

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return refuse_truth(value, cls.model_fields[info.field_name].annotation)


def alike(value: Any, default: Any) -> bool:
    """Say whether a config would say the same of both: YAML has lists alone, and no tuples."""
    return bool(_listed(value) == _listed(default))


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_listed(each) for each in value]
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return value


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
