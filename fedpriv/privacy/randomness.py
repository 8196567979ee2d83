"""Randomness has owners: one generator for each purpose, round and user.

A user is its stable id here, never its place in a list: places change with who else is there, and
then one person would decide what others draw.

A simulation derives every generator from its seed, so that a round that is run again draws the
same cohort and the same noise. A deployment draws all randomness from the operating system, the
nodes theirs by themselves; such a seed lives in memory only and is never stored.
"""

from __future__ import annotations

import enum
import hashlib
import os
import secrets
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

# Numbers that one generator draws in one go.
_PIECE = 2**19


class Purpose(enum.IntEnum):
    """What a generator is for. The numbers are part of the seed derivation: never reuse one."""

    SAMPLING = 1
    NOISE = 2
    LOCAL_TRAINING = 3
    SERVER = 4
    PRETRAINING = 5
    AUDIT = 6
    EXAMPLE_SAMPLING = 7
    EXAMPLE_NOISE = 8
    EXAMPLE_DROPOUT = 9
    EXAMPLE_AUGMENTATION = 10
    NOISE_SHARE = 12
    USER_NOISE = 13
    STEP_ORDER = 14
    KEPT_EXAMPLES = 15
    CHOSEN_USERS = 16
    JOINED_EXAMPLES = 17
    TRIALS = 18


def id_words(stable_id: str) -> tuple[int, ...]:
    """Return 128 bits of the SHA-256 of an id, as four words: a part of a generator's path.

    All ids give as many words, so that no path is another one's by accident.
    """
    digest = hashlib.sha256(stable_id.encode("utf-8", "surrogatepass")).digest()
    return struct.unpack(">4I", digest[:16])


def group_of(stable_id: str, groups: int, kind: str = "group") -> int:
    """Return the group of a user, of `groups`: a public function of its id, and of nothing else.

    Divisions of another `kind` are independent of this one.
    """
    named = kind.encode() + b"/" + stable_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(named).digest()) % groups


@dataclass(frozen=True)
class Randomness:
    """The source of all generators of a run.

    `root` is the entropy that every generator derives from. It is kept out of `repr`, because in
    a deployment whoever knows it can subtract the noise.
    """

    root: int = field(repr=False)
    reproducible: bool

    @classmethod
    def simulation(cls, seed: int, run: str = "") -> Randomness:
        """Return reproducible randomness: good for a study, worthless for protecting anyone.

        Two runs with one seed and different settings must share neither noise nor cohorts: the
        difference of their releases would be free of noise, and their costs would not add up. So
        sampling and noise also derive from `run`, the fingerprint of the configuration.
        """
        if not run:
            return cls(root=seed, reproducible=True)
        digest = hashlib.sha256(f"{seed}/{run}".encode()).digest()
        return cls(root=int.from_bytes(digest), reproducible=True)

    @classmethod
    def operating_system(cls) -> Randomness:
        """Return randomness seeded with 256 bits from the operating system."""
        return cls(root=secrets.randbits(256), reproducible=False)

    def numpy(self, purpose: Purpose, *path: int) -> np.random.Generator:
        """Return the NumPy generator of `purpose` at `path`, such as (round, attempt).

        A user's own stream is at `(..., *id_words(user_id))`.
        """
        return np.random.default_rng(self._sequence(purpose, path))

    def torch_seed(self, purpose: Purpose, *path: int) -> int:
        """Return the 64-bit seed for a torch generator of `purpose` at `path`."""
        return int(self._sequence(purpose, path).generate_state(1, np.uint64)[0])

    def torch(
        self, purpose: Purpose, *path: int, device: torch.device | str = "cpu"
    ) -> torch.Generator:
        """Return the torch generator of `purpose` at `path`, such as (round, part).

        Generators of different kinds of devices draw different numbers.
        """
        return torch.Generator(device).manual_seed(self.torch_seed(purpose, *path))

    def _sequence(self, purpose: Purpose, path: tuple[int, ...]) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.root, spawn_key=(int(purpose), *path))


def standard_normal(size: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return `size` independent standard normal numbers, on as many processors as there are.

    More than `_PIECE` of them are drawn in pieces, each by a generator of its own, whose seed comes
    from 256 bits that `generator` draws: no generator of a `Randomness` is seeded so. Pieces do not
    depend on the machine, so neither do the numbers.
    """
    if size <= _PIECE:
        return generator.standard_normal(size)
    drawn = np.empty(size)
    pieces = [drawn[low : low + _PIECE] for low in range(0, size, _PIECE)]

    def fill(piece: NDArray[np.float64], own: np.random.Generator) -> None:
        own.standard_normal(out=piece)

    seeds = np.random.SeedSequence(generator.integers(2**32, size=8).tolist()).spawn(len(pieces))
    with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1)) as threads:
        list(threads.map(fill, pieces, map(np.random.default_rng, seeds)))
    return drawn
