"""Numbers and sentences as readers see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpriv.counting import numbered
from fedpriv.privacy.figures import epsilon_text

#: Stands beside each ε of a run whose sampling and noise anyone can draw again who has its config.
KNOWN_SEED = "simulation with a known seed"


#: Says what ε of a run is that `evaluation.stop_after` ended.
ENDED_EARLY = "ε is that of all rounds that it might have had, as it was promised"

#: Says what ε of a run is that a tuning chose.
CHOSEN = "ε is that of the tuning that chose it, and not of its own rounds"


#: Stands beside several runs.
ADDS_UP = (
    "Each ε is that of one run alone. What runs on the same users tell together is more: "
    "`fedpriv ledger merge` adds it up."
)


def beside_epsilon(seeded: bool) -> str:
    """Return what stands beside an ε, with a space before it; nothing for a secret seed."""
    return f" ({KNOWN_SEED})" if seeded else ""


def randomness(seeded: bool) -> str:
    """Return what ε stands beside: who could draw the noise again."""
    return KNOWN_SEED if seeded else "seeded by the operating system"


def round_ranges(rounds: Sequence[int]) -> str:
    """Return `1–5, 8` for rounds 1, 2, 3, 4, 5 and 8."""
    ranges: list[list[int]] = []
    for round_ in sorted(set(rounds)):
        if ranges and round_ == ranges[-1][1] + 1:
            ranges[-1][1] = round_
        else:
            ranges.append([round_, round_])
    return ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in ranges)


def named_rounds(rounds: Sequence[int]) -> str:
    """Return `rounds 1–5, 8`, or `round 3` for one."""
    return f"round{'s' * (len(set(rounds)) > 1)} {round_ranges(rounds)}"


def value_range(values: Sequence[float | None]) -> str:
    """Return `0.5` for equal values, `0.4–0.6` for others, and `none` where there are none."""
    present = [value for value in values if value is not None]
    if not present:
        return "none"
    low, high = f"{min(present):.6g}", f"{max(present):.6g}"
    return low if low == high else f"{low}–{high}"


def duration(seconds: float) -> str:
    """Return seconds as a reader would say them: `42.0 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def smallest(row: Mapping[str, Any]) -> tuple[float | None, str]:
    """Return the smallest ε of a metrics row and whose it is; None where there is no privacy."""
    known = {name: value for name, value in row["epsilon"].items() if value is not None}
    name = min(known, key=known.__getitem__, default="rdp")
    return known.get(name), name


def spent_text(row: Mapping[str, Any]) -> str:
    """Return ε and δ of a metrics row in a few words, and which accountant proves it."""
    epsilon, accountant = smallest(row)
    if epsilon is None:
        return "no privacy"
    shown, delta = f"{epsilon_text(epsilon)} by {accountant.upper()}", f"δ {row['delta']:g}"
    for payer in ("silo", "user", "group"):
        if f"{payer}s" in row:
            median = epsilon_text(row[f"{payer}s"]["median"])
            if accountant == "rdp":
                return f"ε of the worst {payer} {shown}, of the median one {median} by RDP, {delta}"
            # By one accountant, or the median may look worse than the worst.
            worst = epsilon_text(row["epsilon"]["rdp"])
            return (
                f"ε of the worst {payer} {shown} (RDP: {worst}, the median one {median}), {delta}"
            )
    return f"ε {shown}, {delta}"


def spent_parts(row: Mapping[str, Any], seeded: bool) -> list[str]:
    """Return what `spent_text` says in parts for a narrow line, the most important first."""
    epsilon, accountant = smallest(row)
    if epsilon is None:
        return ["no privacy"]
    sense = ", known seed" if seeded else ""
    payer = next((each for each in ("silo", "user", "group") if f"{each}s" in row), None)
    of = f" of the worst {payer}" if payer else ""
    parts = [f"ε{of} {epsilon_text(epsilon)} ({accountant.upper()}{sense})", f"δ {row['delta']:g}"]
    if payer:
        parts.append(f"median {epsilon_text(row[f'{payer}s']['median'])} (RDP{sense})")
    return parts


def missing_text(row: Mapping[str, Any]) -> str:
    """Return which nodes were missing in the round of a metrics row; empty for none."""
    counted = {"lost": row["nodes_lost"], "absent": row.get("nodes_absent", 0)}
    parts = [f"{numbered(count, 'node')} {what}" for what, count in counted.items() if count]
    if row.get("tries", 1) > 1:
        parts.append(f"tried {row['tries']} times")
    return ", ".join(parts)
