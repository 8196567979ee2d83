"""How far a measure of a sample may be from that of all examples like it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: The confidence of every interval here.
CONFIDENCE = 0.95
# The quantile of the standard normal for it, and how often a bootstrap draws.
_Z, _DRAWS = 1.959964, 2000
# Fewer say nothing of how much they differ.
_LEAST = 10


def wilson(right: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a probability of which `right` of `count` trials came true.

    It is Wilson's (1927): (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n).

    >>> [round(bound, 4) for bound in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    share, spread = right / count, _Z**2 / count
    middle = share + spread / 2
    reach = _Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = (middle - reach) / (1 + spread), (middle + reach) / (1 + spread)
    return max(0.0, low), min(1.0, high)


def bootstrap(errors: Sequence[int], sizes: Sequence[int]) -> tuple[float, float] | None:
    """Return the 95% interval of Σ errors / Σ sizes by drawing items again (Efron 1979).

    It is the percentile interval of 2,000 draws, which are the same for the same numbers. None
    where there are fewer than 10 items.
    """
    count = len(sizes)
    if count < _LEAST:
        return None
    generator = np.random.Generator(np.random.PCG64(0))
    weights = generator.multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    drawn, among = weights @ np.asarray(errors), weights @ np.asarray(sizes)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn[among > 0] / among[among > 0], [tail, 100 - tail])
    return float(low), float(high)
