"""espeak-ng, which speaks in processes of its own: the sound of made-up speakers."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from fedpriv.errors import FedprivError, InputError

ACCENTS = {
    "en-gb": "en",
    "en-us": "en-US",
    "en-gb-scotland": "en-GB-scotland",
    "en-gb-x-rp": "en-GB-x-rp",
    "en-gb-x-gbclan": "en-GB-x-gbclan",
    "en-gb-x-gbcwmd": "en-GB-x-gbcwmd",
    "en-029": "en-029",
    "en-us-nyc": "en-US-nyc",
}
"""The accents of English: how espeak-ng calls each, and its file in `ACCENT_FOLDER`."""

ACCENT_FOLDER = "lang/gmw"
WORKER = Path(__file__).with_name("espeak_worker.py")

PEAK = 0.7 * 32767
"""Every recording is made this loud, as the largest of its int16 samples."""


@dataclass(frozen=True)
class Speaker:
    """Somebody made up, and what they say.

    Attributes:
        accent: one of `ACCENTS`.
        voice: how the voice differs from the accent's: lines of espeak-ng's voice files.
        seed: of the noise in the voice, 0 or more.
        texts: each of them is one recording.
    """

    accent: str
    voice: str
    seed: int
    texts: tuple[str, ...]


class Espeak:
    """A process that speaks for one speaker after the other, as a context manager.

    A speaker always sounds the same, to the last bit, whoever spoke before; with another
    version of espeak-ng it may be a little different.
    """

    def __init__(self) -> None:
        """Start the process. Raises InputError when espeak-ng is not installed."""
        library, data = locate()
        self._accents = Path(data, ACCENT_FOLDER)
        self._folder = tempfile.TemporaryDirectory(prefix="fedpriv-espeak-")
        Path(self._folder.name, "espeak-ng-data").symlink_to(data)
        self._process = subprocess.Popen(
            # -P: what lies beside the worker must not be taken for the standard library.
            [sys.executable, "-P", str(WORKER), library],
            cwd=self._folder.name,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for this process, which then ends that one
        )

    def __enter__(self) -> Espeak:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the process at once; a `speak` that another thread is waiting for raises."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError), self._process:  # closes its pipes and waits for it
            pass
        self._folder.cleanup()

    def speak(self, speaker: Speaker, sample_rate: int) -> list[NDArray[np.int16]]:
        """Return the sound of each text, mono, at `sample_rate` (Hz): int16 `[samples]`.

        Raises FedprivError when the process has ended.
        """
        accent = (self._accents / ACCENTS[speaker.accent]).read_text(encoding="utf-8")
        request = json.dumps({"seed": speaker.seed, "texts": speaker.texts})
        source, sink = cast(IO[bytes], self._process.stdout), cast(IO[bytes], self._process.stdin)
        try:
            Path(self._folder.name, "voice").write_text(f"{accent}\n{speaker.voice}\n")
            sink.write(request.encode() + b"\n")
            sink.flush()
            header = json.loads(source.readline())
            lengths = header["samples"]
            # The count makes it a ValueError when the process ended within the sound.
            sound = np.frombuffer(source.read(2 * sum(lengths)), np.int16, count=sum(lengths))
        except (OSError, ValueError):
            raise FedprivError("espeak-ng ended before it had spoken") from None
        return [
            resample(one, header["sample_rate"], sample_rate)
            for one in np.split(sound, np.cumsum(lengths[:-1]))
        ]


def locate() -> tuple[str, str]:
    """Return the paths of espeak-ng's library and data. Raises InputError without them."""
    try:
        import espeakng_loader  # an optional package, because it is under the GPL
    except ImportError:
        raise InputError(
            "synthetic speech needs espeak-ng: pip install 'fedpriv[synthetic-speech]'"
        ) from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def resample(sound: NDArray[np.int16], rate: int, wanted: int) -> NDArray[np.int16]:
    """Return `sound` `[samples]` at another rate (Hz), scaled to `PEAK`; silence stays silence."""
    wave = sound.astype(np.float32)
    if rate != wanted:
        from scipy.signal import resample_poly  # most of a second

        common = math.gcd(rate, wanted)
        up, down = wanted // common, rate // common
        wave = resample_poly(wave, up, down, window=_low_pass(max(up, down)))
    loudest = np.abs(wave).max(initial=0)
    return np.rint(wave * (PEAK / loudest if loudest else 0)).astype(np.int16)


@cache
def _low_pass(factor: int) -> NDArray[np.float32]:
    """Design `resample_poly`'s own filter, which takes it longer than to apply it."""
    from scipy.signal import firwin

    return firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0)).astype(np.float32)
