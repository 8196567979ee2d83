import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fedpriv.errors import DamagedFile, InputError
from fedpriv.training import memory_store
from fedpriv.training.memory_store import (
    Journal,
    Memories,
    MemoryFormat,
    MemorySizes,
    MemoryStore,
)

FORMAT = MemoryFormat(population=50, parameters=7, dtype="float32", fingerprint="a run")


def open_store(folder: Path, **changes) -> MemoryStore:
    return MemoryStore(folder / "memory", MemoryFormat(**{**vars(FORMAT), **changes}))


def vectors(users: list[int], round_: int) -> torch.Tensor:
    """What users keep after a round: different for each, and for each round."""
    base = torch.tensor([100.0 * round_ + user for user in users]).view(-1, 1)
    return base + torch.arange(7) / 7


def write(store: MemoryStore, users: list[int], round_: int, **changes) -> Journal:
    """Write a journal as a worker does."""
    journal = Journal(round_, changes.get("attempt", 0), changes.get("partition", 0), store.session)
    with Memories(store.folder, changes.get("ram", 0)).round(journal) as memories:
        memories.write(users, vectors(users, round_))
    return journal


def finish_round(store: MemoryStore, users: list[int], round_: int) -> None:
    """Let two workers write, and the round be finished."""
    halves = ([u for u in users if u % 2 == p] for p in range(2))
    journals = [write(store, half, round_, partition=p) for p, half in enumerate(halves)]
    store.commit(round_, journals)


def read(store: MemoryStore, users: list[int], memories: Memories | None = None) -> torch.Tensor:
    """Read what users have before the round after the last finished one."""
    journal = Journal(store.round + 1, 9, 9, store.session)
    with (memories or Memories(store.folder, 0)).round(journal) as round_:
        found = round_.read(users)
    (store.folder / journal.file).unlink()
    return found


def test_what_a_finished_round_wrote_is_read_and_nobody_else_changes(tmp_path):
    store = open_store(tmp_path)
    assert not read(store, list(range(50))).any()
    finish_round(store, [3, 8, 41], 1)
    finish_round(store, [8, 20], 2)
    assert read(store, [41, 3]).equal(vectors([41, 3], 1))
    assert read(store, [8, 20]).equal(vectors([8, 20], 2))
    others = [user for user in range(50) if user not in (3, 8, 20, 41)]
    assert not read(store, others).any()
    # A slot for each of the four who took part, and none else.
    assert (store.folder / "vectors.bin").stat().st_size == 4 * FORMAT.vector_bytes


def test_a_round_that_is_not_finished_changes_nothing(tmp_path):
    store = open_store(tmp_path)
    finish_round(store, [1, 2], 1)
    write(store, [1, 5], 2)
    assert read(store, [1, 2]).equal(vectors([1, 2], 1))
    # The second attempt has another cohort; what the first one wrote is forgotten.
    again = write(store, [2], 2, attempt=1)
    store.commit(2, [again])
    assert read(store, [1]).equal(vectors([1], 1))
    assert read(store, [2]).equal(vectors([2], 2))
    assert not read(store, [5]).any()
    assert not list(store.folder.glob("*journal*"))


def test_a_worker_that_fails_leaves_no_journal(tmp_path):
    store = open_store(tmp_path)
    wrong = torch.zeros(1, 7).expand(2, 7)
    with (
        pytest.raises(ValueError),
        Memories(store.folder, 0).round(Journal(1, 0, 0, store.session)) as memories,
    ):
        memories.write([1], wrong)
    assert not list(store.folder.glob("*.journal"))
    store.commit(1, [])
    assert not read(store, [1]).any()


class Killed(BaseException):
    """Nothing in the code catches it, so it ends the code where it stands."""


def die_after(monkeypatch, steps: int) -> None:
    """Let `steps` changes of the disk happen, then die; half of a number's bytes are written."""
    left = [steps]

    def dying(owner, name, tear=None):
        original = getattr(owner, name)

        def wrapped(*arguments, **keywords):
            if left[0] == 0:
                if tear is not None:
                    tear(original, *arguments)
                raise Killed
            left[0] -= 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, wrapped)

    def half(original, file, numbers, offset):
        original(file, numbers[: len(numbers) // 2], offset)

    dying(os, "pwrite", half)
    dying(memory_store, "fsync")
    dying(Path, "rename")
    dying(Path, "write_text")
    dying(Path, "unlink")


def steps_of_a_commit(folder: Path) -> int:
    store = open_store(folder)
    finish_round(store, [1, 2, 3], 1)
    with pytest.MonkeyPatch.context() as patch:
        counted = []
        for owner, name in [(os, "pwrite"), (memory_store, "fsync")] + [
            (Path, name) for name in ("rename", "write_text", "unlink")
        ]:
            original = getattr(owner, name)
            patch.setattr(
                owner, name, lambda *a, f=original, **k: (counted.append(1), f(*a, **k))[1]
            )
        journals = [write(store, [2], 2), write(store, [3, 7, 9], 2, partition=1)]
        before = len(counted)
        store.commit(2, journals)
    return len(counted) - before


def test_death_anywhere_in_a_commit_tears_nobodys_memory(tmp_path):
    """After each single change of the disk: the next process finds or makes the round's end."""
    steps = steps_of_a_commit(tmp_path)
    assert steps >= 12
    for step in range(steps):
        folder = tmp_path / str(step)
        folder.mkdir()
        store = open_store(folder)
        finish_round(store, [1, 2, 3], 1)
        journals = [write(store, [2], 2), write(store, [3, 7, 9], 2, partition=1)]
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, step)
            with pytest.raises(Killed):
                store.commit(2, journals)
        reopened = open_store(folder)
        reopened.restore(2, journals)
        assert read(reopened, [1]).equal(vectors([1], 1))
        assert read(reopened, [2, 3, 7, 9]).equal(vectors([2, 3, 7, 9], 2))
        assert not read(reopened, [4, 5]).any()
        finish_round(reopened, [1, 4, 9], 3)
        assert read(reopened, [1, 4, 9]).equal(vectors([1, 4, 9], 3))
        assert read(reopened, [2, 3, 7]).equal(vectors([2, 3, 7], 2))


def test_a_round_killed_before_its_checkpoint_is_forgotten(tmp_path):
    store = open_store(tmp_path)
    finish_round(store, [1, 2], 1)
    write(store, [1, 9], 2)
    (store.folder / "2-0-1-5.journal.partial").write_bytes(b"half")
    reopened = open_store(tmp_path)
    reopened.restore(1, [])
    assert not list(reopened.folder.glob("*journal*"))
    assert read(reopened, [1, 2]).equal(vectors([1, 2], 1))
    assert not read(reopened, [9]).any()


def test_a_memory_that_was_damaged_is_never_used(tmp_path):
    store = open_store(tmp_path)
    finish_round(store, [1, 2, 3], 1)
    path = store.folder / "vectors.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    damaged = 0
    for user in (1, 2, 3):
        try:
            assert read(store, [user]).equal(vectors([user], 1))
        except DamagedFile:
            damaged += 1
    assert damaged == 1
    path.write_bytes(whole[:-1])
    with pytest.raises(DamagedFile):
        read(store, [1, 2, 3])


def test_a_journal_that_was_damaged_is_never_used(tmp_path):
    store = open_store(tmp_path)
    journal = write(store, [1, 2], 1)
    path = store.folder / journal.file
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DamagedFile, match="not what was written"):
        store.commit(1, [journal])


def test_a_journal_of_someone_outside_the_population_is_never_used(tmp_path):
    """The index would grow, and with it the slots that are taken to be in use."""
    store = open_store(tmp_path)
    journal = write(store, [3, 50], 1)
    with pytest.raises(DamagedFile, match="not what was written"):
        store.commit(1, [journal])
    assert (store.folder / "index.bin").stat().st_size == 50 * 32


def test_server_processes_ask_for_journals_of_their_own(tmp_path):
    """A worker may outlive the process that asked it, and write while the next one's do."""
    sessions = {open_store(tmp_path).session for _ in range(20)}
    assert len(sessions) == 20


def test_the_store_of_another_state_is_refused(tmp_path):
    store = open_store(tmp_path)
    journal = write(store, [1], 1)
    store.commit(1, [journal])
    with pytest.raises(InputError, match="those after round 1, and the newest checkpoint is of"):
        open_store(tmp_path).restore(0, [])
    with pytest.raises(InputError, match="after round 3 cannot be made"):
        open_store(tmp_path).restore(3, [])
    lost = Journal(2, 0, 0, store.session)
    with pytest.raises(InputError, match="files are missing"):
        open_store(tmp_path).restore(2, [lost])
    with pytest.raises(InputError, match="another configuration"):
        open_store(tmp_path, fingerprint="another run")
    (store.folder / "state.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"state\.json"):
        open_store(tmp_path)


def test_a_store_with_a_part_missing_is_refused_and_left_as_it_is(tmp_path):
    """What is put back is used again; nothing is taken for a store that has not begun."""
    store = open_store(tmp_path)
    finish_round(store, [1, 2], 1)
    whole = {path: path.read_bytes() for path in store.folder.iterdir()}
    assert len(whole) == 3
    for path, content in whole.items():
        path.unlink()
        with pytest.raises(DamagedFile, match=path.name):
            open_store(tmp_path)
        assert {each: each.read_bytes() for each in store.folder.iterdir()} == {
            each: whole[each] for each in whole if each != path
        }
        path.write_bytes(content)
    assert read(open_store(tmp_path), [1, 2]).equal(vectors([1, 2], 1))
    os.truncate(store.folder / "index.bin", 49 * 32)
    with pytest.raises(DamagedFile, match=r"index\.bin: missing or cut off"):
        open_store(tmp_path)


def test_a_memory_of_a_later_round_is_refused(tmp_path):
    store = open_store(tmp_path)
    finish_round(store, [1], 1)
    finish_round(store, [2], 2)
    with (
        pytest.raises(DamagedFile, match="round 2, which is not finished"),
        Memories(store.folder, 0).round(Journal(2, 1, 0, 0)) as memories,
    ):
        memories.read([2])


def test_half_precision_rounds_to_the_nearest_and_takes_half_the_room(tmp_path):
    store = open_store(tmp_path, dtype="bfloat16")
    finish_round(store, [1], 1)
    assert read(store, [1]).equal(vectors([1], 1).bfloat16().float())
    assert (store.folder / "vectors.bin").stat().st_size == 14


def test_ram_is_bounded_and_what_it_holds_is_what_the_disk_holds(tmp_path):
    store = open_store(tmp_path)
    memories = Memories(store.folder, 3 * FORMAT.vector_bytes)
    for round_, users in enumerate([[1, 2, 3, 4, 5], [5, 6], [1, 5]], start=1):
        journal = Journal(round_, 0, 0, store.session)
        with memories.round(journal) as access:
            access.read(users)
            access.write(users, vectors(users, round_))
        assert 0 < memories._cache.bytes <= 3 * FORMAT.vector_bytes
        store.commit(round_, [journal])
        assert read(store, list(range(9)), memories).equal(read(store, list(range(9))))
    # What a round wrote that was not finished is in RAM, and is not believed.
    with memories.round(Journal(4, 0, 0, store.session)) as access:
        access.write([5], vectors([5], 4))
    assert read(store, [5], memories).equal(vectors([5], 3))


def test_what_ram_holds_spares_the_disk(tmp_path):
    store = open_store(tmp_path)
    memories = Memories(store.folder, 2**20)
    journal = Journal(1, 0, 0, store.session)
    with memories.round(journal) as access:
        access.write([5], vectors([5], 1))
    store.commit(1, [journal])
    os.truncate(store.folder / "vectors.bin", 0)
    assert read(store, [5], memories).equal(vectors([5], 1))


def test_sizes_are_those_of_the_files(tmp_path):
    sizes = MemorySizes.of(FORMAT, cohort=50, rounds=3, ram=2**30)
    store = open_store(tmp_path)
    journal = write(store, list(range(50)), 1)
    record = FORMAT.vector_bytes + 12
    assert (store.folder / journal.file).stat().st_size == 50 * record
    shutil.copy(store.folder / journal.file, tmp_path / "kept")
    store.commit(1, [journal])
    parts = [store.folder / "index.bin", store.folder / "vectors.bin", tmp_path / "kept"]
    assert sizes.most == sum(path.stat().st_size for path in parts)
    assert sizes.each == 28
    assert sizes.expected == sizes.most  # everybody takes part in every round
    few = MemorySizes.of(FORMAT, cohort=5, rounds=3, ram=2**30)
    taking_part = 50 * (1 - 0.9**3)
    at_once = 5 + 5 * 5**0.5
    assert few.expected == pytest.approx(28 * taking_part + 40 * at_once + 50 * 32, abs=2)


def test_a_disk_that_is_too_small_is_said_before_the_run(tmp_path, monkeypatch):
    format_ = MemoryFormat(population=10_000, parameters=200_000, dtype="float32", fingerprint="")
    sizes = MemorySizes.of(format_, cohort=64, rounds=60, ram=2**30)
    assert sizes.sentence() == (
        "what users keep takes 781.2 KiB a participating user: at most 7.53 GiB on disk "
        "(2.46 GiB expected) and 1.00 GiB in RAM"
    )
    usage = namedtuple("usage", "free")
    for free, refused in ((8, None), (5, "warning"), (2, "error")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free * 2**30))
        if refused == "error":
            with pytest.raises(InputError, match=r"^run_dir: its disk has 2.00 GiB free"):
                sizes.check_space(tmp_path / "not" / "there")
        else:
            warning = sizes.check_space(tmp_path / "not" / "there")
            assert (warning is not None) == (refused == "warning")


def test_a_worker_that_does_not_see_the_store_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="run_dir must lie on a disk that all machines"):
        Memories(tmp_path / "memory", 0)
