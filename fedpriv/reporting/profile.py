"""Where a run's time went: a table by part, and a trace for a viewer of Chrome's trace format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedpriv.counting import numbered
from fedpriv.disk import write_whole
from fedpriv.reporting.terminal import Column, FittedTable
from fedpriv.training.spans import Span

_SERVER = "server"


class Profile:
    """Collects the spans of a run's rounds, by who did them."""

    def __init__(self) -> None:
        self._rounds = 0
        self._spans: dict[str, list[Span]] = {_SERVER: []}

    def add(self, server: Sequence[Span], workers: Sequence[Sequence[Span]]) -> None:
        """Add a round: what the server did and what each worker did."""
        self._rounds += 1
        self._spans[_SERVER] += server
        for number, spans in enumerate(workers):
            self._spans.setdefault(f"worker {number}", []).extend(spans)

    def table(self) -> FittedTable:
        """Return a table of the seconds of a mean round, a row for each part.

        What passed between asking and the last reply beside the busiest worker's work went into
        messages: packing, sending, and waking up. Meanwhile the server did some of its own.
        """
        table = FittedTable(
            Column("who", text=True, kept=True),
            Column("part", text=True, kept=True),
            Column("ms a round", kept=True),
            Column("share"),
            title=self._title(),
        )
        seconds = {who: _by_name(spans) for who, spans in self._spans.items()}
        whole = sum(seconds[_SERVER].values()) or 1.0
        for who, parts in seconds.items():
            for name, taken in parts.items():
                table.row(who, name, *self._shown(taken, whole))
        busiest = max((sum(p.values()) for who, p in seconds.items() if who != _SERVER), default=0)
        waited = _ends(self._spans[_SERVER], "wait for workers")
        waited -= _ends(self._spans[_SERVER], "draw and ask")
        table.row("between", "messages", *self._shown(max(0.0, waited - busiest), whole))
        return table

    def _title(self) -> str:
        title = f"where the time of {numbered(self._rounds, 'round')} went"
        timed = any(spans for who, spans in self._spans.items() if who != _SERVER)
        return f"{title} (workers': simulation only)" if timed else title

    def _shown(self, taken: float, whole: float) -> tuple[str, str]:
        return f"{1000 * taken / max(1, self._rounds):.1f}", f"{taken / whole:.1%}"

    def write_trace(self, path: Path) -> None:
        """Write all spans as a JSON trace, which Perfetto and Chrome's tracing page open.

        How long users' training takes says something of their data: these spans are of the
        category `simulation_only`.
        """
        events = [
            {
                "name": span.name,
                "cat": _SERVER if number == 0 else "simulation_only",
                "ph": "X",
                "pid": 0,
                "tid": number,
                "ts": 1e6 * span.start,
                "dur": 1e6 * (span.end - span.start),
            }
            for number, spans in enumerate(self._spans.values())
            for span in spans
        ]
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": who}}
            for number, who in enumerate(self._spans)
        ]
        write_whole(path, json.dumps({"traceEvents": names + events}))


def _ends(spans: Sequence[Span], name: str) -> float:
    """Return the sum of the times at which spans of that name ended."""
    return sum(span.end for span in spans if span.name == name)


def _by_name(spans: Sequence[Span]) -> dict[str, float]:
    """Return the seconds of each name, in the order of their first appearance."""
    seconds: dict[str, float] = {}
    for span in spans:
        seconds[span.name] = seconds.get(span.name, 0.0) + span.end - span.start
    return seconds
