"""Local learning rates of single layers, as pre-trained models are tuned with.

Block h of a user's model moves by m_h·η where others move by η: m_h comes of patterns of names, of
a decay from the last layer to the first (Howard and Ruder 2018, section 3.2: ηˡ⁻¹ = ηˡ/2.6; Clark
et al. 2020, 0.8 a layer), or of both. All of it follows from the config and the parameters' names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from fedpriv.errors import InputError

_LARGEST = 1e12
# What a layer of many is called up to its number: "blocks.3." of "blocks.3.mlp.up.weight".
_NUMBERED = re.compile(r"^(.*?\.)?\d+\.")


def layer_multipliers(
    patterns: Mapping[str, float], decay: float | None, names: Sequence[str]
) -> tuple[float, ...]:
    """Return m_h for each of the blocks called `names`; empty where all are 1.

    `patterns` say what the names that match them are multiplied by: of several that match a name,
    all count. With `decay` ρ a block of layer l of L, counted from 1, has ρ^(L+1-l) on top: what
    comes before the first numbered layer is layer 0, and what comes after it without a number, as
    the head, layer L+1.

    Raises:
        InputError: a pattern matches nothing, no layer has a number to decay by, or an m_h is so
            small or large that no arithmetic can be trusted to undo it.

    >>> layer_multipliers({"head.*": 3.0}, 0.5, ["embed", "blocks.0.w", "blocks.1.w", "head.bias"])
    (0.125, 0.25, 0.5, 3.0)
    """
    found = [1.0] * len(names)
    for pattern, factor in patterns.items():
        matches = [place for place, name in enumerate(names) if fnmatchcase(name, pattern)]
        if not matches:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0) or names
            raise InputError(
                f"local.multipliers: no parameter that is trained matches {pattern!r}; there are, "
                f"for example, {', '.join(close[:3])}"
            )
        for place in matches:
            found[place] *= factor
    if decay is not None:
        depths = _depths(names)
        found = [m * decay ** (max(depths) - depth) for m, depth in zip(found, depths, strict=True)]
    for name, m in zip(names, found, strict=True):
        if not 1 / _LARGEST <= m <= _LARGEST:
            raise InputError(
                f"{'local.multipliers' if decay is None else 'local.layer_decay'}: {name} would "
                f"learn at {m:.3g} times the rate, by all that match it; write what comes to "
                f"{1 / _LARGEST:g} to {_LARGEST:g}"
            )
    return () if all(m == 1 for m in found) else tuple(found)


def _depths(names: Sequence[str]) -> list[int]:
    """Return the layer of each block: 0 before the first numbered one, L+1 for what follows."""
    numbered = [match and match.group() for match in map(_NUMBERED.match, names)]
    layers = list(dict.fromkeys(layer for layer in numbered if layer))
    if not layers:
        raise InputError(
            "local.layer_decay: no layer of this model has a number in its parameters' names, so "
            "that nothing says which comes first; write local.multipliers"
        )
    first = numbered.index(layers[0])
    return [
        layers.index(layer) + 1 if layer else (0 if place < first else len(layers) + 1)
        for place, layer in enumerate(numbered)
    ]
