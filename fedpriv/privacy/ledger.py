"""The ledger: the append-only record of every privacy event of a run.

One JSON object a line. The first line is a header that says for which run the ledger is; each
later line is a release. Every line holds the SHA-256 of the line before it, so that an edited,
dropped or reordered line is found. A line is on the disk (fsync) before the release that it
charges is used for anything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import dp_accounting

from fedpriv.disk import fsync
from fedpriv.errors import InputError
from fedpriv.privacy.accounting import Accountant
from fedpriv.privacy.clipping import GlobalClipping
from fedpriv.privacy.ledger_checks import (
    VERSION,
    check_same_run,
    require_begun,
    require_known,
    require_one_kind,
    unpaid,
)
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.privacy.mechanisms.gaussian import CountNoise, GaussianMechanism
from fedpriv.privacy.mechanisms.registry import MECHANISMS
from fedpriv.privacy.sampling import Adjacency


@dataclass(frozen=True)
class Header:
    """For which run a ledger is.

    Attributes:
        fingerprint: SHA-256 of those parts of the configuration that affect what is released.
        population: N, the number of users.
        delta: the δ at which the run reports ε.
        adjacency: the adjacency under which its events hold.
        unit: the unit of privacy: user, or example (the population is then one of silos).
        noise_by: who adds the noise, and so whom a user must trust: server, nodes or users; of
            examples always silos, which `unit` says.
        mode: simulation, whose noise derives from a seed and the fingerprint, or deployment, whose
            noise comes from the operating system; "" in ledgers of version 1, which do not say.
        data: the digest of the users' data; "" in a deployment, and in ledgers of version 1. It,
            and so the fingerprint of a simulation, is a function of private data.
        outside: what the run was made of that is not fedpriv's own, each with where it came from.
        mechanism: what `unit` and `noise_by` leave open: correlated; allocated, where users were
            allocated to rounds; "" for noise and cohorts that are drawn anew in each round.
        trial: the label of a trial of a tuning, whose release costs more than what its ledger is
            charged with; 0 for none.
    """

    fingerprint: str
    population: int
    delta: float | None
    adjacency: str
    unit: str = "user"
    version: int = VERSION
    noise_by: str = "server"
    mode: str = ""
    data: str = ""
    outside: tuple[str, ...] = ()
    mechanism: str = ""
    trial: int = 0

    def fields(self) -> dict[str, Any]:
        """Return what the first line holds; what is private is put aside, as in all files."""
        fields = asdict(self)
        for name in ("noise_by", "mechanism", "outside", "trial"):
            if fields[name] == getattr(Header, name):
                del fields[name]
        private = ("fingerprint", "data") if self.mode == "simulation" else ()
        return {
            **{name: value for name, value in fields.items() if name not in private},
            **({"simulation_only": {name: fields[name] for name in private}} if private else {}),
        }

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Header:
        """Return the header that a first line holds.

        Raises:
            TypeError: the fields are not those of a header.
        """
        outside = tuple(fields.get("outside", ()))
        known = {**fields.get("simulation_only", {}), **_without(fields, "simulation_only")}
        return cls(**{**known, "outside": outside})


@dataclass(frozen=True)
class Places:
    """Which users of the population one node of a deployment hosts, for the whole run.

    Users are charged by their place, so a place must be one person's for ever, whichever nodes
    are there in a round.

    Attributes:
        partition: the node's own number.
        first: the place of its first user; the others follow.
        users: how many it hosts.
        ids: the node's digest of its users' ids in their order: with another one it is refused.
    """

    partition: int
    first: int
    users: int
    ids: str

    def fields(self) -> dict[str, Any]:
        """Return what a line holds; how many users there are, and who, is put aside as private.

        No mechanism covers it: only whoever may know each user's presence may read it.
        """
        fields = asdict(self)
        return {"partition": fields.pop("partition"), "private": fields}

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Places:
        """Return the places that a line holds.

        Raises:
            TypeError: the fields are not those of places.
        """
        return cls(**{**fields.get("private", {}), **_without(fields, "private")})


@dataclass(frozen=True)
class Release:
    """One release: everything that an accountant needs, and a digest of what was released.

    Attributes:
        round: the round, counted from 1.
        attempt: 0, or how many times this round had been charged before.
        sampling: kind of sampling.
        adjacency: the adjacency under which this release is analysed.
        population: N at this release.
        expected_cohort: expected number of sampled users; None where all take part.
        bound: the clip bound C; None where nothing bounds a contribution (no privacy).
        noise_multiplier: z of the whole release.
        sensitivity: L2 sensitivity of the sum under the ledger's adjacency; None if unbounded.
        stddev: σ, the standard deviation of the noise on each coordinate of the sum; with
            per-block noise that of a block with all of the bound, z·C.
        noise_shape: spherical, or per_block.
        counts: how many counts of users within a bound were released beside the sum.
        count_stddev: the standard deviation of the noise on each of them; None without counts.
        digest: of everything that was released, float64: the SHA-256 of the SHA-256 of each 2^18
            numbers of it. It is empty in a deployment whose nodes or users add the noise: their
            charge is on the disk before they are asked.
        silos: example-level privacy: who took part, and so who pays; None where all users pay.
            `sampling`, `population` and `expected_cohort` are then those of silos; `adjacency`,
            `bound`, `sensitivity` and `stddev` those of examples in one step, the first where
            bounds adapt: σ stays in proportion to them.
        sampling_rate: example-level: q of each step.
        steps: example-level: DP-SGD steps of each silo in this release.
        users: noise added by users: who took part, and so who pays; None where all users pay.
            `adjacency`, `sensitivity` and `stddev` are then those of one user's message.
        shares: noise added by nodes: how many of their shares have `stddev` together.
        bands: correlated noise: b, the bands of C, and the groups of users. `stddev` is then that
            of a row of Z, and users of the group are drawn with b times `expected_cohort` / N.
        payloads: name, bound and noise σ of each, where users send several; `bound` is then that
            of all together.
        group: correlated noise: the group that the round draws from, all of whose users pay.
        separation: min_separation sampling: of how many rounds a user is in one at most, and the
            groups. None with Poisson sampling, whose groups are the bands. random_allocation: of
            how many rounds a user is in exactly one.
        factorization: correlated noise: how C was made; None for square_root.
        horizon: correlated noise whose C is dense: T, the rounds that C was made for.
        parameters: correlated noise: the numbers that C is made of; None for square_root, whose
            bands follow from their number, and in earlier versions for optimized.
        slot: random_allocation: the round's place in its block, from 1, which pays for the block.
        turns: silos on a schedule: the steps of each of `silos`; `steps` is then the most that a
            silo takes in any round.
    """

    round: int
    attempt: int
    sampling: str
    adjacency: str
    population: int
    expected_cohort: float | None
    bound: float | None
    noise_multiplier: float
    sensitivity: float | None
    stddev: float
    noise_shape: str
    counts: int
    count_stddev: float | None
    digest: str
    silos: tuple[int, ...] | None = None
    sampling_rate: float | None = None
    steps: int | None = None
    users: tuple[int, ...] | None = None
    shares: int | None = None
    bands: int | None = None
    group: int | None = None
    payloads: tuple[tuple[str, float, float], ...] | None = None
    separation: int | None = None
    factorization: str | None = None
    horizon: int | None = None
    parameters: tuple[float, ...] | None = None
    slot: int | None = None
    turns: tuple[int, ...] | None = None

    @property
    def mechanism(self) -> type[Mechanism]:
        """The kind of mechanism that made it, by what it records."""
        kinds = {
            "scheduled": self.turns,
            "silos": self.silos,
            "users": self.users,
            "nodes": self.shares,
            "correlated": self.bands,
            "allocated": self.slot,
        }
        return MECHANISMS[next((k for k, own in kinds.items() if own is not None), "server")]

    @property
    def payers(self) -> tuple[int, ...] | None:
        """Who pays: silos, users with noise of their own, or a group of users; None for all."""
        if self.group is not None:
            return (self.group,)
        return self.silos if self.silos is not None else self.users

    @classmethod
    def of(
        cls,
        round_: int,
        attempt: int,
        mechanism: Mechanism,
        digest: str,
        payers: tuple[int, ...] | None = None,
    ) -> Release:
        """Return the record of one release of `mechanism`, for which `payers` pay."""
        return cls(round=round_, attempt=attempt, digest=digest, **mechanism.record(payers))

    def event(self) -> dp_accounting.DpEvent:
        """Return the privacy event, rebuilt from the noise and bounds on record.

        Where not all users pay for it, it is the event of one who does; of silos on a schedule it
        is that of the most steps, which none of them exceeds: see `bills`.

        The multiplier is computed from them, not taken from `noise_multiplier`, so that a record
        cannot claim more noise than it shows.
        """
        if self.bound is None or self.stddev == 0:
            return dp_accounting.NonPrivateDpEvent()
        parts = self.payloads or (("model", self.bound, self.stddev),)
        if any(bound > 0 and stddev == 0 for _, bound, stddev in parts):
            return dp_accounting.NonPrivateDpEvent()
        inverse_square = sum((bound / stddev) ** 2 for _, bound, stddev in parts)
        if self.counts and self.count_stddev is not None:
            inverse_square += CountNoise(self.counts, self.count_stddev).inverse_square
        multiplier = _rounded_down(inverse_square**-0.5, self.noise_multiplier)
        gaussian = GaussianMechanism(multiplier, GlobalClipping(self.bound))
        return self.mechanism.event_of(self, gaussian)

    def bills(self) -> list[tuple[dp_accounting.DpEvent, tuple[int, ...] | None]]:
        """Return who pays for which event; None for all users."""
        if self.turns is None or self.silos is None:
            return [(self.event(), self.payers)]
        alike: dict[int, list[int]] = {}
        for silo, steps in zip(self.silos, self.turns, strict=True):
            alike.setdefault(steps, []).append(silo)
        return [
            (replace(self, steps=steps).event(), tuple(silos)) for steps, silos in alike.items()
        ]

    def billed_to(self, payer: int) -> Release:
        """Return the release with the event of `payer`, one of those who pay for it."""
        if self.turns is None or self.silos is None:
            return self
        return replace(self, steps=self.turns[self.silos.index(payer)])


def _rounded_down(multiplier: float, recorded: float) -> float:
    """Return `multiplier` to 12 digits, never more than it was.

    Bounds that adapt leave the multiplier alone but for its last bits; without rounding every
    round would be an event of its own, and accounting would be slow. Where it lies halfway between
    two roundings the last bits would decide, so that of `recorded`, which has none, is taken.
    """
    if math.isclose(multiplier, recorded, rel_tol=5e-13):
        multiplier = recorded
    return float(f"{multiplier * (1 - 6e-12):.12g}")


class Ledger:
    """An open ledger file. `append` returns only when the line is on the disk."""

    def __init__(
        self,
        path: Path,
        header: Header,
        releases: list[Release],
        hashes: list[str],
        dropped_bytes: int = 0,
        places: Sequence[Places] = (),
    ) -> None:
        self.path = path
        #: The places of the users of each node of a deployment, by the node's number.
        self.places = {each.partition: each for each in places}
        #: Length of a torn last line that opening the file has dropped; 0 for none.
        self.dropped_bytes = dropped_bytes
        self.header = header
        self._releases = releases
        self._by_round: dict[int, list[Release]] = {}
        for release in releases:
            self._by_round.setdefault(release.round, []).append(release)
        #: Of each whole line, the header's first.
        self._hashes = hashes

    @classmethod
    def create(cls, path: Path, header: Header) -> Ledger:
        """Start a new ledger; an existing file is never overwritten.

        Raises:
            InputError: the file exists.
        """
        if path.exists():
            raise InputError(f"{path} exists: resume that run, or choose another run_dir")
        ledger = cls(path, header, [], [])
        ledger._write({"kind": "header", **header.fields()})
        fsync(path.parent)
        return ledger

    @classmethod
    def open(cls, path: Path, expected: Header | None = None) -> Ledger:
        """Open an existing ledger, check every line, and drop a torn last line.

        A torn line is one whose append never returned, so nothing it would have charged was used.

        Raises:
            InputError: missing, edited, dropped or reordered lines, or the ledger of another
                configuration than `expected`.
        """
        found = read_ledger(path)
        if expected is not None:
            check_same_run(path, found.header, expected)
        if found.torn_bytes:
            with path.open("r+b") as file:
                file.truncate(found.whole_bytes)
                os.fsync(file.fileno())
        releases, hashes = list(found.releases), [found.header_hash, *found.hashes]
        return cls(path, found.header, releases, hashes, found.torn_bytes, found.places)

    def give_places(self, partition: int, users: int, ids: str, population: int) -> Places:
        """Return the places of a node's users, recorded durably when it first comes.

        Raises:
            InputError: other users than those that the node first came with, or more than there
                are places left of the `population`; nothing is recorded.
        """
        known = self.places.get(partition)
        if known is None:
            taken = sum(each.users for each in self.places.values())
            if taken + users > population:
                raise InputError(
                    f"node {partition} hosts {users} users, but of data.users = {population} only "
                    f"{population - taken} places are left; it takes no part"
                )
            known = self.places[partition] = Places(partition, taken, users, ids)
            self._write({"kind": "places", **known.fields()})
        if (known.users, known.ids) != (users, ids):
            raise InputError(
                f"node {partition} hosts other users than when this run began; it takes no part, "
                "or nobody could say who was charged for what"
            )
        return known

    def append(self, release: Release) -> None:
        """Write `release` durably: when this returns, the line has reached the disk.

        Raises:
            InputError: it says that an earlier one paid for it, and none did; nothing is written.
        """
        self.require_paid(release)
        self._write({"kind": "release", **_fields(release)})
        self._releases.append(release)
        self._by_round.setdefault(release.round, []).append(release)

    def require_paid(self, release: Release) -> None:
        """Raise InputError where `release` says that an earlier one paid for it, and none did."""
        length = release.separation if isinstance(release.separation, int) else 1
        if (reason := unpaid(self._releases[-length:], release)) is not None:
            raise InputError(
                f"{self.path}: {reason}; go on with the versions, and on the kind of machine, with "
                "which it began"
            )

    def charges(self, round_: int) -> list[Release]:
        """Return the releases that round `round_` has been charged for."""
        return list(self._by_round.get(round_, ()))

    def __iter__(self) -> Iterator[Release]:
        return iter(self._releases)

    def __len__(self) -> int:
        return len(self._releases)

    @property
    def adjacency(self) -> Adjacency:
        """The adjacency under which every release of this ledger is analysed."""
        return Adjacency(self.header.adjacency)

    @property
    def hashes(self) -> Sequence[str]:
        """The hash of each line after the header's."""
        return self._hashes[1:]

    def compose_into(self, accountant: Accountant) -> None:
        """Charge `accountant` with every release, as if one party had paid for all of them."""
        for release in self._releases:
            accountant.compose(release.event())

    def _write(self, body: Mapping[str, Any]) -> None:
        line, digest = _seal(body, self._hashes[-1] if self._hashes else "")
        self._hashes.append(digest)
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _seal(body: Mapping[str, Any], previous: str) -> tuple[bytes, str]:
    """Return the line for `body`, chained to the line with hash `previous`, and its hash."""
    chained = {**body, "previous": previous}
    digest = _hash(chained)
    return (json.dumps({**chained, "hash": digest}) + "\n").encode(), digest


def _hash(chained: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(chained, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class LedgerFile:
    """What a ledger file holds.

    Attributes:
        header: for which run the ledger is.
        releases: every release, in order.
        header_hash: hash of the header's line.
        hashes: hash of each line after it: it stands for the file up to there.
        whole_bytes: length of all whole lines.
        torn_bytes: length of a last line without its end, which charged nothing.
        places: which users each node of a deployment hosts.
    """

    header: Header
    releases: tuple[Release, ...]
    header_hash: str
    hashes: tuple[str, ...]
    whole_bytes: int
    torn_bytes: int
    places: tuple[Places, ...] = ()


def read_ledger(path: Path) -> LedgerFile:
    """Read and check a ledger file without changing it.

    Raises:
        InputError: unreadable, not a ledger, or with lines edited, dropped or reordered.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the ledger ({error.strerror})") from None
    whole = data.rfind(b"\n") + 1
    _require_a_ledger(path, data[:whole])
    hashes = [""]
    bodies = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        body = _unseal(path, number, line, hashes[-1])
        hashes.append(body.pop("hash"))
        bodies.append(body)
    if bodies[0].pop("kind", None) != "header":
        raise InputError(f"{path}, line 1: edited, dropped or reordered (it is no header)")
    try:
        header = Header.of_fields(bodies[0])
        kinds = [body.pop("kind") for body in bodies[1:]]
        lines = list(zip(kinds, bodies[1:], strict=True))
        places = tuple(Places.of_fields(body) for kind, body in lines if kind == "places")
        releases = tuple(_release(body) for kind, body in lines if kind != "places")
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path}: written by another version of fedpriv") from None
    if set(kinds) - {"places", "release"}:
        raise InputError(f"{path}: written by another version of fedpriv")
    require_known(path, header, releases)
    require_one_kind(path, header, releases)
    require_begun(path, releases)
    return LedgerFile(
        header, releases, hashes[1], tuple(hashes[2:]), whole, len(data) - whole, places
    )


def _require_a_ledger(path: Path, lines: bytes) -> None:
    """Refuse a file that never was a ledger: it must not be called an edited one.

    Raises:
        InputError: it has a line, but the first has none of the marks of a ledger's.
    """
    first = lines.split(b"\n", 1)[0]
    if b'"kind"' in first and b'"hash"' in first:
        return
    beside = path.with_name("ledger.jsonl")
    hint = f"; the ledger beside it is {beside}" if beside != path and beside.is_file() else ""
    raise InputError(f"{path}: not a fedpriv ledger (no header in its first line){hint}")


def _unseal(path: Path, number: int, line: bytes, previous: str) -> dict[str, Any]:
    """Return the line's fields with `previous` removed and `hash` checked."""
    try:
        body: dict[str, Any] = json.loads(line)
        intact = body["previous"] == previous and body["hash"] == _hash(
            {key: value for key, value in body.items() if key != "hash"}
        )
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise InputError(
            f"{path}, line {number}: edited, dropped or reordered (its hash does not fit)"
        )
    del body["previous"]
    return body


def _without(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def _fields(release: Release) -> dict[str, Any]:
    """Return what a line holds: of silos, users' own noise, shares, groups only where they are."""
    fields = asdict(release)
    for kind, names in _OF_KIND.items():
        if fields[kind] is None:
            for name in names:
                del fields[name]
    return fields


_OF_SILOS = ("silos", "sampling_rate", "steps")
# What goes with the first of them alone.
_OF_KIND = {
    "silos": _OF_SILOS,
    "users": ("users",),
    "shares": ("shares",),
    "bands": ("bands", "group"),
    "payloads": ("payloads",),
    "separation": ("separation",),
    "factorization": ("factorization",),
    "horizon": ("horizon",),
    "parameters": ("parameters",),
    "slot": ("slot",),
    "turns": ("turns",),
}


def _release(body: dict[str, Any]) -> Release:
    if any(name in body for name in _OF_SILOS):
        rate, steps = float(body["sampling_rate"]), int(body["steps"])
        body |= {"silos": tuple(body["silos"]), "sampling_rate": rate, "steps": steps}
    if "payloads" in body:
        body["payloads"] = tuple((str(n), float(b), float(s)) for n, b, s in body["payloads"])
    if "parameters" in body:
        body["parameters"] = tuple(float(number) for number in body["parameters"])
    if "turns" in body:
        body["turns"] = tuple(body["turns"])
    if "users" in body:
        body["users"] = tuple(body["users"])
    return Release(**body)
