"""Where simulated users' memories lie between rounds: on disk, and of finished rounds alone.

A worker never changes a memory in place. It writes what its users of a round will keep into a
journal, which gets its name when it is whole. When the round's checkpoint is on the disk, and it
names the journal, the server copies the journal into the store: a redo log. So whenever the
process is killed, the next one finds the memories of the last checkpoint, or all that it takes to
make them; the journal of a round that must be run again, or of a worker that was given up, is
thrown away. Every vector is read with its checksum.

    state.json                 what the store holds, and after which round
    index.bin                  where each user's memory lies: one entry a user
    vectors.bin                the memories, one slot a user that ever took part
    R-A-P-S.journal            what users of partition P keep after attempt A of round R, as asked
                               for by server process S
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedpriv.disk import fsync, write_whole
from fedpriv.errors import DamagedFile, InputError

# Slots are counted from 1, so that an entry of zeros, as in a sparse file, means no memory. A power
# of two in size, an entry never lies across two sectors, and so is written whole or not at all.
_ENTRY = np.dtype(
    {
        "names": ["slot", "round", "attempt", "crc"],
        "formats": ["<u8", "<u4", "<u4", "<u4"],
        "itemsize": 32,
    }
)
# A record of a journal: this, then the vector.
_RECORD = np.dtype([("user", "<u8"), ("crc", "<u4")])
# Round and attempt that made a memory, and its checksum.
_Made = tuple[int, int, int]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class MemoryFormat:
    """What a store holds. All of it is public.

    Attributes:
        population: N, the number of users.
        parameters: P, the length of a memory.
        dtype: float32 or bfloat16.
        fingerprint: the run that it belongs to.
    """

    population: int
    parameters: int
    dtype: str
    fingerprint: str

    @property
    def vector_bytes(self) -> int:
        """Bytes of one memory."""
        return self.parameters * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class MemorySizes:
    """What the memories of a run take, in bytes.

    Attributes:
        each: a user's memory.
        expected: on disk at the end, for the users expected to have taken part by then.
        most: on disk when all users have.
        ram: what workers keep in RAM together.
    """

    each: int
    expected: int
    most: int
    ram: int

    @classmethod
    def of(cls, format_: MemoryFormat, cohort: float, rounds: int, ram: int) -> MemorySizes:
        """Return the sizes for a run of so many `rounds` with `cohort` users expected in each."""
        each, users = format_.vector_bytes, format_.population
        # While a round lasts its users' memories lie in journals too; a cohort varies.
        most_at_once = min(users, cohort + 5 * math.sqrt(cohort))
        rest = users * _ENTRY.itemsize + round(most_at_once * (_RECORD.itemsize + each))
        participants = users * (1 - (1 - cohort / users) ** rounds)
        return cls(each, rest + round(participants * each), rest + users * each, ram)

    def sentence(self) -> str:
        """Say the sizes."""
        each, most, expected, ram = map(_size, (self.each, self.most, self.expected, self.ram))
        return (
            f"what users keep takes {each} a participating user: at most {most} on disk "
            f"({expected} expected) and {ram} in RAM"
        )

    def check_space(
        self,
        folder: Path,
        key: str = "run_dir",
        instead: str = "write another run_dir, or privacy.error_feedback.dtype: bfloat16",
    ) -> str | None:
        """Return a warning where the disk of `folder` is too small for all users.

        `key` is what says where it is, and `instead` what to do.

        Raises:
            InputError: it is too small for those who are expected to take part.
        """
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        held = sum(path.stat().st_blocks * 512 for path in folder.glob("*"))
        free = shutil.disk_usage(there).free + held
        if free >= self.most:
            return None
        if free < self.expected:
            raise InputError(
                f"{key}: its disk has {_size(free)} free, and what users keep is expected to "
                f"fill {_size(self.expected)}; {instead}"
            )
        return (
            f"the run directory's disk has {_size(free)} free: too little if all users take part, "
            f"which takes {_size(self.most)}"
        )


def _size(count: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**power:
            return f"{count / 2**power:.2f} {unit}"
    return f"{count / 2**10:.1f} KiB"


class Journal(NamedTuple):
    """The name of a journal: the users of one node in one attempt of a round.

    `session` tells server processes apart: a worker may outlive a killed one for a while.
    """

    round: int
    attempt: int
    partition: int
    session: int

    @property
    def file(self) -> str:
        """The name of its file."""
        return "-".join(map(str, self)) + ".journal"


class _Cache:
    """The memories that were used last, in RAM that is taken once, so that it never fragments."""

    def __init__(self, format_: MemoryFormat, ram_bytes: int) -> None:
        capacity = min(format_.population, ram_bytes // format_.vector_bytes)
        # Pages that are not written to take no RAM.
        self._numbers = torch.empty(capacity, format_.parameters, dtype=_DTYPES[format_.dtype])
        # By user, the least recently used first: where it lies, and what made it.
        self._places: OrderedDict[int, tuple[int, _Made]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """RAM that is used."""
        return len(self._places) * self._numbers[:1].nbytes

    def get(self, user: int, made: _Made) -> Tensor | None:
        """Return the memory of `user` if it is here and is the one that was `made` so."""
        place, found = self._places.get(user, (0, None))
        if found != made:
            return None
        self._places.move_to_end(user)
        return self._numbers[place]

    def put(self, user: int, made: _Made, numbers: Tensor) -> None:
        """Keep a memory, in the place of what was kept of this user or was not used for longest."""
        if user in self._places:
            place, _ = self._places.pop(user)
        elif len(self._places) < len(self._numbers):
            place = len(self._places)
        elif self._places:
            place, _ = self._places.popitem(last=False)[1]
        else:
            return
        self._numbers[place] = numbers
        self._places[user] = (place, made)


class Memories:
    """A worker's view of the store: it reads memories and writes journals.

    Attributes:
        folder: the store.
        format: what it holds.
    """

    def __init__(self, folder: Path, ram_bytes: int) -> None:
        """Open the store; up to `ram_bytes` of memories are kept in RAM, the last used ones.

        Raises:
            InputError: this machine does not see the store.
        """
        if not (folder / "state.json").is_file():
            raise InputError(
                f"privacy.error_feedback: a worker does not see {folder}; run_dir must lie on a "
                "disk that all machines of runtime.ray_address share"
            )
        self.folder = folder
        self.format, _ = _read_state(folder)
        self._cache = _Cache(self.format, ram_bytes)

    @contextmanager
    def round(self, journal: Journal) -> Iterator[RoundMemories]:
        """Give access in one attempt of a round; its journal is sealed at the end.

        If anything is raised there is no journal, and nobody's memory changes.
        """
        scratch = self.folder / f"{journal.file}.partial"
        try:
            with (
                (self.folder / "index.bin").open("rb", buffering=0) as index,
                (self.folder / "vectors.bin").open("rb", buffering=0) as vectors,
                scratch.open("wb") as file,
            ):
                yield RoundMemories(journal, self.format, self._cache, (index, vectors, file))
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(self.folder / journal.file)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        fsync(self.folder)


class RoundMemories:
    """The memories of the users that a node trains in one attempt of a round."""

    def __init__(
        self,
        journal: Journal,
        format_: MemoryFormat,
        cache: _Cache,
        files: tuple[FileIO, FileIO, BufferedWriter],
    ) -> None:
        self._journal, self._format, self._cache = journal, format_, cache
        self._index, self._vectors, self._file = files

    def read(self, users: Sequence[int]) -> Tensor:
        """Return the memories that users had before the round: float32 `[U, P]`, zero at first.

        Raises:
            DamagedFile: one is torn, or is that of a later state.
        """
        dtype = _DTYPES[self._format.dtype]
        rows = torch.zeros(len(users), self._format.parameters, dtype=dtype)
        for user, row in zip(users, rows, strict=True):
            self._fetch(user, row)
        return rows.float()

    def _fetch(self, user: int, row: Tensor) -> None:
        """Put what `user` had into `row`; what it had is zero before it ever took part."""
        entry = _entry(self._index.fileno(), user)
        if entry["slot"] == 0:
            return
        if entry["round"] >= self._journal.round:
            raise DamagedFile(
                f"{self._index.name}: user {user} has the memory of round {entry['round']}, which "
                "is not finished: it is not that of the checkpoint"
            )
        made = int(entry["round"]), int(entry["attempt"]), int(entry["crc"])
        held = self._cache.get(user, made)
        if held is not None:
            row.copy_(held)
            return
        view = _bytes_of(row)
        _read_into(self._vectors.fileno(), view, (int(entry["slot"]) - 1) * len(view))
        if zlib.crc32(view) != entry["crc"]:
            raise DamagedFile(
                f"{self._vectors.name}: the memory of user {user} is torn or was changed"
            )
        self._cache.put(user, made, row)

    def write(self, users: Sequence[int], memories: Tensor) -> None:
        """Write the memories `[U, P]` that users will have, if the round is finished."""
        stored = memories.detach().cpu().to(_DTYPES[self._format.dtype]).contiguous()
        for user, row in zip(users, stored, strict=True):
            crc = zlib.crc32(_bytes_of(row))
            self._file.write(np.array((user, crc), _RECORD).tobytes())
            self._file.write(_bytes_of(row))
            # It is believed once the store says that this attempt made the user's memory.
            self._cache.put(user, (self._journal.round, self._journal.attempt, crc), row)


class MemoryStore:
    """The server's view of the store: it makes finished rounds part of it. There is one of it.

    Attributes:
        folder: the store.
        format: what it holds.
        round: the last round that is part of it.
        session: this process, in the names of the journals that it asks for.
    """

    def __init__(self, folder: Path, format_: MemoryFormat) -> None:
        """Open the store of a run, or make it where there is none.

        Raises:
            InputError: another run's store lies there.
            DamagedFile: a part of it is missing or cut off; nothing of it is changed.
        """
        self.folder, self.format, self.round = folder, format_, 0
        self.session = secrets.randbits(31)
        if (folder / "state.json").exists():
            found, self.round = _read_state(folder)
            if found != format_:
                raise InputError(f"{folder}: these memories belong to another configuration")
        else:
            self._begin()
        self._slots = self._slots_in_use()

    def _begin(self) -> None:
        """Make an empty store; a torn beginning, in which nobody has a memory, is begun again."""
        vectors = self.folder / "vectors.bin"
        begun = vectors.exists() and vectors.stat().st_size > 0
        if begun or any(self.folder.glob("*.journal")):
            raise DamagedFile(
                f"{self.folder}/state.json is missing beside users' memories: put it back, or "
                "begin another run"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        vectors.touch()
        with (self.folder / "index.bin").open("wb") as file:
            file.truncate(self.format.population * _ENTRY.itemsize)
        self._write_state()

    def _slots_in_use(self) -> int:
        index, vectors = self.folder / "index.bin", self.folder / "vectors.bin"
        for path, least in ((index, self.format.population * _ENTRY.itemsize), (vectors, 0)):
            if not path.exists() or path.stat().st_size < least:
                raise DamagedFile(f"{path}: missing or cut off; users' memories are lost")
        return int(np.fromfile(index, _ENTRY)["slot"].max(initial=0))

    def restore(self, round_: int, journals: Iterable[Journal]) -> None:
        """Make the memories those after `round_`, the last checkpoint, which counted `journals`.

        Raises:
            InputError: the store is of a later round, or lacks what it takes.
        """
        if self.round < round_:
            self.commit(round_, journals)
        elif self.round > round_:
            raise InputError(
                f"{self.folder}: the memories are those after round {self.round}, and the newest "
                f"checkpoint is of round {round_}: the run cannot continue from it"
            )
        self._sweep()

    def commit(self, round_: int, journals: Iterable[Journal]) -> None:
        """Make `journals`, those of the finished `round_`, part of the store, and forget others.

        It may be interrupted anywhere and done again.

        Raises:
            InputError: the store is not that after the round before, or a journal is missing.
            DamagedFile: a journal is not what was written.
        """
        paths = [(self.folder / journal.file, journal) for journal in journals]
        missing = [path for path, _ in paths if not path.exists()]
        if self.round != round_ - 1 or missing:
            raise InputError(
                f"{self.folder}: the memories after round {round_} cannot be made from those after "
                f"round {self.round}; files are missing"
            )
        for path, journal in paths:
            self._apply(path, journal)
        fsync(self.folder / "vectors.bin")
        fsync(self.folder / "index.bin")
        self.round = round_
        self._write_state()
        self._sweep()

    def _apply(self, path: Path, journal: Journal) -> None:
        """Copy a journal into the store; done twice, it gives the same."""
        record = bytearray(_RECORD.itemsize + self.format.vector_bytes)
        vector = memoryview(record)[_RECORD.itemsize :]
        index = os.open(self.folder / "index.bin", os.O_RDWR)
        vectors = os.open(self.folder / "vectors.bin", os.O_WRONLY)
        try:
            with path.open("rb") as file:
                while file.readinto(record):
                    head = np.frombuffer(record, _RECORD, count=1)[0]
                    if zlib.crc32(vector) != head["crc"] or head["user"] >= self.format.population:
                        raise DamagedFile(f"{path}: not what was written")
                    user, slot = int(head["user"]), self._slot(_entry(index, int(head["user"])))
                    _write(vectors, vector, (slot - 1) * len(vector))
                    entry = np.array((slot, journal.round, journal.attempt, head["crc"]), _ENTRY)
                    _write(index, memoryview(entry.tobytes()), user * _ENTRY.itemsize)
        finally:
            os.close(index)
            os.close(vectors)

    def _slot(self, entry: np.void) -> int:
        if entry["slot"] == 0:
            self._slots += 1
            return self._slots
        return int(entry["slot"])

    def _sweep(self) -> None:
        """Remove all journals: what counts is in the store, and no round is being run."""
        for path in self.folder.glob("*.journal*"):
            path.unlink(missing_ok=True)

    def _write_state(self) -> None:
        state = {"round": self.round, **asdict(self.format)}
        write_whole(self.folder / "state.json", json.dumps(state))


def _read_state(folder: Path) -> tuple[MemoryFormat, int]:
    """Return what a store holds, and after which round.

    Raises:
        DamagedFile: its state is not what was written.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return MemoryFormat(**{k: v for k, v in state.items() if k != "round"}), state["round"]
    except (ValueError, TypeError, KeyError):
        raise DamagedFile(f"{folder}/state.json: not what was written") from None


def finished_round(folder: Path) -> int | None:
    """Return the last round that is part of the store in `folder`; None where there is no store.

    Raises:
        DamagedFile: its state is not what was written.
    """
    return _read_state(folder)[1] if (folder / "state.json").exists() else None


def _entry(index: int, user: int) -> np.void:
    """Return the entry of `user` from the index's open file."""
    buffer = bytearray(_ENTRY.itemsize)
    _read_into(index, memoryview(buffer), user * _ENTRY.itemsize)
    return np.frombuffer(buffer, _ENTRY)[0]


def _bytes_of(row: Tensor) -> memoryview:
    """Return the bytes of a contiguous vector, in its own memory."""
    return row.view(torch.uint8).numpy().data


def _read_into(file: int, view: memoryview, offset: int) -> None:
    # One call reads 2 GiB at most.
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise DamagedFile("the store of memories is shorter than its index says")
        done += count


def _write(file: int, numbers: memoryview, offset: int) -> None:
    done = 0
    while done < len(numbers):
        done += os.pwrite(file, numbers[done:], offset + done)
