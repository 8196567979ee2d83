import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.models.packing import Packing
from fedpriv.models.speech import SpeechTransformer, tokens_of

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # in float64

# Frames of each utterance, a list for each user.
FRAMES = st.integers(1, 3).flatmap(
    lambda rows: st.lists(
        st.lists(st.integers(1, 60), min_size=rows, max_size=rows), min_size=1, max_size=4
    )
)


def model_of(positions: str = "sinusoidal", norm: str = "layernorm") -> SpeechTransformer:
    torch.manual_seed(3)
    model = SpeechTransformer(
        8_000, 5, dim=8, depth=2, heads=2, mels=4, norm=norm, positions=positions
    )
    return model.double().eval()


def features_of(frames: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor(frames).flatten()
    features = torch.randn(len(lengths), int(lengths.max()), 4, dtype=torch.float64)
    return features, lengths


def real_of(tokens: torch.Tensor, size: int) -> torch.Tensor:
    return torch.arange(size) < tokens[:, None]


@settings(max_examples=40, deadline=None)
@given(FRAMES, st.sampled_from(["sinusoidal", "cape"]), st.sampled_from(["layernorm", "rmsnorm"]))
def test_a_packed_batch_gives_the_numbers_and_gradients_of_a_padded_one(frames, positions, norm):
    padded, (features, lengths) = model_of(positions, norm), features_of(frames)
    packed = copy.deepcopy(padded)
    packed.users = len(frames)
    answers, weights = [], torch.randn(len(lengths), int(tokens_of(lengths.max())), 5).double()
    for model in (padded, packed):
        log_probs, tokens = model(features, lengths)
        real = real_of(tokens, log_probs.shape[1])
        (log_probs * weights)[real].sum().backward()
        answers.append(log_probs[real])
    torch.testing.assert_close(*answers, **EXACT)
    for (name, one), other in zip(padded.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name, **EXACT)


@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_numbers_of_one_user_reach_no_other(poisoned):
    """Users are filled up with something, which must be their own: zero times NaN is NaN."""
    features, lengths = features_of([[9, 50], [3, 1], [60, 60]])
    model, answers = model_of(), []
    model.users = 3
    for value in (0.0, torch.nan):
        features[2 * poisoned : 2 * poisoned + 2] += value
        one = features.clone().requires_grad_()
        # What arrives at each user's own rows of the first layer's output.
        seen: list[torch.Tensor] = []
        handle = model.transformer.register_forward_pre_hook(
            lambda _, arguments, seen=seen: seen.append(arguments[0]) or arguments[0].retain_grad()
        )
        log_probs, tokens = model(one, lengths)
        real = real_of(tokens, log_probs.shape[1])
        torch.where(real[..., None], log_probs, 0.0).square().sum().backward()
        handle.remove()
        answers.append((log_probs.detach(), real, seen[0].grad))
    (clean, real, clean_gradient), (dirty, _, dirty_gradient) = answers
    others = [user for user in range(3) if user != poisoned]
    for user in others:
        rows = slice(2 * user, 2 * user + 2)
        assert torch.equal(clean[rows][real[rows]], dirty[rows][real[rows]])
        assert torch.equal(clean_gradient[user], dirty_gradient[user])
    assert torch.isnan(dirty_gradient[poisoned]).any()


@settings(max_examples=60, deadline=None)
@given(FRAMES, st.integers(1, 4))
def test_tokens_go_apart_and_come_together_and_none_is_lost(lengths, heads):
    counts = torch.tensor(lengths).flatten()
    users, longest = len(lengths), int(counts.max())
    packing = Packing(counts, longest, users)
    rows = torch.randn(len(counts), longest, 2 * heads)
    real = real_of(counts, longest)
    packed = packing.pack(rows)
    assert torch.equal(packing.unpack(packed)[real], rows[real])
    parts = packing.heads(heads).apart(packed)
    assert sum(len(part) for part in parts) == heads * len(counts)
    again = packing.unpack(packing.heads(heads).together(parts))
    assert torch.equal(again[real], rows[real])
    hidden = packing.heads(heads).hidden
    assert sum(int((one == 0).sum()) for one in hidden) == heads * int(counts.sum())


def test_less_is_computed_than_in_a_padded_batch():
    lengths = torch.tensor([10, 100, 20, 40, 90, 30])
    packing = Packing(lengths, 100, users=2)
    assert packing.size == 160  # the tokens of the second user; padded it would be 300
    parts = packing.heads(1).apart(packing.pack(torch.zeros(6, 100, 4)))
    assert sum(len(part) * part.shape[1] ** 2 for part in parts) <= 6 * 104**2
