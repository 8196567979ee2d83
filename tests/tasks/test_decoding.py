import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.data.text import BLANK
from fedpriv.tasks.decoding import decoder, greedy, prefix_beam

SEEDS = st.integers(0, 2**31)


def random_scores(
    seed: int, count: int, frames: int, classes: int, scale: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities and lengths; a tenth of the probabilities is small."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, frames, classes, generator=generator) * scale
    logits[torch.rand(logits.shape, generator=generator) < 0.1] -= 8.0
    lengths = torch.randint(0, frames + 1, (count,), generator=generator)
    return logits.log_softmax(dim=-1), lengths


def collapse(path: list[int]) -> list[int]:
    labels = []
    previous = BLANK
    for label in path:
        if label not in (previous, BLANK):
            labels.append(label)
        previous = label
    return labels


def probabilities(log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The probability of every labelling of `[frames, classes]`: the sum over all paths."""
    frames = log_probs.double().exp().tolist()
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(frames)):
        found[tuple(collapse(list(path)))] += math.prod(
            frame[label] for frame, label in zip(frames, path, strict=True)
        )
    return found


def plain_prefix_beam(log_probs: torch.Tensor, width: int) -> list[int]:
    """Hannun et al. 2014, algorithm 1, with plain probabilities: one frame, one prefix at a time.

    Each prefix has the probability of its paths that end in a blank, and of those that do not.
    """
    beam = {(): (1.0, 0.0)}
    for frame in log_probs.double().exp().tolist():
        following: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for prefix, (blank, label) in beam.items():
            following[prefix][0] += (blank + label) * frame[BLANK]
            for c in range(1, len(frame)):
                if prefix and c == prefix[-1]:
                    following[prefix][1] += label * frame[c]
                    following[(*prefix, c)][1] += blank * frame[c]
                else:
                    following[(*prefix, c)][1] += (blank + label) * frame[c]
        ranked = sorted(following.items(), key=lambda item: -sum(item[1]))
        beam = {prefix: (blank, label) for prefix, (blank, label) in ranked[:width]}
    return list(max(beam, key=lambda prefix: sum(beam[prefix])))


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(0, 12), st.integers(2, 4))
def test_greedy_collapses_the_best_path(seed, count, frames, classes):
    log_probs, lengths = random_scores(seed, count, frames, classes)
    paths = [
        row[:length].argmax(dim=-1).tolist()
        for row, length in zip(log_probs, lengths.tolist(), strict=True)
    ]
    assert greedy(log_probs, lengths) == [collapse(path) for path in paths]


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(0, 5), st.integers(2, 4))
def test_a_beam_that_keeps_everything_finds_the_most_probable_labelling(seed, frames, classes):
    log_probs, lengths = random_scores(seed, 3, frames, classes)
    written = prefix_beam(log_probs, lengths, width=classes**frames)
    for row, length, labels in zip(log_probs, lengths.tolist(), written, strict=True):
        truth = probabilities(row[:length])
        assert truth[tuple(labels)] == pytest.approx(max(truth.values()), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(0, 30), st.integers(2, 5))
def test_a_narrow_beam_is_that_of_the_plain_algorithm(seed, width, frames, classes):
    log_probs, lengths = random_scores(seed, 4, frames, classes, scale=1.0)
    assert prefix_beam(log_probs, lengths, width) == [
        plain_prefix_beam(row[:length], width)
        for row, length in zip(log_probs, lengths.tolist(), strict=True)
    ]


def test_a_beam_adds_up_paths_where_greedy_takes_one():
    # "a" has 0.4·0.4 + 2·0.6·0.4 = 0.64 in three paths, the empty text 0.36 in the best one.
    log_probs = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()
    assert greedy(log_probs, torch.tensor([2])) == [[]]
    assert prefix_beam(log_probs, torch.tensor([2]), width=4) == [[1]]


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_certain_frames_are_read_as_written(name):
    path = torch.tensor([[1, 1, 0, 1, 2, 2, 0, 0, 2, 1]])
    log_probs = torch.nn.functional.one_hot(path, 3).float().log()  # 0 and -inf
    assert decoder(name)(log_probs, torch.tensor([10])) == [[1, 1, 2, 2, 1]]
    assert decoder(name)(log_probs, torch.tensor([6])) == [[1, 1, 2]]


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_padding_and_the_other_utterances_change_nothing(name):
    log_probs, lengths = random_scores(7, 20, 30, 6)
    alone = [
        decoder(name, width=4)(log_probs[i : i + 1, :length], lengths[i : i + 1])[0]
        for i, length in enumerate(lengths.tolist())
    ]
    before = log_probs.clone()
    assert decoder(name, width=4)(log_probs, lengths) == alone
    assert torch.equal(log_probs, before)


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_a_frame_with_a_nan_writes_nothing(name):
    path = torch.tensor([[1, 1, 2]])
    log_probs = torch.nn.functional.one_hot(path, 3).float().log()
    log_probs[0, 1, 2] = math.nan
    assert decoder(name)(log_probs, torch.tensor([3])) == [[1, 2]]
    assert decoder(name)(log_probs * math.nan, torch.tensor([3])) == [[]]


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_nothing_is_written_for_no_frames_or_no_utterances(name):
    assert decoder(name)(torch.zeros(2, 0, 3), torch.tensor([0, 0])) == [[], []]
    assert decoder(name)(torch.zeros(0, 5, 3), torch.zeros(0, dtype=torch.int64)) == []
