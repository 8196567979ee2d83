"""Which pairs of settings have no proof or no meaning: asked of the code that refuses, not listed.

A small config is changed in two places at a time, and a pair that `parse_config` or the
making of the algorithm refuses has the reason that a user would be told. Alone each is allowed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from fedpriv.config_files import parse_config
from fedpriv.errors import InputError
from fedpriv.federation.builders import build_algorithm

_SMALL: dict[str, Any] = {
    "name": "pairs",
    "rounds": 4,
    "data": {"name": "digits", "users": 60},
    "local": {"steps": 2, "lr": 0.1},
    "server": {"optimizer": "sgd"},
    "privacy": {
        "delta": 1e-3,
        "noise_multiplier": 1.0,
        "sampling": {"kind": "poisson", "expected_cohort": 8},
        "clipping": {"kind": "global", "bound": 0.1},
    },
}
_CONTROL = {"bounds": {"control": 0.5}}
_ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg_m": {},
    "scaffold": _CONTROL,
    "scaffold_m": _CONTROL,
    "fedspeed": {},
    "fednova": {"effective_steps": 2},
    "hidenseek": {},
    "hierarchical": {"edges": 2},
    "fedcompass": {"seconds": [1.0], "min_steps": 1},
    "ofvl_ms": {"tasks": ["user-1*", "user-2*", "*"]},
}
#: By the kind of setting: what each writes into the config. Those of one kind exclude each other.
_SETTINGS: dict[str, dict[str, Any]] = {
    "algorithm": {
        name: {"algorithm": {"name": name, **more}} for name, more in _ALGORITHMS.items()
    },
    "clipping": {
        "per_layer": {"privacy": {"clipping": {"kind": "per_layer", "bound": 0.1}}},
        "adaptive": {"privacy": {"clipping": {"kind": "adaptive", "bound": 0.1}}},
    },
    "sampling": {
        "fixed_size": {"privacy": {"sampling": {"kind": "fixed_size", "expected_cohort": 8}}},
        "all": {"privacy": {"sampling": {"kind": "all"}}},
        "random_allocation": {"privacy": {"sampling": {"kind": "random_allocation", "rounds": 4}}},
    },
    "mechanism": {"correlated": {"privacy": {"mechanism": {"kind": "correlated", "bands": 2}}}},
    "noise_by": {name: {"privacy": {"noise_by": name}} for name in ("nodes", "users")},
    "error_feedback": {"user": {"privacy": {"error_feedback": {"kind": "user"}}}},
    "unit": {
        "example": {
            "privacy": {"unit": "example", "example": {"sampling_rate": 0.5, "silo_size": 6}}
        }
    },
    "deployment": {"true": {"runtime": {"deployment": True}}},
    "normalize": {"dp_adam_bc": {"server": {"normalize": "dp_adam_bc"}}},
    "local": {
        "momentum": {"local": {"momentum": 0.5}},
        "adam": {"local": {"optimizer": "adam"}},
        "epochs": {"local": {"steps": None, "epochs": 1}},
    },
}


@dataclass(frozen=True)
class Pair:
    """Two settings of different kinds.

    Attributes:
        one: the first, as `kind: name`.
        two: the second.
        document: a small config with both.
        reason: why it is refused, in one line; None where it passes the config's checks.
    """

    one: str
    two: str
    document: dict[str, Any]
    reason: str | None


def pairs() -> list[Pair]:
    """Return all pairs of settings, the allowed ones too."""
    there = [
        (kind, f"{kind}: {name}", change)
        for kind, named in _SETTINGS.items()
        for name, change in named.items()
    ]
    found = []
    for (kind, one, first), (other, two, second) in combinations(there, 2):
        if kind != other:
            document = _changed(first, second)
            found.append(Pair(one, two, document, _refusal(document)))
    return found


def table() -> str:
    """Return the page `docs/refusals.md`."""
    rows = [
        f"| {pair.one} | {pair.two} | {pair.reason.replace('|', '/')} |"
        for pair in pairs()
        if pair.reason is not None
    ]
    head = (
        "# Pairs that are refused\n\n"
        "Made by `fedpriv methods --pairs` from what the code says of a small config.\n"
        "Of these settings, a pair that is not here passes the config's checks.\n\n"
        "| This | with this | is refused, because |\n| --- | --- | --- |\n"
    )
    return head + "\n".join(rows) + "\n"


def _changed(*changes: Mapping[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(_SMALL)
    for change in changes:
        _merge(document, change)
    return document


def _refusal(document: dict[str, Any]) -> str | None:
    try:
        build_algorithm(parse_config(document))
    except InputError as error:
        return " ".join(str(error).removeprefix("config: ").split())
    return None


def _merge(document: dict[str, Any], change: Mapping[str, Any]) -> None:
    for key, value in change.items():
        whole = {"sampling", "clipping", "mechanism", "algorithm", "error_feedback"}
        if isinstance(value, Mapping) and key not in whole:
            _merge(document.setdefault(key, {}), value)
        else:
            document[key] = copy.deepcopy(value)
