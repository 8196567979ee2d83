import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.tasks.spec_augment import SpecAugment

IN_TIME = SpecAugment(freq_masks=0)
IN_FREQ = SpecAugment(time_masks=0)


def masked(recipe: SpecAugment, lengths: torch.Tensor, mels: int, seed: int = 0) -> torch.Tensor:
    """Where features that are one everywhere, padding too, become zero."""
    features = torch.ones(len(lengths), int(lengths.max()) + 3, mels)
    return recipe.apply(features, lengths, torch.Generator().manual_seed(seed)) == 0


def runs(mask: torch.Tensor) -> list[int]:
    """The lengths of the runs of True of a row."""
    return [len(run) for run in "".join("x" if m else " " for m in mask.tolist()).split()]


def covered(size: int, widest: int, masks: int) -> torch.Tensor:
    """The probability that each position lies under at least one mask, by enumeration."""
    one = torch.zeros(size, dtype=torch.float64)
    for width in range(widest + 1):
        for start in range(size - width + 1):
            one[start : start + width] += 1 / ((widest + 1) * (size - width + 1))
    return 1 - (1 - one) ** masks


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=6), st.integers(1, 90), st.integers(0, 99)
)
def test_masks_are_whole_frames_and_whole_mels_within_the_length(lengths, mels, seed):
    hidden = masked(SpecAugment(), torch.tensor(lengths), mels, seed)
    for mask, length in zip(hidden, lengths, strict=True):
        assert not mask[length:].any()
        real = mask[:length]
        in_time, in_freq = real.all(dim=1), real.all(dim=0)
        assert in_freq.all() or torch.equal(real, in_time[:, None] | in_freq)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 900), st.integers(0, 99))
def test_one_time_mask_is_no_wider_than_its_width_and_its_ratio(length, seed):
    recipe = SpecAugment(freq_masks=0, time_masks=1)
    for mask in masked(recipe, torch.full((8,), length), 1, seed):
        assert sum(runs(mask[:, 0])) <= min(50, length // 10)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 30), st.integers(0, 99))
def test_masks_are_as_many_and_as_wide_as_told_at_most(masks, width, seed):
    recipe = SpecAugment(time_masks=0, freq_masks=masks, freq_width=width)
    for mask in masked(recipe, torch.full((8,), 5), 80, seed):
        found = runs(mask[0])
        assert len(found) <= masks
        assert sum(found) <= masks * width


@pytest.mark.parametrize("length", [57, 300, 700])
def test_frames_are_masked_as_often_as_theory_says(length):
    lengths = torch.full((4000,), length)
    share = masked(IN_TIME, lengths, 1)[:, :length, 0].double().mean(dim=0)
    torch.testing.assert_close(
        share, covered(length, min(50, length // 10), 10), atol=0.04, rtol=0.0
    )


@pytest.mark.parametrize("mels", [80, 20])
def test_mels_are_masked_as_often_as_theory_says(mels):
    share = masked(IN_FREQ, torch.ones(4000, dtype=torch.int64), mels)[:, 0].double().mean(dim=0)
    torch.testing.assert_close(share, covered(mels, min(30, mels), 2), atol=0.04, rtol=0.0)


def test_each_utterance_has_masks_of_its_own():
    hidden = masked(SpecAugment(), torch.full((50,), 200), 80)
    assert len({tuple(mask.flatten().tolist()) for mask in hidden}) == 50


def test_the_generator_alone_decides():
    lengths = torch.tensor([120, 80])
    once = masked(SpecAugment(), lengths, 80, seed=1)
    torch.manual_seed(5)
    assert torch.equal(masked(SpecAugment(), lengths, 80, seed=1), once)
    assert not torch.equal(masked(SpecAugment(), lengths, 80, seed=2), once)


def test_the_input_is_left_alone_and_what_is_not_masked_stays():
    features = torch.randn(4, 100, 80)
    before = features.clone()
    result = SpecAugment().apply(features, torch.tensor([100, 90, 9, 0]), torch.Generator())
    assert torch.equal(features, before)
    assert torch.equal(torch.where(result == 0, before, result), before)
    assert torch.equal(result[3], before[3])
