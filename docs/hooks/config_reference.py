"""Writes the page of all keys of a config when the site is built, from the classes that check them.

`mkdocs.yml` names this file as a hook; `python docs/hooks/config_reference.py` prints the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

PAGE = "reference/config.md"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
INTRODUCTION = """# Config reference

Every key of a config, with its default and bounds, written from the classes that check a config.
`fedpriv config schema` prints the same as a JSON schema, `fedpriv config show CONFIG` fills in all
defaults of a config, and `fedpriv methods` lists what can be named, with sources.

A section with a `name` or `kind` takes the options of the component that it names; for one of your
own (`package.module:object`) these are its keyword arguments: see
[Adding your own](../extending.md). On the command line, `--set local.lr=0.05` sets one key.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those of the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """Return the page in Markdown."""
    from fedpriv.config import ExperimentConfig

    whole = ExperimentConfig.model_json_schema()
    return "\n".join([INTRODUCTION, *_section("", whole, whole.get("$defs", {}))]) + "\n"


def _section(path: str, schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of an object, and then the objects within it, each under its own heading."""
    yield f"\n## {f'`{path}`' if path else 'At the top'}\n"
    yield f"{schema.get('description', '')}\n"
    yield from _table(schema, defs)
    yield from _inner(path, schema, defs)


def _inner(path: str, schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[str]:
    """Yield what lies below the keys of an object: components, or a section."""
    from fedpriv.components import KINDS

    for key, value in schema.get("properties", {}).items():
        below = f"{path}.{key}" if path else key
        if below in KINDS and KINDS[below].registered:
            yield from _components(below, value.get("description", ""))
            continue
        for each in _alternatives(value, defs):
            if "properties" in each:
                yield from _section(below, each, defs)


def _components(path: str, description: str) -> Iterator[str]:
    """Yield what can be named at `path`, each with its options."""
    from fedpriv.components import KINDS

    kind = KINDS[path]
    yield f"\n## `{path}`\n"
    yield f"{description}\n"
    for name in sorted(kind.registered):
        schema = kind.find(name).options.model_json_schema()
        defs = schema.get("$defs", {})
        yield f"\n### `{path}: {{{kind.name_key}: {name}}}`\n"
        yield from _table(schema, defs)
        yield from _within("", schema, defs)


def _within(path: str, schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sections among a component's options, however deep."""
    for key, value in schema.get("properties", {}).items():
        below = f"{path}.{key}" if path else key
        for each in _alternatives(value, defs):
            if "properties" in each:
                yield f"\nWithin `{below}`: {each.get('description', '')}\n"
                yield from _table(each, defs)
                yield from _within(below, each, defs)


def _table(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    needed = schema.get("required", [])
    for key, value in schema.get("properties", {}).items():
        default = "needed" if key in needed else _default(value)
        meaning = _outside_code(value.get("description", ""))
        cells = [f"`{key}`", _values(value, defs), default, meaning]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _outside_code(text: str) -> str:
    """Return a text whose <...> is no tag, except in its code, where it is none anyway."""
    parts = text.split("`")
    return "`".join(p if i % 2 else p.replace("<", "&lt;") for i, p in enumerate(parts))


def _default(value: Mapping[str, Any]) -> str:
    default = value.get("default")
    if isinstance(default, dict) and default:
        return "see below"
    return f"`{json.dumps(default, ensure_ascii=False)}`" if "default" in value else ""


def _values(value: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """Return in words what a key takes."""
    said = [_value(each, defs) for each in _alternatives(value, defs)]
    return " or ".join(dict.fromkeys(text for text in said if text))


def _value(value: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    if "enum" in value:
        return ", ".join(f"`{json.dumps(each).strip(chr(34))}`" for each in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value.get("type") == "array":
        inner = _values(value.get("items", {}), defs)
        return f"list of {inner}" if inner else "list"
    name = {"object": "section", "string": "text", "boolean": "`true`, `false`"}
    text = name.get(value.get("type", ""), value.get("type", ""))
    if value.get("format") == "path":
        text = "path"
    bounds = [f"{sign} {_bound(value[word])}" for word, sign in BOUNDS.items() if word in value]
    return " ".join([text, ", ".join(bounds)]).strip()


def _bound(value: float) -> str:
    """Return a bound as short as it is exact: 2^63, and not 9.22337e+18."""
    power = int(value).bit_length() - 1
    return f"2^{power}" if power > 20 and value == 2**power else f"{value:g}"


def _alternatives(value: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the schemas that a value may follow, with references followed."""
    if "$ref" in value:
        value = defs[value["$ref"].rpartition("/")[2]]
    if "anyOf" not in value:
        yield value
    for each in value.get("anyOf", []):
        yield from _alternatives(each, defs)


if __name__ == "__main__":
    print(page(), end="")
