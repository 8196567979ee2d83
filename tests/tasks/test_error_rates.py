import doctest
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.data.text import normalise
from fedpriv.tasks import error_rates as module
from fedpriv.tasks.error_rates import error_rates

TEXTS = st.text("ab '", max_size=12).map(normalise)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)


def alignments(said: list[str], written: list[str]) -> set[tuple[int, int, int]]:
    """(substitutions, insertions, deletions) of every alignment with the fewest edits."""

    @cache
    def of(i: int, j: int) -> frozenset[tuple[int, int, int]]:
        if i == 0 or j == 0:
            return frozenset({(0, j, i)})
        changed = said[i - 1] != written[j - 1]
        found = {(s + changed, n, d) for s, n, d in of(i - 1, j - 1)}
        found |= {(s, n + 1, d) for s, n, d in of(i, j - 1)}
        found |= {(s, n, d + 1) for s, n, d in of(i - 1, j)}
        fewest = min(map(sum, found))
        return frozenset(edits for edits in found if sum(edits) == fewest)

    return set(of(len(said), len(written)))


def distance(said: list[str], written: list[str]) -> int:
    return sum(alignments(said, written).pop())


@settings(max_examples=200, deadline=None)
@given(PAIRS.filter(lambda pairs: any(said for said, _ in pairs)))
def test_rates_are_the_edits_of_the_corpus_over_its_size(pairs):
    rates = error_rates([said for said, _ in pairs], [written for _, written in pairs])
    words = [(said.split(), written.split()) for said, written in pairs]
    characters = [(list(said), list(written)) for said, written in pairs]
    assert rates.words == sum(len(said) for said, _ in words)
    assert rates.characters == sum(len(said) for said, _ in characters)
    assert rates.wer == pytest.approx(sum(distance(*one) for one in words) / rates.words)
    assert rates.cer == pytest.approx(sum(distance(*one) for one in characters) / rates.characters)


@settings(max_examples=200, deadline=None)
@given(TEXTS.filter(bool), TEXTS)
def test_the_counts_are_those_of_an_alignment_with_the_fewest_edits(said, written):
    rates = error_rates([said], [written])
    counts = (rates.substitutions, rates.insertions, rates.deletions)
    assert counts in alignments(said.split(), written.split())


def test_an_empty_reference_makes_everything_an_insertion():
    rates = error_rates(["", "one two", ""], ["a bc", "one two", ""])
    assert (rates.substitutions, rates.insertions, rates.deletions) == (0, 2, 0)
    assert (rates.wer, rates.cer) == (2 / 2, 4 / 7)


def test_an_empty_hypothesis_makes_everything_a_deletion():
    rates = error_rates(["one two"], [""])
    assert (rates.wer, rates.cer, rates.deletions) == (1.0, 1.0, 2)


@pytest.mark.parametrize("references", [[], ["", " "]])
def test_without_a_word_there_is_no_rate(references):
    with pytest.raises(ValueError, match="at least one word"):
        error_rates(references, ["a"] * len(references))


def test_each_reference_has_a_hypothesis():
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        error_rates(["a", "b"], ["a"])


def test_the_example_is_right():
    assert doctest.testmod(module) == (0, 2)
