"""What a tracker is, and which numbers of a run it may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from fedpriv.errors import InputError
from fedpriv.failures import failure_of
from fedpriv.imports import command_for
from fedpriv.trackers.registry import TRACKERS, TrackerOptions

PRIVATE = "simulation_only"
"""The key of a row of metrics under which stands what no mechanism released."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker may ask for, as its argument `run`, when it is made.

    Attributes:
        name: the experiment's.
        folder: the run's own directory; what a tracker keeps there it finds again on resume.
        settings: the config, with dotted keys.
        finished_rounds: those that it has heard of already, where the run goes on.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    finished_rounds: int = 0


class Tracker(Protocol):
    """Something that keeps numbers by round."""

    def log(self, numbers: Mapping[str, float], round_: int) -> None:
        """Keep the numbers of a finished round; names are paths, such as `epsilon/rdp`."""

    def close(self) -> None:
        """Nothing more will come; the run may be finished, stopped or interrupted."""


class Tracking:
    """Hands the numbers of finished rounds to a tracker, if there is one.

    A tracker that fails costs no round: the run says so once, and goes on without it.
    """

    # Made before the first round: what cannot start raises InputError there.
    def __init__(
        self, options: TrackerOptions | None, run: TrackedRun, say: Callable[[str], None]
    ) -> None:
        self._options, self._say = options, say
        self._tracker: Tracker | None = None
        if options is not None:
            self._tracker = _started(options, run)

    def finished(self, row: Mapping[str, Any]) -> None:
        """Pass on the numbers of a row of metrics."""
        if self._tracker is None or self._options is None:
            return
        numbers = dict(numbers_of(row, self._options.simulation_only))
        try:
            self._tracker.log(numbers, row["round"])
        except Exception as error:  # a server may be away, a disk full
            self._give_up(error)

    def close(self) -> None:
        """Let the tracker finish."""
        if self._tracker is None:
            return
        try:
            self._tracker.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        assert self._options is not None
        self._tracker = None
        self._say(
            f"tracker: {self._options.name} failed and hears no more of this run, whose own "
            f"metrics go on ({failure_of(error)})"
        )


def _started(options: TrackerOptions, run: TrackedRun) -> Tracker:
    """Return the tracker of `options`.

    Raises:
        InputError: it cannot start; nothing has been trained.
    """
    try:
        return cast(Tracker, TRACKERS.of(options).build(options, run=run))
    except InputError:
        raise
    except ImportError as error:
        command = command_for(error.name or "") or "install it"
        raise InputError(
            f"tracker.name: {options.name} needs {error.name}: {command}, or write tracker: null"
        ) from None
    except Exception as error:  # whatever its library raises
        raise InputError(
            f"tracker.name: {options.name} cannot start ({failure_of(error)}); mend that, or write "
            "tracker: null"
        ) from None


def settings_of(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config that say something, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            found |= settings_of(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + key] = value
    return found


def numbers_of(row: Mapping[str, Any], private: bool) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a row of metrics by path, of what is private only if asked.

    >>> dict(numbers_of({"epsilon": {"rdp": 2.5}, "simulation_only": {"loss": 1.0}}, False))
    {'epsilon/rdp': 2.5}
    """
    for key, value in row.items():
        if key == PRIVATE and not private:
            continue
        if isinstance(value, Mapping):
            for inner, number in numbers_of(value, private):
                yield f"{key}/{inner}", number
        elif isinstance(value, int | float) and key != "round" and math.isfinite(value):
            yield key, float(value)
