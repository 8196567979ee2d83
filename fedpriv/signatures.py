"""What a function or class says of its arguments, which become options."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, create_model

from fedpriv.errors import InputError
from fedpriv.sections import KeptPath

#: What YAML can hold that is not made of others.
PLAIN = (type(None), bool, int, float, str)


def parameters_of_call(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the arguments of a component.

    Raises:
        InputError: they cannot be known.
    """
    try:
        return dict(inspect.signature(make).parameters)
    except (TypeError, ValueError):
        raise InputError(f"{make!r} does not say which arguments it takes; wrap it") from None


def types_of(make: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of the arguments, as far as they can be found."""
    told = make.__init__ if inspect.isclass(make) else make
    if not isinstance(told, types.FunctionType | types.MethodType) and not callable(told):
        return {}
    try:
        return typing.get_type_hints(told, include_extras=True)
    except Exception:  # an annotation may be any expression, and so raise anything
        pass
    # One that is known to type checkers alone says nothing of the others.
    found: dict[str, Any] = {}
    for name, hint in getattr(told, "__annotations__", {}).items():
        one = types.SimpleNamespace(__annotations__={name: hint})
        with suppress(Exception):
            found |= typing.get_type_hints(
                one, getattr(told, "__globals__", {}), include_extras=True
            )
    return found


def can_be_checked(annotation: Any) -> bool:
    """Say whether values can be checked against an annotation: all that it names is known."""
    if annotation is Any or annotation in PLAIN:
        return True
    try:
        # Of arbitrary types, as options are.
        told = ConfigDict(arbitrary_types_allowed=True)
        return create_model("one", __config__=told, one=(annotation, ...)).__pydantic_complete__
    except Exception:  # as types_of, of what lies in classes that it is made of
        return False


def kept(annotation: Any) -> Any:
    """Return the annotation with paths as a run keeps them, whichever folder it is resumed in."""
    if annotation is Path:
        return KeptPath
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(kept, typing.get_args(annotation)))]  # noqa: UP007
    return annotation


def is_plain(value: Any) -> bool:
    """Say whether YAML can hold it."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, [*value, *value.values()]))
    return isinstance(value, (*PLAIN, Path))
