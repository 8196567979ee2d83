import math

import pytest
import torch
from torch import nn

from fedpriv.data.federated import Examples
from fedpriv.errors import InputError
from fedpriv.models.gpt import GPTOptions
from fedpriv.models.registry import build_model
from fedpriv.tasks.next_token import NO_TOKEN, NextToken

TASK, VOCABULARY, LENGTH = NextToken(), 7, 6


def sequences(count: int, padded: bool = True) -> Examples:
    tokens = torch.randint(VOCABULARY, (count, LENGTH + 1), generator=torch.manual_seed(3))
    inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    for row in range(count if padded else 0):
        targets[row, LENGTH - row % 4 :] = NO_TOKEN
    return Examples(inputs, targets)


def gpt() -> nn.Module:
    return build_model(GPTOptions(dim=8, depth=2, heads=2), (LENGTH,), VOCABULARY, seed=1)


def test_losses_are_cross_entropies_of_real_tokens_a_sequence():
    model, batch = gpt(), sequences(4)
    found, scores = TASK.losses(model, batch), model(batch.inputs).log_softmax(-1)
    for row in range(4):
        told = [
            -float(scores[row, place, token])
            for place, token in enumerate(batch.targets[row].tolist())
            if token != NO_TOKEN
        ]
        assert float(found[row]) == pytest.approx(sum(told) / len(told), rel=1e-5)


def test_perplexity_counts_tokens_and_not_sequences():
    model, parts = gpt(), [sequences(3), sequences(5)]
    measured = TASK.measure(model, parts, batch_size=2)
    losses, right = [], []
    for part in parts:
        scores = model(part.inputs).log_softmax(-1)
        real = part.targets != NO_TOKEN
        losses += (-scores[real].gather(1, part.targets[real][:, None])).flatten().tolist()
        right += (scores[real].argmax(1) == part.targets[real]).tolist()
    assert measured["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(sum(right) / len(right))


def test_no_token_is_told_from_those_after_it():
    model, batch = gpt().eval(), sequences(1, padded=False)
    before = model(batch.inputs)
    changed = batch.inputs.clone()
    changed[0, 3] = (changed[0, 3] + 1) % VOCABULARY
    after = model(changed)
    torch.testing.assert_close(after[0, :3], before[0, :3])
    assert not torch.allclose(after[0, 3], before[0, 3])


def test_sequences_without_targets_are_left_out_and_counted():
    batch = sequences(3)
    batch.targets[1] = NO_TOKEN
    kept = TASK.prepare(gpt(), batch)
    assert (len(kept), kept.skipped) == (2, 1)


@pytest.mark.parametrize("where", ["inputs", "targets"])
@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_what_a_gpu_could_not_refuse_is_refused_before(where, token):
    batch = sequences(2)
    TASK.require_targets(batch, VOCABULARY)
    getattr(batch, where)[0, 0] = token
    with pytest.raises(InputError, match="not one of the 7 classes"):
        TASK.require_targets(batch, VOCABULARY)


def test_other_than_tokens_are_refused():
    with pytest.raises(InputError, match="sequences of tokens"):
        TASK.prepare(gpt(), Examples(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)))
