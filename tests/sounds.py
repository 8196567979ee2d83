"""Short tones as sound files, for the tests of speech data sets."""

from pathlib import Path

import numpy as np
import soundfile


def tone(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    """A sine of amplitude 0.5: float64 `[samples]`."""
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def write_tone(
    path: Path, seconds: float = 0.1, rate: int = 8_000, frequency: float = 440.0
) -> Path:
    """Write a mono tone in the format that the file's name ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, rate, frequency), rate)
    return path


def loudest_frequency(wave: np.ndarray, rate: int) -> float:
    """The frequency (Hz) with the most energy."""
    return float(np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave))
