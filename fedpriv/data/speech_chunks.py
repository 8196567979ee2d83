"""Files of recordings: the sound of several in one file, and an index beside it."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpriv.data.audio import require_length
from fedpriv.data.files import unreachable
from fedpriv.errors import DamagedFile

FULL_SCALE = 32768
"""What int16 samples are divided by to lie in [-1, 1]."""


@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """A file of recordings, one after the other.

    Attributes:
        path: the sound, int16 `[samples]` as NumPy saves it; the index is `path` with `.json`.
        sample_rate: in Hz.
        texts: the transcript of each recording.
        starts: the first sample of each recording, and last the number of samples in all.
        checksums: CRC-32 of each recording's transcript and sound.
    """

    path: Path
    sample_rate: int
    texts: tuple[str, ...]
    starts: tuple[int, ...]
    checksums: tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class ChunkRecording:
    """One recording of a chunk: a `Recording` that costs nothing until it is read."""

    chunk: Chunk
    index: int

    def __str__(self) -> str:
        return f"{self.chunk.path}, recording {self.index}"

    @property
    def text(self) -> str:
        """The transcript."""
        return self.chunk.texts[self.index]

    @property
    def files(self) -> tuple[()]:
        """None: the checksum tells."""
        return ()

    @property
    def trait(self) -> str:
        """The checksum of its transcript and sound."""
        return str(self.chunk.checksums[self.index])

    @property
    def seconds(self) -> float:
        """How long it is."""
        first, end = self.chunk.starts[self.index : self.index + 2]
        return (end - first) / self.chunk.sample_rate

    def read(self, sample_rate: int, max_seconds: float) -> NDArray[np.float32]:
        """Return the waveform, in [-1, 1]: `[samples]`.

        Raises:
            InputError: it is longer than `max_seconds`.
            DamagedFile: the file is not what was written. No InputError, for it is no
                recording's fault and must not be skipped.
            EnvironmentFault: the machine does not let the file be read.
            ValueError: another sample rate (Hz) than the chunk's.
        """
        chunk = self.chunk
        if sample_rate != chunk.sample_rate:
            raise ValueError(f"recorded at {chunk.sample_rate} Hz, asked for at {sample_rate} Hz")
        require_length(str(self), self.seconds, max_seconds)
        first, end = chunk.starts[self.index : self.index + 2]
        sound = _map(chunk.path, chunk.starts[-1])[first:end]
        if _checksum(sound, self.text) != chunk.checksums[self.index]:
            raise _damaged(chunk.path)
        return np.divide(sound, FULL_SCALE, dtype=np.float32)


def write_chunk(path: Path, sounds: Sequence[NDArray[np.int16]], texts: Sequence[str]) -> None:
    """Write recordings (int16 `[samples]` each) with their transcripts as the chunk `path`.

    Each file appears at once and the index last, so that a chunk is there entirely or not at
    all, also when others write the same one at the same time. Raises OSError.
    """
    index = {
        "texts": list(texts),
        "samples": [len(sound) for sound in sounds],
        "crc32": [_checksum(sound, text) for sound, text in zip(sounds, texts, strict=True)],
    }
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        sound_file, index_file = Path(folder, "sound.npy"), Path(folder, "index.json")
        np.save(sound_file, np.concatenate(sounds))
        index_file.write_text(json.dumps(index), encoding="utf-8")
        sound_file.replace(path)
        index_file.replace(_index(path))


def has_chunk(path: Path) -> bool:
    """Say whether a chunk has been written."""
    return path.exists() and _index(path).exists()


def read_chunk(path: Path, sample_rate: int, recordings: int) -> Chunk:
    """Read the index of a chunk that has so many recordings, made at `sample_rate` (Hz).

    The sound is checked for its length here, and for its content when it is read. Raises
    DamagedFile, naming the file, for one that is not what was written.
    """
    try:
        index = json.loads(_index(path).read_text(encoding="utf-8"))
        texts, lengths, checksums = index["texts"], index["samples"], index["crc32"]
        starts = (0, *np.cumsum(lengths, dtype=np.int64).tolist())
        whole = len(texts) == len(lengths) == len(checksums) == recordings
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        whole = False
    except OSError as error:
        raise unreachable(_index(path), error) from None
    if not whole:
        raise _damaged(_index(path))
    _map(path, starts[-1])
    return Chunk(path, sample_rate, tuple(texts), starts, tuple(checksums))


def _index(path: Path) -> Path:
    return path.with_suffix(".json")


def _map(path: Path, samples: int) -> NDArray[np.int16]:
    # Mapped anew each time: a mapping that is kept keeps a file open, and there are many.
    try:
        sound = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        raise _damaged(path) from None
    except OSError as error:
        raise unreachable(path, error) from None
    if sound.dtype != np.int16 or sound.shape != (samples,):
        raise _damaged(path)
    return sound


def _checksum(sound: NDArray[np.int16], text: str) -> int:
    return zlib.crc32(sound.tobytes(), zlib.crc32(text.encode()))


def _damaged(path: Path) -> DamagedFile:
    return DamagedFile(f"{path} is damaged: remove it, and it will be made again")
