"""Recordings in sound files: wav, flac, ogg and mp3, at any rate, with any number of channels."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpriv.data.files import failure
from fedpriv.data.sound_bytes import SoundBytes
from fedpriv.errors import FedprivError, InputError

RATES = range(1_000, 384_001)
"""Sample rates (Hz) that a sound file may have; any other is taken for a wrong header."""

COMPLETE = 0.95
"""Least share of the samples that a header promises: an mp3's promise is a little inexact."""

UNKNOWN = 2**62
"""From this number of samples on libsndfile means "unknown"."""

LOUDEST = 2.0
"""Largest sample that lossy coding, or mixing, can have made of full scale, which is 1."""

FORMATS = {"WAV", "WAVEX", "FLAC", "OGG", "MPEG", "MP3"}
"""What is read, in libsndfile's words. Of its other formats it takes a cut file for a whole one."""

BLOCK = 2**18
"""Samples of all channels that are decoded at once."""


@dataclass(frozen=True, slots=True)
class AudioFile:
    """A sound file and what is said in it: a `Recording`.

    The path is text because data sets list a million of them and a Path is four times as large.
    """

    path: str
    text: str | None

    def __str__(self) -> str:
        return self.path

    @property
    def files(self) -> tuple[str, ...]:
        """The file."""
        return (self.path,)

    @property
    def trait(self) -> str:
        """Nothing: all of its sound is in the file."""
        return ""

    def read(self, sample_rate: int, max_seconds: float) -> NDArray[np.float32]:
        """Read the sound: see `read_audio`."""
        return read_audio(Path(self.path), sample_rate, max_seconds)


@dataclass(frozen=True, slots=True)
class BadRow(AudioFile):
    """A row of a table, or a line of a list, that names no recording: it counts as a bad one.

    `path` says where it stands and what is wrong with it.
    """

    text: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def trait(self) -> str:
        """Where it stands, without the folder, and what is wrong with it."""
        return os.path.basename(self.path)

    def read(self, sample_rate: int, max_seconds: float) -> NDArray[np.float32]:
        """Raise InputError, which says what is wrong."""
        raise InputError(self.path)


@dataclass(frozen=True, slots=True)
class JoinedFiles:
    """Sound files that are heard one after the other, with silences between them: a `Recording`."""

    paths: tuple[Path, ...]
    text: str | None
    pause_seconds: float

    def __str__(self) -> str:
        return " + ".join(map(str, self.paths))

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in their order."""
        return self.paths

    @property
    def trait(self) -> str:
        """How many there are, and the silence between them."""
        return f"{len(self.paths)} {self.pause_seconds!r}"

    def read(self, sample_rate: int, max_seconds: float) -> NDArray[np.float32]:
        """Read the files and join them; `max_seconds` holds for the whole, silences included.

        Raises InputError as `read_audio` does.
        """
        pause = np.zeros(round(self.pause_seconds * sample_rate), dtype=np.float32)
        pieces = [read_audio(self.paths[0], sample_rate, max_seconds)]
        for path in self.paths[1:]:
            pieces += [pause, read_audio(path, sample_rate, max_seconds)]
        joined = np.concatenate(pieces)
        require_length(str(self), len(joined) / sample_rate, max_seconds)
        return joined


def read_audio(path: Path, sample_rate: int, max_seconds: float) -> NDArray[np.float32]:
    """Read a sound file as one channel at `sample_rate` (Hz): float32 `[samples]` in [-1, 1].

    Channels are averaged. Another rate is resampled with `scipy.signal.resample_poly`: a
    low-pass filter without delay that is exact for every ratio of rates and needs no compiled
    part beyond scipy's. What lossy coding or the filter puts beyond [-1, 1] is clipped.

    How long the sound is follows from decoding it, in blocks and at most until it is longer than
    `max_seconds`: what a header says of its length may be missing or wrong.

    Raises:
        InputError: no sound file, an empty, damaged or truncated one, samples that are not
            finite or far beyond full scale, or more than `max_seconds`.
        EnvironmentFault: the machine does not let the file be read.
        FedprivError: soundfile is not installed.
    """
    load_soundfile()
    try:
        with SoundBytes(path) as source:
            wave, rate = _decoded(path, source, max_seconds)
    except OSError as error:
        raise failure(path, error) from None
    except ValueError:
        raise InputError(f"{str(path)!r}: no file can have this name") from None
    return _resample(wave, rate, sample_rate)


def load_soundfile() -> ModuleType:
    """Import soundfile, which only recordings need; a builder calls it to fail early.

    Raises FedprivError where it or its library, libsndfile, is not installed: no InputError,
    for it is no recording's fault and must not be skipped.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise FedprivError(
            f"recordings are read with soundfile, which does not load here ({error}); "
            "pip install soundfile"
        ) from None
    return soundfile


def require_length(name: str, seconds: float, max_seconds: float) -> None:
    """Raise InputError when a recording is longer than `data.speech.max_seconds`."""
    if seconds > max_seconds:
        raise InputError(
            f"{name}: {seconds:.1f} s is longer than data.speech.max_seconds ({max_seconds:g})"
        )


def _decoded(path: Path, source: SoundBytes, max_seconds: float) -> tuple[NDArray[np.float32], int]:
    """Return the sound as one channel, and its sample rate."""
    try:
        file = _forward_reader()(source)
    except Exception:
        # Whatever it raises is about this file, and libsndfile's own reasons mislead: for a
        # damaged mp3 it says "does not exist".
        raise InputError(
            f"{path}: not a wav, flac, ogg or mp3 file, or its header is damaged; replace it"
        ) from None
    with file:
        if file.format not in FORMATS:
            raise InputError(
                f"{path}: is a {file.format_info} file, and only wav, flac, ogg and mp3 are read; "
                "convert it"
            )
        if file.samplerate not in RATES:
            raise InputError(f"{path}: wrong header: a sample rate of {file.samplerate} Hz")
        promised, most = source.promised or file.frames, max_seconds * file.samplerate
        waves, frames = [np.zeros(0, dtype=np.float32)], 0
        for block in _blocks(path, file, source.promised):
            waves.append(_mono(path, block))
            frames += len(block)
            if frames > most:
                raise InputError(f"{path}: longer than data.speech.max_seconds ({max_seconds:g})")
        if promised < UNKNOWN and frames < COMPLETE * promised:
            raise InputError(f"{path}: truncated: {frames} of {promised} samples; replace it")
        return np.concatenate(waves), file.samplerate


def _blocks(path: Path, file: Any, promised: int) -> Iterator[NDArray[np.float32]]:
    """Yield what there is, float32 `[frames, channels]`, some at a time.

    `promised` is where a block should end, 0 for unknown: a tag that follows the last sample is
    no sound.
    """
    most, heard = max(1, BLOCK // file.channels), 0
    while True:
        left = promised - heard
        try:
            frames = min(most, left) if left > 0 else most
            block = file.read(frames, dtype="float32", always_2d=True)
        except MemoryError:
            raise
        except Exception:
            if heard == promised > 0:
                return
            raise InputError(f"{path}: damaged or truncated; replace it") from None
        if len(block) == 0:
            return
        yield block
        heard += len(block)


@cache
def _forward_reader() -> type[Any]:
    """Return soundfile's reader as one that never seeks.

    Between two reads soundfile seeks to where it is. That fails where libsndfile does not know
    the length (FLAC) or cannot seek at all (GSM 6.10), and in mp3 it is not exact.
    """

    class ForwardReader(load_soundfile().SoundFile):  # type: ignore[misc]
        def seekable(self) -> bool:
            return False

    return ForwardReader


def _mono(path: Path, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average the channels of `[samples, channels]`, clipped to [-1, 1]."""
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: has samples that are not finite; replace it")
    loudest = float(np.abs(samples).max(initial=0))
    if loudest > LOUDEST:
        raise InputError(
            f"{path}: its samples go up to {loudest:.4g} where 1 is full scale, as those of a "
            "float file do that were never divided by 32768; scale them to [-1, 1]"
        )
    return np.clip(samples, -1, 1).mean(axis=1)


def _resample(wave: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    if rate == wanted or len(wave) == 0:
        return wave
    # Imported here: it takes most of a second, and few data sets are sound of another rate.
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return np.clip(resample_poly(wave, wanted // common, rate // common), -1, 1)
