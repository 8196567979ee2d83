"""A node's own ledger: which of its users took part in what, kept across runs and restarts.

A server keeps a ledger too, which the node does not have to believe. This file is the node's: one
JSON object a line, each with the hash of the line before it, and on the disk (fsync) before a user
that it charges is trained. So a reply that leaves has been charged, and what was charged and never
left counts as well. ε of a user is an upper bound: it has no amplification by the sampling of
users, for whoever draws them is not trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from fedpriv.disk import fsync, lock
from fedpriv.errors import DamagedFile, EnvironmentFault

VERSION = 1
_SECONDS_FOR_THE_LOCK = 60.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Participation:
    """What one round costs a user, or each example of a silo, that takes part in it.

    Attributes:
        noise_multiplier: z over the sensitivity C; of silos that of each step.
        sampling_rate: of silos, q of each step, whose coins the node itself throws; else None.
        steps: of silos, the steps of a round; else None.
    """

    noise_multiplier: float
    sampling_rate: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Limits:
    """What a user may take part in, over all runs.

    Attributes:
        rounds: the most rounds.
        epsilon: the largest ε by RDP; None for any.
        delta: the δ at which it holds.
        exchanged: whether a user's data may be exchanged for other data, so that its contribution
            moves by 2C and not by C.
        in_run: the most rounds of one run; None for any.
    """

    rounds: int
    epsilon: float | None = None
    delta: float = 0.0
    exchanged: bool = False
    in_run: int | None = None

    def allow(self, past: Mapping[Participation, int], next_one: Participation) -> bool:
        """Say whether somebody who took part so often may take part once more."""
        if sum(past.values()) >= self.rounds:
            return False
        if self.epsilon is None:
            return True
        counts = Counter(past) + Counter({next_one: 1})
        spent = _epsilon(frozenset(counts.items()), self.delta, self.exchanged)
        return spent <= self.epsilon


@lru_cache(maxsize=4096)
def _epsilon(counts: frozenset[tuple[Participation, int]], delta: float, exchanged: bool) -> float:
    # Imported where somebody asks for ε: it takes a second, in each of a node's processes.
    import dp_accounting

    from fedpriv.privacy.accounting import RdpAccountant
    from fedpriv.privacy.example_level import steps_event
    from fedpriv.privacy.sampling import Adjacency

    accountant = RdpAccountant(Adjacency.ADD_OR_REMOVE_ONE)
    for each, times in counts:
        if each.sampling_rate is not None and each.steps is not None:
            event = steps_event(each.noise_multiplier, each.sampling_rate, each.steps)
        else:
            # An unsampled Gaussian, whose cost depends on noise over sensitivity alone.
            event = dp_accounting.GaussianDpEvent(each.noise_multiplier / (1 + exchanged))
        accountant.compose(event, times)
    return float(accountant.epsilon(delta))


@dataclass(frozen=True)
class NodeLedger:
    """The ledger file of a node; each charge reads it anew, for a node has many processes.

    Attributes:
        path: the file; it is made with the first charge, for its owner alone to read.
        unit: whom its lines charge, user or example: the two do not add up.
    """

    path: Path
    unit: str = "user"

    def charge(
        self,
        user_ids: Sequence[str],
        participation: Participation,
        limits: Limits,
        **about: int | float,
    ) -> list[int]:
        """Charge those of `user_ids` whose limits allow it, and return their places in the list.

        When this returns, the line is on the disk. `about` says for what it is, such as the round.

        Raises:
            DamagedFile: lines of the ledger are edited, dropped or of another kind.
            EnvironmentFault: it cannot be written.
        """
        with self._locked() as file:
            return self._charge(file, user_ids, participation, limits, about)

    def check(self) -> int:
        """Return how many charges are on the disk; nothing is charged.

        Raises:
            DamagedFile, EnvironmentFault: as `charge`.
        """
        with self._locked() as file:
            if not (lines := self._lines(file)):
                return 0
            self._read(lines)
            return len(lines) - 1

    def _charge(
        self,
        file: IO[bytes],
        user_ids: Sequence[str],
        participation: Participation,
        limits: Limits,
        about: dict[str, int | float],
    ) -> list[int]:
        lines = self._lines(file)
        if not lines:
            header = {"kind": "header", "version": VERSION, "unit": self.unit}
            lines = [self._append(file, {**header, "salt": secrets.token_hex(32)}, "")]
            fsync(self.path.parent)
        salt, pasts = self._read(lines)
        digests = [_digest(salt, user_id) for user_id in user_ids]
        in_run: Counter[str] = Counter()
        if limits.in_run is not None:
            for line in lines[1:]:
                in_run.update(line["users"] if line.get("run") == about.get("run") else ())
        allowed = [
            place
            for place, digest in enumerate(digests)
            if limits.in_run is None or in_run[digest] < limits.in_run
            if limits.allow({each: past[digest] for each, past in pasts.items()}, participation)
        ]
        if allowed:
            charged = {"kind": "charge", **about, **asdict(participation)}
            charged["users"] = [digests[place] for place in allowed]
            self._append(file, charged, lines[-1]["hash"])
        return allowed

    def _read(self, lines: list[dict[str, Any]]) -> tuple[str, dict[Participation, Counter[str]]]:
        """Return the salt, and by what they cost how often each user took part in rounds."""
        header, *charges = lines
        expected = {"kind": "header", "version": VERSION, "unit": self.unit}
        if any(header.get(key) != value for key, value in expected.items()):
            raise DamagedFile(
                f"{self.path}: no ledger of a node that charges each {self.unit}; a policy with "
                "another unit needs another ledger"
            )
        pasts: dict[Participation, Counter[str]] = {}
        for line in charges:
            each = Participation(*(line[key] for key in Participation.__dataclass_fields__))
            pasts.setdefault(each, Counter()).update(line["users"])
        return str(header["salt"]), pasts

    def _lines(self, file: IO[bytes]) -> list[dict[str, Any]]:
        """Return the whole lines; a torn last one, which charged nobody, is cut off."""
        file.seek(0)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
            os.fsync(file.fileno())
        lines: list[dict[str, Any]] = []
        for number, text in enumerate(data[:whole].splitlines(), start=1):
            before = lines[-1]["hash"] if lines else ""
            if (line := _unsealed(text, before)) is None:
                raise DamagedFile(
                    f"{self.path}, line {number}: edited, dropped or reordered; what users have "
                    "spent is not known: mend the file from a copy"
                )
            lines.append(line)
        return lines

    def _append(self, file: IO[bytes], body: dict[str, Any], before: str) -> dict[str, Any]:
        text = _sealed(json.dumps(body).encode(), before)
        file.write(text + b"\n")
        file.flush()
        os.fsync(file.fileno())
        return body | {"hash": json.loads(text)["hash"]}

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """Open the file for one process alone.

        Raises:
            EnvironmentFault: it cannot be opened, read or written, here or by the caller.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                _wait_for_lock(file)
                yield file
        except OSError as error:
            raise EnvironmentFault(f"{self.path}: cannot write ({error.strerror})") from None


def _wait_for_lock(file: IO[bytes]) -> None:
    deadline = time.monotonic() + _SECONDS_FOR_THE_LOCK
    while True:
        try:
            lock(file)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)


# What a line ends with: its hash, of the line before's and of all that stands before it.
_END = re.compile(rb', "hash": "[0-9a-f]{64}"}$')


def _sealed(body: bytes, before: str) -> bytes:
    digest = hashlib.sha256(before.encode() + body).hexdigest()
    return body[:-1] + f', "hash": "{digest}"}}'.encode()


def _unsealed(line: bytes, before: str) -> dict[str, Any] | None:
    """Return what a line says; None where its hash does not fit, or it has none."""
    end = _END.search(line)
    if end is None or _sealed(line[: end.start()] + b"}", before) != line:
        return None
    found: dict[str, Any] = json.loads(line)
    return found


def _digest(salt: str, user_id: str) -> str:
    """Return the stable name of a user in the ledger, from which its id is not read off."""
    salted = salt.encode() + user_id.encode("utf-8", "surrogatepass")
    return hashlib.sha256(salted).hexdigest()[:32]
