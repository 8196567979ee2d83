"""A config file, or a document, becomes a config, or one line that names the key that is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedpriv import yaml_text
from fedpriv.components import LookUp, Slot, slots
from fedpriv.config import ExperimentConfig
from fedpriv.errors import InputError
from fedpriv.sections import kept_path

# Parts of an error's place that are no keys: which of several kinds a value was tried as.
_KINDS = re.compile(r"int|float|str|bool|none|(tuple|literal|constrained|list)\W.*")


def load_config(
    path: Path, overrides: Sequence[str] = (), reading: bool = False
) -> ExperimentConfig:
    """Read a YAML config and apply `key.sub=value` overrides (values are YAML too).

    With `reading` it is only read, as that of a run whose code need not be there: see `LookUp`.

    Raises:
        InputError: missing or unreadable file, bad YAML, unknown key, impossible value.
    """
    document = document_of(path)
    for override in overrides:
        _apply(document, override)
    folder = path.absolute().parent
    if reading:
        return parse_config(document, LookUp(_code(document) or folder, reading=True))
    return config_beside(folder, document)


def config_beside(folder: Path, document: dict[str, Any]) -> ExperimentConfig:
    """Return the validated config of a document from a file in `folder`.

    Raises:
        InputError: one line that names the key and what is wrong with it.
    """
    config = parse_config(document, LookUp(_code(document) or folder))
    if config.code is None and any(each.origin and each.origin.folder for _, each in slots(config)):
        # For resuming: the run's own copy of the config lies elsewhere.
        return config.model_copy(update={"code": folder})
    return config


def document_of(path: Path, what: str = "config", example: str = "rounds: 60") -> dict[str, Any]:
    """Return what a YAML config, or whatever else the file is, says, unchecked.

    Raises:
        InputError: missing or unreadable file, bad YAML, or no mapping.
    """
    try:
        document = yaml_text.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the {what} ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: a {what} is a mapping of keys, such as '{example}'")
    return document


def parse_config(document: dict[str, Any], look_up: LookUp | None = None) -> ExperimentConfig:
    """Return the validated config; `look_up` says where its components are looked for.

    Without one it is the document's own `code`, and whatever it names may be imported.

    Raises:
        InputError: one line that names the key and what is wrong with it.
    """
    look_up = look_up or LookUp(_code(document))
    try:
        return ExperimentConfig.model_validate(document, context=look_up)
    except ValidationError as error:
        raise InputError(_one_line(error, document)) from None


def _code(document: dict[str, Any]) -> Path | None:
    """Return the folder of modules that a config names; what is no path is told later."""
    code = document.get("code")
    try:
        return kept_path(Path(code)) if isinstance(code, str | Path) else None
    except ValueError:
        return None


def _apply(document: dict[str, Any], override: str) -> None:
    put(document, *parsed_override(override), "--set ")


def parsed_override(override: str) -> tuple[str, Any]:
    """Return the dotted key and the value of a `key.sub=value`.

    Raises:
        InputError: it is none.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set takes key=value, such as privacy.delta=1e-6; got {override!r}")
    try:
        value = yaml_text.load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"--set {key}: {text!r} is not a YAML value") from None
    return key, value


def put(document: dict[str, Any], key: str, value: Any, who: str = "") -> None:
    """Put a value at a dotted key; sections that are missing are made.

    Raises:
        InputError: a part of the key is a value; the error begins with `who`.
    """
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        child = section.get(parent)
        if child is None:
            child = section[parent] = {}
        if not isinstance(child, dict):
            raise InputError(f"{who}{key}: {parent} is a value, not a section")
        section = child
    section[last] = value


def _one_line(error: ValidationError, document: dict[str, Any]) -> str:
    problems = _misspelt_first(error.errors())
    first = problems[0]
    parts = [str(part) for part in first["loc"]]
    key = ".".join(part for part in parts if not _KINDS.fullmatch(part)) or "config"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(first['loc'], document)}{more}"
    if first["type"] == "missing":
        return f"{key}: this key is needed{_what_it_is(first['loc'], document)}{more}"
    if first["type"] == "model_type":
        return f"{key}: {_no_section(first, document)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "component":  # which has said what it got
        return f"{key}: {message}{more}"
    message = message[0].lower() + message[1:]
    shown = "" if isinstance(first["input"], dict | BaseModel) else f", got {first['input']!r}"
    return f"{key}: {message}{shown}{more}"


def _misspelt_first(problems: list[ErrorDetails]) -> list[ErrorDetails]:
    """Put unknown keys first that are close to a needed one; that it is missing follows from it."""
    needed = {each["loc"] for each in problems if each["type"] == "missing"}
    told, implied = [], set()
    for each in problems:
        if each["type"] == "extra_forbidden":
            *parents, key = each["loc"]
            beside = {str(last): (*above, last) for *above, last in needed if above == parents}
            if near := difflib.get_close_matches(str(key), beside, n=1):
                told.append(each)
                implied.add(beside[near[0]])
    others = [each for each in problems if each not in told and each["loc"] not in implied]
    return told + others


def _what_it_is(location: Sequence[int | str], document: dict[str, Any]) -> str:
    """Return what a missing key is for; "" where it is nobody's, as an argument of a function."""
    fields = getattr(_section_at(location[:-1], document), "model_fields", {})
    about = fields.get(str(location[-1]))
    return f": {about.description}" if about is not None and about.description else ""


def _no_section(error: ErrorDetails, document: dict[str, Any]) -> str:
    """Say what to write where a section has another value."""
    *parents, last = error["loc"]
    annotation = _section_at(parents, document).model_fields[str(last)].annotation
    nothing = f", or {last}: null" if type(None) in get_args(annotation) else ""
    return f"write a section of keys{nothing}, got {error['input']!r}"


def _suggestion(location: tuple[int | str, ...], document: dict[str, Any]) -> str:
    section, key = _section_at(location[:-1], document), str(location[-1])
    if (slot := _slot_at(location[:-1], document)) is not None and (owners := slot.with_key(key)):
        name = slot.kind.name_key
        return f"; it goes with {name}: {' or '.join(owners)}; remove it, or write such a {name}"
    near = difflib.get_close_matches(key, section.model_fields, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known keys here: {', '.join(section.model_fields)}"


def _section_at(location: Sequence[int | str], document: Any) -> Any:
    """Return the class of the section at `location` of the document."""
    section: Any = ExperimentConfig
    for part in location:
        about = section.model_fields[str(part)]
        document = document.get(part) if isinstance(document, dict) else None
        slot = next((each for each in about.metadata if isinstance(each, Slot)), None)
        section = slot.options_of(document) if slot else _section_type(about.annotation)
    return section


def _slot_at(location: Sequence[int | str], document: Any) -> Slot | None:
    """Return the slot that a section is in; None for a section that is no component's."""
    if not location:
        return None
    about = _section_at(location[:-1], document).model_fields[str(location[-1])]
    return next((each for each in about.metadata if isinstance(each, Slot)), None)


def _section_type(annotation: Any) -> Any:
    """Return the section class inside an annotation such as `PrivacyConfig | None`."""
    if isinstance(annotation, type):
        return annotation
    return next(part for part in annotation.__args__ if part is not type(None))
