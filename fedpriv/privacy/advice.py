"""What every command says of a δ or an ε that promises little."""

from __future__ import annotations

import math

from fedpriv.privacy.figures import epsilon_text

#: The tiers of Ponomareva et al. 2023, section 5.2: up to the first ε is strong, up to the second
#: reasonable.
STRONG, REASONABLE = 1.0, 10.0
#: From this share of 1/N on, δ allows what nobody would call private.
LARGE_DELTA = 0.1


def delta_advice(delta: float, population: int, whose: str = "population") -> str | None:
    """Return what to know of `delta` for a `population`; None where it is well below 1/N."""
    if delta >= 1 / population:
        return (
            f"δ = {delta:g} is not below 1/{whose} = {1 / population:.3g}: it allows to publish "
            "somebody's data in every run, and a run refuses it"
        )
    if delta * population <= LARGE_DELTA:
        return None
    return (
        f"δ = {delta:g} is {delta * population:.3g} times 1/{whose}: it allows to publish "
        "somebody's data outright with about this probability; write at most "
        f"{LARGE_DELTA / population:.1g}"
    )


def epsilon_advice(epsilon: float, beside: str = "") -> str | None:
    """Return what to know of `epsilon`; None where it is reasonable, or no privacy is claimed.

    `beside` is what has to stand beside it.
    """
    if epsilon <= REASONABLE or math.isinf(epsilon):
        return None
    return (
        f"ε = {epsilon_text(epsilon)}{beside} is above {REASONABLE:g}: weak to none as a formal "
        "promise (Ponomareva et al. 2023); it needs an audit beside it"
    )
