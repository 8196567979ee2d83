"""JSON as the standard has it: no NaN and no Infinity, which many readers refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def to_json(document: Mapping[str, Any] | Sequence[Any]) -> str:
    """Return one strict JSON document: what is not a finite number is null.

    It is ASCII, which terminals and files of any encoding take as they are.
    """
    return json.dumps(strict(document), indent=2, allow_nan=False) + "\n"


def strict(value: Any) -> Any:
    """Return `value` with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
