"""Recordings in sound files: wav, flac, ogg and mp3, at any rate, with any number of channels."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from fedpriv.errors import FedprivError, InputError

RATES = range(1_000, 384_001)
"""Sample rates (Hz) that a sound file may have; any other is taken for a wrong header."""

COMPLETE = 0.95
"""Least share of the samples that a header promises: an mp3's promise is a little inexact."""

PIPED = 0x7FFF0000
"""From this size on a wav header means "unknown": it was written into a pipe."""


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
    def files(self) -> tuple[str]:
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

    Raises:
        InputError: no sound file, an empty, damaged or truncated one, samples that are not
            finite, or more than `max_seconds` by its header, in which case nothing is decoded.
        FedprivError: soundfile is not installed.
    """
    soundfile = load_soundfile()
    _require_whole(path)
    try:
        file = soundfile.SoundFile(path)
    except soundfile.SoundFileError:
        # libsndfile's own reasons mislead here: for a damaged mp3 it says "does not exist".
        raise InputError(
            f"{path}: not a wav, flac, ogg or mp3 file, or its header is damaged; replace it"
        ) from None
    with file:
        if file.samplerate not in RATES:
            raise InputError(f"{path}: wrong header: a sample rate of {file.samplerate} Hz")
        require_length(str(path), file.frames / file.samplerate, max_seconds)
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except soundfile.SoundFileError:
            raise InputError(f"{path}: damaged or truncated; replace it") from None
        if len(samples) < COMPLETE * file.frames:
            raise InputError(
                f"{path}: truncated: {len(samples)} of {file.frames} samples; replace it"
            )
        return _resample(_mono(path, samples), file.samplerate, sample_rate)


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


def _require_whole(path: Path) -> None:
    """Raise InputError for no file, an empty one, or a wav file that was cut off.

    libsndfile reads what is left of a cut wav file, and the transcript would no longer fit.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if size == 0:
        raise InputError(f"{path}: empty, 0 bytes; replace it")
    if len(head) == 8 and head.startswith(b"RIFF"):
        (promised,) = struct.unpack("<I", head[4:])
        if size < promised < PIPED:
            raise InputError(f"{path}: truncated: {size} of {promised} bytes; replace it")


def _mono(path: Path, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average the channels of `[samples, channels]`, clipped to [-1, 1]."""
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: has samples that are not finite; replace it")
    return np.clip(samples, -1, 1).mean(axis=1)


def _resample(wave: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    if rate == wanted or len(wave) == 0:
        return wave
    # Imported here: it takes most of a second, and few data sets are sound of another rate.
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return np.clip(resample_poly(wave, wanted // common, rate // common), -1, 1)
