"""The made-up speakers of synthetic speech: their accents, their voices and what they say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpriv.data.espeak import ACCENTS, Speaker
from fedpriv.data.text import DIGITS

FEWEST_DIGITS, MOST_DIGITS = 3, 7
"""In an utterance; each number as often. Nine in ten take 1.2 to 3.0 seconds."""

STREAM = 0x73706B72
"""Keeps the speakers' random numbers apart from all others ("spkr" in ASCII)."""

LOWEST_PITCH, HIGHEST_PITCH = 85.0, 230.0
"""Of the voices (Hz): those of low men and of high women."""

FORMANTS = range(9)
"""espeak-ng's resonances of the vocal tract, by its own numbers."""


@dataclass(frozen=True)
class Split:
    """Any number of speakers for one purpose; those of other splits are other people.

    Attributes:
        name: what its files are called.
        stream: numbers the stream of random numbers that its speakers come from.
        utterances: how many each of them says.
        accents: speaker i has accent i modulo how many these are.
    """

    name: str
    stream: int
    utterances: int
    accents: tuple[str, ...] = tuple(ACCENTS)

    def speaker(self, number: int) -> Speaker:
        """Make up speaker `number`, 0 or more: always the same one.

        >>> split = Split("example", stream=99, utterances=2)
        >>> split.speaker(8).accent, split.speaker(8).texts
        ('en-gb', ('two nine nine seven', 'zero one seven six seven'))
        """
        rng = np.random.default_rng(np.random.SeedSequence([STREAM, self.stream, number]))
        return Speaker(
            accent=self.accents[number % len(self.accents)],
            voice=draw_voice(rng),
            seed=int(rng.integers(2**31)),
            texts=tuple(draw_text(rng) for _ in range(self.utterances)),
        )


def draw_text(rng: np.random.Generator) -> str:
    """Draw a string of digits, in words."""
    digits = rng.integers(len(DIGITS), size=rng.integers(FEWEST_DIGITS, MOST_DIGITS + 1))
    return " ".join(DIGITS[digit] for digit in digits)


def draw_voice(rng: np.random.Generator) -> str:
    """Draw a voice, as lines of espeak-ng's voice files, mostly percentages of its own voice.

    Pitch and rate alone hardly tell speakers apart; the resonances of the vocal tract do. All
    ranges are mild, so that every voice stays easy to understand.
    """
    pitch = LOWEST_PITCH * (HIGHEST_PITCH / LOWEST_PITCH) ** rng.uniform()
    # A high voice mostly comes from a short vocal tract, whose resonances are high too.
    tract = (pitch / 140) ** 0.1 * rng.uniform(0.92, 1.08)
    lines = [
        f"pitch {pitch:.0f} {pitch * rng.uniform(1.2, 1.6):.0f}",
        f"speed {rng.uniform(65, 80):.0f}",
        f"voicing {rng.uniform(75, 110):.0f}",
        f"roughness {rng.integers(4)}",
        f"flutter {rng.integers(1, 5)}",
        f"consonants {rng.uniform(80, 120):.0f} {rng.uniform(80, 120):.0f}",
    ]
    for formant in FORMANTS:
        frequency = 100 * tract * rng.uniform(0.95, 1.05)
        height, width = rng.uniform(70, 130), rng.uniform(80, 130)
        lines.append(f"formant {formant} {frequency:.0f} {height:.0f} {width:.0f}")
    return "\n".join(lines)
