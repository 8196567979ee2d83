"""YAML 1.2's core schema, read and written: PyYAML's own is 1.1.

There `yes` and `on` are truth values, `010` is 8, `1:30` is 90, `1_000` is 1000, and `1e-6` is no
number. Here what is not written as true, false, null or a plain number is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_NUMBER_STARTS = list("-+0123456789")
# The tag of a plain scalar, how it is written, and its first characters.
_CORE: list[tuple[str, str, list[str]]] = [
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", _NUMBER_STARTS),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*_NUMBER_STARTS, "."],
    ),
    ("merge", "<<", ["<"]),
]


class _Loader(yaml.SafeLoader):
    """Reads the core schema, and refuses a key that is written twice: the last one would win."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]} is written twice")
        return super().construct_mapping(node, deep)

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        text = node.value
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that YAML 1.1 or the core schema would read as something else."""


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _starts in _CORE:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _starts
        )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)


def load(text: str) -> Any:
    """Return what `text` says.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


def dump(document: Any) -> str:
    """Return `document` as YAML that `load`, and readers of YAML 1.1 too, read as it is."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
