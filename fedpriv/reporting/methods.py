"""What there is to choose from: every component that a config can name, with its source.

Nothing is listed by hand: names come from the kinds' own registries, options from the classes that
check them, and refusals from the tables that refuse.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, dataclass
from typing import Any

from fedpriv.algorithms.registry import ALGORITHMS
from fedpriv.components import KINDS, Kind, Options
from fedpriv.config import ExperimentConfig
from fedpriv.errors import InputError
from fedpriv.optimizers.kinds import OPTIMIZERS
from fedpriv.optimizers.memory import numbers_kept
from fedpriv.optimizers.normalize import NORMALIZERS

_CITED = re.compile(r"\b((?:[A-Z][\w'-]+ (?:et al\.|and [A-Z][\w'-]+),? )(?:19|20)\d\d)\b")
#: Sources of what has no docstring of its own to say so.
_KNOWN = {
    ("local.optimizer", "adam"): "Kingma and Ba 2015",
    ("local.optimizer", "adamw"): "Loshchilov and Hutter 2019",
    ("model", "vit"): "Dosovitskiy et al. 2021",
    ("privacy.clipping", "adaptive"): "Andrew et al. 2021",
    ("privacy.clipping", "global"): "Abadi et al. 2016",
    ("privacy.clipping", "per_layer"): "McMahan et al. 2018; normalize: Pelikan et al. 2025",
}
OURS = "ours"
_CONFIG = ExperimentConfig  # whose sections make all kinds known


@dataclass(frozen=True)
class Method:
    """One component that a config can name.

    Attributes:
        key: where a config names it.
        name: its name.
        reference: its source, or `OURS`.
        says: the first line of its documentation.
        options: its own options, each with its default; "needed" for none.
        refused: why it cannot be chosen; "" where it can.
        memory: what is kept between rounds, in numbers for each parameter of a square matrix
            (of 64 rows, where it is counted in a server's state); "" where nothing is.
    """

    key: str
    name: str
    reference: str
    says: str
    options: dict[str, str]
    refused: str = ""
    memory: str = ""

    def document(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def methods(kind: str | None = None, refusals: bool = False) -> list[Method]:
    """Return the components of a kind, named by its key or the end of it; None for all kinds.

    With `refusals` they are those that are refused, each with its reason.

    Raises:
        InputError: there is no such kind.
    """
    keys = [key for key, found in KINDS.items() if found.registered or found is OPTIMIZERS]
    chosen = [key for key in keys if kind in (None, key, key.rpartition(".")[2])]
    if not chosen:
        raise InputError(f"methods: no kind {kind!r}; there are {', '.join(sorted(keys))}")
    found = [method for key in sorted(chosen) for method in _of(KINDS[key])]
    return [method for method in found if bool(method.refused) == refusals]


def _of(kind: Kind) -> list[Method]:
    if kind is OPTIMIZERS:
        return _optimizers()
    refused = [Method(kind.key, name, name, "", {}, why) for name, why in kind.refused.items()]
    return [_method(kind, name) for name in sorted(kind.registered)] + refused


def _method(kind: Kind, name: str) -> Method:
    component = kind.find(name)
    says = inspect.getdoc(component.make) or ""
    fields = component.options.model_fields
    own = {key: _default(fields[key]) for key in fields if key not in _base_of(kind).model_fields}
    return Method(
        kind.key,
        name,
        _reference(kind, name, says),
        says.partition("\n")[0],
        own,
        memory=_memory(kind, name),
    )


def _memory(kind: Kind, name: str) -> str:
    if kind is NORMALIZERS:
        return _at_server(numbers_kept(normalize=name))
    if kind is ALGORITHMS:
        made: Any = kind.find(name).make
        if made.rows:
            return f"{made.rows} at the server"
        kept = _at_server(numbers_kept(shared=len(made.shared), signs=made.signs))
        return ", ".join(filter(None, (kept, "1 at each user" if made.keeps else "")))
    if (kind.key, name) == ("privacy.mechanism", "correlated"):
        return "bands - 1 at the server (float64), of blt as many as buffers"
    return ""


def _at_server(numbers: float) -> str:
    return f"{numbers:.3g} at the server" if numbers else ""


def _base_of(kind: Kind) -> type[Options]:
    module, _, path = kind.base.partition(":")
    found: type[Options] = getattr(__import__(module, fromlist=["_"]), path)
    return found


def _reference(kind: Kind, name: str, says: str) -> str:
    make = kind.find(name).make
    cited = getattr(make, "cite", "") or _KNOWN.get((kind.key, name), "")
    where = inspect.getmodule(make)
    alone = [n for n in kind.registered if inspect.getmodule(kind.find(n).make) is where]
    texts = [says, inspect.getdoc(where) or "" if len(alone) == 1 else ""]
    found = next((match.group(1) for match in map(_CITED.search, texts) if match), OURS)
    return cited or found


def _default(field: Any) -> str:
    return "needed" if field.is_required() else str(field.get_default(call_default_factory=True))


def _optimizers() -> list[Method]:
    """Return the server's optimizers: those of two libraries, and what of them is refused."""
    from fedpriv.optimizers.registry import (
        UNSUITABLE,
        available_optimizers,
        library_of,
        optimizer_options,
    )

    key = OPTIMIZERS.key
    there = [
        Method(
            key,
            name,
            library_of(name),
            "",
            dict.fromkeys(optimizer_options(name), ""),
            memory=_at_server(numbers_kept(name)),
        )
        for name in available_optimizers()
    ]
    return there + [
        Method(key, name, library_of(name), "", {}, reason) for name, reason in UNSUITABLE.items()
    ]
