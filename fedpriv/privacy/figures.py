"""Privacy figures as readers see them: rounded up, never to look better than they are."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal

# From here on ε is a power of ten to the reader.
_SCIENTIFIC_FROM = 1e4


def epsilon_text(epsilon: float | None, digits: int = 3) -> str:
    """Return ε as it is printed everywhere.

    `none` where there is no privacy, a dash where it is not known.
    """
    if epsilon is None:
        return "–"
    if math.isinf(epsilon):
        return "none"
    if epsilon >= _SCIENTIFIC_FROM:
        return significant_up(epsilon, digits + 1)
    return rounded_up(epsilon, digits)


def rounded_up(value: float, digits: int = 3) -> str:
    """Return `value`, which must be finite, with `digits` decimals, rounded towards infinity."""
    if value > 2**52:
        return significant_up(value, digits + 1)
    # The shortest decimal that is this float, so that 0.1 does not become 0.101.
    exact = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING)
    return f"{exact:,.{digits}f}"


def significant_up(value: float, digits: int) -> str:
    """Return `value` in scientific notation with `digits` digits, rounded towards infinity."""
    exact = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(float(value)))
    return f"{exact:.{digits - 1}e}"


def percent_up(share: float) -> str:
    """Return a share in percent with two decimals, rounded up, and at most 100%."""
    percent = min(Decimal(100), 100 * Decimal(repr(float(share))))
    return rounded_up(float(percent), 2 if share < 0.1 else 1) + "%"
