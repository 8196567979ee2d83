"""Whether lines are missing at the end of a ledger: what lies beside it says what was finished.

A chain of hashes shows edits, and nothing of lines that were cut off at its end. Checkpoints, the
memory store and metrics are written after the charge of their round. So a ledger that lacks a round
which one of them shows has lost lines, and its ε is too small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedpriv.counting import numbered
from fedpriv.privacy.ledger import Release
from fedpriv.reporting.run_directory import RunDirectory
from fedpriv.training.checkpoint import checkpoint_files
from fedpriv.training.memory_store import finished_round

_CHECKPOINTS, _MEMORY, _METRICS = "checkpoints", "memory", "metrics.jsonl"


@dataclass(frozen=True)
class Evidence:
    """What lies beside a ledger.

    Attributes:
        finished: the last finished round, by what says so: checkpoints, memory, metrics.jsonl.
        sealed: by checkpoint, how many lines the ledger had then, and the hash of the last.
    """

    finished: Mapping[str, int] = field(default_factory=dict)
    sealed: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def independent(self) -> bool:
        """Whether there is more than metrics, which are text and cut as easily as a ledger."""
        return _CHECKPOINTS in self.finished or _MEMORY in self.finished

    def unpaid(self, releases: Iterable[Release], hashes: Sequence[str]) -> tuple[str, ...]:
        """Return what a ledger of these releases, with the hash of each, lacks: a sentence each."""
        charged = {release.round for release in releases}
        found = [
            f"The ledger charges nothing for round {min(unpaid)}, which is finished, as is all up "
            f"to round {last} by {source}: lines are missing at its end, and without them the "
            "run's ε is unknown."
            for source, last in self.finished.items()
            if (unpaid := set(range(1, last + 1)) - charged)
        ]
        found += [
            f"When {name} was written the ledger had {numbered(count, 'line')}, other than what "
            "it has now: lines have been cut off or written anew."
            for name, (count, last_hash) in self.sealed.items()
            if last_hash not in hashes[count - 1 : count]
        ]
        return tuple(found)

    def missing(self, releases: Iterable[Release], hashes: Sequence[str]) -> tuple[str, ...]:
        """Return what the ledger, or the metrics, lack: a sentence each."""
        found = list(self.unpaid(releases, hashes))
        known = max((n for source, n in self.finished.items() if source != _METRICS), default=0)
        if known > self.finished.get(_METRICS, 0):
            found.append(
                f"metrics.jsonl lacks round {known}, which is finished: lines are missing at its "
                "end."
            )
        return tuple(found)

    def sentence(self) -> str:
        """Return what was checked where nothing is missing."""
        seen = ", ".join(f"{name} (round {last})" for name, last in self.finished.items())
        if not self.independent:
            beside = f" beyond {seen}" if seen else ""
            return (
                "Whether lines are missing at its end CANNOT be checked: there are no checkpoints "
                f"beside it, and nothing else that shows what was finished{beside}."
            )
        return (
            f"It charges every round that is finished, by {seen}. A charge of a round that was "
            "never finished would not be missed."
        )


#: Of a ledger with nothing beside it.
NO_EVIDENCE = Evidence()


def read_evidence(folder: Path) -> Evidence:
    """Read what lies beside the ledger in `folder`.

    It is to be read before the ledger, which is the first to know of a round.

    Raises:
        InputError: metrics are there and are none.
    """
    directory = RunDirectory(folder)
    finished, sealed = dict[str, int](), dict[str, tuple[int, str]]()
    for path in checkpoint_files(directory.checkpoints):
        finished[_CHECKPOINTS] = int(path.stem.removeprefix("round-"))
        if (seal := _seal(path)) is not None:
            sealed[f"{_CHECKPOINTS}/{path.name}"] = seal
    if (round_ := finished_round(directory.memory)) is not None:
        finished[_MEMORY] = round_
    if rows := directory.read_metrics():
        finished[_METRICS] = max(row["round"] for row in rows)
    return Evidence(finished, sealed)


def _seal(path: Path) -> tuple[int, str] | None:
    """Return how many lines the ledger had when a checkpoint was written, and the last hash."""
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
        return int(said["ledger_lines"]), said["ledger"]
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
