"""How far what a model wrote is from what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpriv.tasks.intervals import bootstrap

if TYPE_CHECKING:
    from jiwer import AlignmentChunk


@dataclass(frozen=True)
class ErrorRates:
    """Edits of a whole corpus over its size, so long utterances weigh more than short ones.

    Attributes:
        wer: word error rate, (substitutions + insertions + deletions) / words. Above 1 where
            much was inserted.
        cer: the same of characters, the spaces between words included.
        substitutions: words that were written as another.
        insertions: words that were written and not said.
        deletions: words that were said and not written.
        words: number of words of the references.
        characters: number of characters of the references.
        interval: the 95% interval of `wer` by a bootstrap over utterances, as if none had to do
            with another; None for too few.
    """

    wer: float
    cer: float
    substitutions: int
    insertions: int
    deletions: int
    words: int
    characters: int
    interval: tuple[float, float] | None = None


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Compare each hypothesis with its reference by the fewest edits (Levenshtein distance).

    Both are compared as they are, but for spaces around them, so they come normalised alike. All
    that is written for an empty reference is an insertion. Where several alignments have the
    fewest edits, substitutions, insertions and deletions are those of one of them.

    Raises:
        ValueError: unequal numbers of texts, or no reference with a word.

    >>> rates = error_rates(["the cat sat", ""], ["the bat", "a"])
    >>> rates.wer, rates.substitutions, rates.insertions, rates.deletions
    (1.0, 1, 1, 1)
    """
    import jiwer  # needed for speech alone; before version 4 it refused empty references

    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    if not any(reference.strip() for reference in references):
        raise ValueError("an error rate needs a reference with at least one word")
    words = jiwer.process_words(list(references), list(hypotheses))
    characters = jiwer.process_characters(list(references), list(hypotheses))
    return ErrorRates(
        wer=words.wer,
        cer=characters.cer,
        substitutions=words.substitutions,
        insertions=words.insertions,
        deletions=words.deletions,
        words=words.hits + words.substitutions + words.deletions,
        characters=characters.hits + characters.substitutions + characters.deletions,
        interval=bootstrap(
            [sum(map(_edits, chunks)) for chunks in words.alignments],
            [len(said) for said in words.references],
        ),
    )


def _edits(chunk: AlignmentChunk) -> int:
    """Return how many words a part of an alignment has wrong."""
    if chunk.type == "equal":
        return 0
    said, written = chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
    return max(said, written)
