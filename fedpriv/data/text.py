"""Characters as numbers: what a speech model writes with."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fedpriv.data.files import is_clean, text_lines
from fedpriv.errors import InputError

BLANK = 0
"""CTC's blank (Graves et al. 2006): index 0 of every alphabet, and of no character."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The words for 0 to 9."""

ENGLISH = " 'abcdefghijklmnopqrstuvwxyz"


def normalise(text: str) -> str:
    """Return a transcript as it is compared: NFKC, lower case, single spaces, no punctuation.

    The apostrophe stays, also the typographic one, which becomes the plain one.

    >>> normalise("  Well, it’s TWO—o'clock. ")
    "well it's two o'clock"
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = [
        c if c == "'" or unicodedata.category(c)[0] in "LMN" else " "  # letters, marks, digits
        for c in text
    ]
    return " ".join("".join(kept).split())


@dataclass(frozen=True)
class Alphabet:
    """The characters that a model can write, in the order of their indices, which begin at 1."""

    characters: str

    def __post_init__(self) -> None:
        if not self.characters or len(set(self.characters)) < len(self.characters):
            raise ValueError("an alphabet has characters, each once")

    @classmethod
    def of(cls, texts: Iterable[str]) -> Alphabet:
        """Return the characters of normalised *public* texts, sorted.

        Of private texts it would be a release that no ledger charges.
        """
        return cls("".join(sorted(set().union(*(normalise(text) for text in texts)))))

    @classmethod
    def read(cls, path: Path) -> Alphabet:
        """Read a file with one character a line; a line with one space stands for the space.

        Raises:
            InputError: no such file, or a line that is not one new character.
        """
        try:
            characters = [line for _, line in text_lines(path) if line]
        except OSError as error:
            raise InputError(f"data.speech.alphabet: cannot read {path} ({error})") from None
        if not all(map(is_clean, characters)):
            raise InputError(f"data.speech.alphabet: cannot read {path} (it is not UTF-8)")
        for number, character in enumerate(characters, 1):
            if len(character) != 1 or character in characters[: number - 1]:
                raise InputError(
                    f"data.speech.alphabet: {path}: entry {number} is {character!r}; write one "
                    "character a line, each once"
                )
        unheard = [c for c in characters if c != " " and normalise(c) != c]
        if unheard:
            raise InputError(
                f"data.speech.alphabet: {path}: {unheard[0]!r} never occurs in a transcript, which "
                "is lower case and without punctuation but for the apostrophe"
            )
        if not characters:
            raise InputError(f"data.speech.alphabet: {path} is empty; write one character a line")
        return cls("".join(characters))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {character: index for index, character in enumerate(self.characters, 1)}

    @property
    def classes(self) -> int:
        """Number of characters, and one for the blank."""
        return len(self.characters) + 1

    def encode(self, text: str) -> Tensor:
        """Return the indices of a normalised text: int64 `[characters]`.

        Raises:
            InputError: a character that is not in the alphabet.
        """
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise InputError(f"the transcript {text!r} has unknown characters {''.join(unknown)!r}")
        return torch.tensor([self._index[c] for c in text], dtype=torch.int64)

    def decode(self, indices: Iterable[int]) -> str:
        """Return the text of indices; blanks write nothing."""
        return "".join(self.characters[index - 1] for index in indices if index != BLANK)
