import pytest
import torch

from fedpriv.data.utterances import Utterances


def indices(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.fixture
def three():
    return Utterances.pack(
        [torch.ones(2), torch.full((5,), 2.0), torch.full((3,), 3.0)],
        [indices(1), indices(2, 3), indices(4, 5, 6, 7)],
        skipped=2,
    )


def test_packing_pads_with_silence_and_blanks(three):
    assert len(three) == 3
    assert three.skipped == 2
    assert three.inputs.tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 2, 2], [3, 3, 3, 0, 0]]
    assert three.targets.tolist() == [[1, 0, 0, 0], [2, 3, 0, 0], [4, 5, 6, 7]]
    assert three.lengths.tolist() == three.sizes.tolist() == [2, 5, 3]
    assert three.target_lengths.tolist() == [1, 2, 4]


def test_packing_features():
    packed = Utterances.pack([torch.ones(2, 80), torch.ones(4, 80)], [indices(1), indices(2)])
    assert packed.inputs.shape == (2, 4, 80)
    assert packed.lengths.tolist() == [2, 4]
    assert packed.inputs[0, 2:].count_nonzero() == 0


def test_packing_nothing_keeps_the_count_of_skipped():
    none = Utterances.pack([], [], skipped=7)
    assert len(none) == 0
    assert none.skipped == 7
    assert len(none.take(indices())) == 0
    assert none.targets.dtype == none.lengths.dtype == torch.int64


def test_packing_needs_a_transcript_for_each_input():
    with pytest.raises(ValueError, match="1 inputs but 0 targets"):
        Utterances.pack([torch.ones(2)], [])


def test_taking_trims_to_the_longest_taken(three):
    taken = three.take(indices(1, 0))
    assert taken.inputs.tolist() == [[2, 2, 2, 2, 2], [1, 1, 0, 0, 0]]
    assert taken.targets.tolist() == [[2, 3], [1, 0]]
    short = three.take(indices(2))
    assert short.inputs.tolist() == [[3, 3, 3]]
    assert short.targets.tolist() == [[4, 5, 6, 7]]


def test_joining_pads_all_to_the_longest(three):
    whole = Utterances.join([three.take(indices(0)), Utterances.pack([], [], skipped=1), three])
    assert whole.inputs.shape == (4, 5)
    assert whole.targets.shape == (4, 4)
    assert whole.lengths.tolist() == [2, 2, 5, 3]
    assert whole.take(indices(1, 2, 3)).inputs.equal(three.inputs)
    assert whole.skipped == 3


def test_moving_keeps_everything(three):
    moved = three.to(torch.device("meta"))
    assert moved.inputs.device.type == moved.targets.device.type == "meta"
    assert moved.skipped == three.skipped
