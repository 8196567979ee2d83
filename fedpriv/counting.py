"""Numbers of things in words, of which one is no several."""

from __future__ import annotations

from collections.abc import Sequence


def numbered(count: float, noun: str, plural: str = "") -> str:
    """Return a number of things: `1 round`, `1,500 rounds`; `plural` where an s will not do."""
    return f"{count:,.15g} {noun if count == 1 else plural or f'{noun}s'}"


def in_words(sizes: Sequence[int], noun: str) -> str:
    """Return how many users have how many of what each, in words."""
    low, high = min(sizes, default=0), max(sizes, default=0)
    each = numbered(high, noun) if low == high else f"{low} to {numbered(high, noun)}"
    if len(sizes) == 1:
        return f"1 user with {each}"
    return f"{numbered(len(sizes), 'user')} with {each} each, {sum(sizes)} in all"
