import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_speech import RATE, tiny_speech
from torch import nn
from torch.nn import functional as F

from fedpriv.data.federated import Examples
from fedpriv.data.text import Alphabet
from fedpriv.data.utterances import Utterances
from fedpriv.models import SpeechOptions, build_model
from fedpriv.tasks import recognition
from fedpriv.tasks.classification import Classification
from fedpriv.tasks.decoding import decoder, greedy
from fedpriv.tasks.error_rates import error_rates
from fedpriv.tasks.recognition import Recognition
from fedpriv.tasks.spec_augment import SpecAugment

TASK = Recognition(Alphabet("ab "), greedy)
SEEDS = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    config = SpeechOptions(dim=16, depth=1, heads=2, mels=8)
    return build_model(config, (RATE,), 4, seed=1)


class Scores(nn.Module):
    """Utterances whose inputs are the log probabilities that a model would give."""

    def forward(self, inputs: torch.Tensor, lengths: torch.Tensor):
        return inputs, lengths


class Frames(nn.Module):
    """A model whose front end takes one sample for one frame."""

    def front_end(self, inputs: torch.Tensor, lengths: torch.Tensor):
        return inputs[..., None], lengths

    def tokens(self, lengths: torch.Tensor) -> torch.Tensor:
        return (lengths + 2) // 3


def utterances(inputs: list[torch.Tensor], targets: list[list[int]]) -> Utterances:
    return Utterances.pack(inputs, [torch.tensor(t, dtype=torch.int64) for t in targets])


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(c for c, _ in itertools.groupby(path) if c != 0)


TARGETS = st.lists(st.integers(1, 2), min_size=0, max_size=3)


# What can be spelt.


@settings(max_examples=60, deadline=None)
@given(st.lists(TARGETS, min_size=1, max_size=4))
def test_the_shortest_path_is_that_of_all_alignments(targets):
    batch = utterances([torch.zeros(1)] * len(targets), targets)
    for found, target in zip(recognition._shortest_path(batch).tolist(), targets, strict=True):
        if not target:
            assert found > 2**40  # nothing to learn: left out
            continue
        possible = [
            tokens
            for tokens in range(1, 7)
            if any(
                collapse(path) == tuple(target)
                for path in itertools.product(range(3), repeat=tokens)
            )
        ]
        assert found == min(possible)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TARGETS, st.integers(1, 20)), min_size=1, max_size=5))
def test_what_no_path_can_spell_is_left_out_and_counted(spoken):
    batch = utterances([torch.ones(n) for _, n in spoken], [target for target, _ in spoken])
    batch = dataclasses.replace(batch, skipped=2)
    kept = TASK.prepare(Frames(), batch)
    expected = [
        (target, frames)
        for target, frames in spoken
        if target and math.ceil(frames / 3) >= len(target) + sum(
            a == b for a, b in itertools.pairwise(target)
        )
    ]  # fmt: skip
    assert len(kept) == len(expected)
    assert kept.skipped == 2 + len(spoken) - len(expected)
    assert kept.lengths.tolist() == [frames for _, frames in expected]
    found = zip(kept.targets.tolist(), kept.target_lengths.tolist(), strict=True)
    assert [row[:length] for row, length in found] == [target for target, _ in expected]


@settings(max_examples=60, deadline=None)
@given(TARGETS.filter(len), st.integers(1, 15), SEEDS)
def test_what_is_kept_has_a_finite_loss_and_nothing_else_has(target, frames, seed):
    scores = torch.randn(frames, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    tokens = math.ceil(frames / 3)
    kept = TASK.prepare(Frames(), utterances([torch.ones(frames)], [target]))
    loss = F.ctc_loss(
        scores[:tokens, None], torch.tensor([target]), torch.tensor([tokens]),
        torch.tensor([len(target)]), reduction="none",
    )  # fmt: skip
    assert bool(torch.isfinite(loss)) == (len(kept) == 1)


def test_preparing_a_few_samples_at_a_time_changes_nothing(model, monkeypatch):
    spoken = tiny_speech().user(2)
    whole = TASK.prepare(model, spoken)
    for samples in (1, 5_000, 100_000):
        monkeypatch.setattr(recognition, "_SAMPLES_AT_ONCE", samples)
        parts = TASK.prepare(model, spoken)
        torch.testing.assert_close(parts.inputs, whole.inputs, rtol=0, atol=1e-5)
        for name in ("lengths", "targets", "target_lengths"):
            assert torch.equal(getattr(parts, name), getattr(whole, name))


def test_nobody_is_prepared_as_nobody(model):
    nobody = TASK.prepare(model, Utterances.pack([], [], skipped=3))
    assert len(nobody) == 0
    assert nobody.skipped == 3


@pytest.mark.parametrize(
    ("wave", "target", "kept"),
    [
        (torch.randn(RATE), [1, 2], True),
        (torch.zeros(RATE), [1, 2], True),  # silent, and nothing but zeros
        (torch.full((RATE,), 0.25), [1, 2], True),
        (torch.randn(100), [1], True),  # less than a window: one frame, one token
        (torch.randn(1), [1], True),
        (torch.randn(100), [1, 2], False),
        (torch.randn(500), [1, 1], False),  # 4 frames, 2 tokens, but 3 are needed
        (torch.randn(500), [1, 2], True),
        (torch.randn(RATE), [], False),
    ],
)
def test_odd_recordings_never_make_a_nan(model, wave, target, kept):
    usual = torch.randn(2_000)
    batch = TASK.prepare(model.train(), utterances([usual, wave], [[2, 1], target]))
    assert (len(batch), batch.skipped) == ((2, 0) if kept else (1, 1))
    assert torch.isfinite(batch.inputs).all()
    losses = TASK.losses(model, batch)
    assert torch.isfinite(losses).all()
    assert (losses > 0).all()
    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)
    # Unprepared, the loss of what cannot be spelt is 0 and moves nothing.
    raw = utterances([usual, wave], [[2, 1], target])
    losses = TASK.losses(model, raw)
    assert torch.isfinite(losses).all()
    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_a_batch_in_which_nothing_is_said_makes_no_nan(model):
    silence = utterances([torch.zeros(500), torch.zeros(900)], [[], []])
    assert len(TASK.prepare(model, silence)) == 0
    assert torch.isfinite(TASK.losses(model, silence)).all()


# Loss.


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.lists(st.tuples(TARGETS.filter(len), st.integers(1, 6)), min_size=1, max_size=3))
def test_the_ctc_loss_is_the_sum_over_all_alignments(seed, spoken):
    generator = torch.Generator().manual_seed(seed)
    scores = [
        torch.randn(tokens, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
        for _, tokens in spoken
    ]
    batch = utterances(scores, [target for target, _ in spoken])
    found = TASK.losses(Scores(), batch)
    for loss, frames, (target, tokens) in zip(found.tolist(), scores, spoken, strict=True):
        paths = (
            math.prod(float(frames[t, c].exp()) for t, c in enumerate(path))
            for path in itertools.product(range(3), repeat=tokens)
            if collapse(path) == tuple(target)
        )
        probability = math.fsum(paths)
        expected = -math.log(probability) / len(target) if probability else 0.0
        assert loss == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_loss_of_an_utterance_does_not_depend_on_the_batch(model):
    batch = TASK.prepare(model, tiny_speech().user(2))
    together = TASK.losses(model, batch)
    for index, loss in enumerate(together):
        alone = TASK.losses(model, batch.take(torch.tensor([index])))
        torch.testing.assert_close(alone[0], loss, rtol=1e-5, atol=1e-6)


def test_augmentation_begins_with_its_round_and_masks_the_features_alone(model):
    task = dataclasses.replace(TASK, spec_augment=SpecAugment(from_round=3, freq_width=4))
    batch = task.prepare(model, tiny_speech().user(2))
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert TASK.augment(batch, 5, generator) is batch
    assert task.augment(batch, 2, generator) is batch
    assert torch.equal(generator.get_state(), state)
    masked = task.augment(batch, 3, generator)
    hidden = masked.inputs != batch.inputs
    assert hidden.any()
    assert not masked.inputs[hidden].any()
    for name in ("lengths", "targets", "target_lengths"):
        assert torch.equal(getattr(masked, name), getattr(batch, name))


# Measures.


def best_path(scores: torch.Tensor) -> str:
    path = [max(range(4), key=row.__getitem__) for row in scores.tolist()]
    return "".join("_ab "[c] for c in collapse(tuple(path)))


def random_corpus(seed: int, count: int) -> tuple[Utterances, list[str], list[str]]:
    """Scores with transcripts; what was said, and what the best paths say."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 25, (count,), generator=generator).tolist()
    scores = [2 * torch.randn(n, 4, generator=generator) for n in sizes]
    scores = [one.log_softmax(-1) for one in scores]
    texts = [
        "".join("ab b a"[(seed + 5 * i + j) % 6] for j in range(1 + i % 7)) for i in range(count)
    ]
    texts = [" ".join(text.split()) or "a" for text in texts]
    batch = utterances(scores, [[1 + "ab ".index(c) for c in text] for text in texts])
    return batch, texts, [best_path(one) for one in scores]


PARTS = st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(sum)


@settings(max_examples=30, deadline=None)
@given(SEEDS, PARTS, st.integers(1, 9), st.randoms(use_true_random=False))
def test_speech_is_measured_alike_in_any_parts_batches_and_order(seed, sizes, batch_size, random):
    count = sum(sizes)
    batch, said, heard = random_corpus(seed, count)
    expected = error_rates(said, heard)
    order = list(range(count))
    random.shuffle(order)
    parts = [batch.take(index) for index in torch.tensor(order).split(sizes)]
    parts.insert(1, Utterances.pack([], []))  # of which no recording could be used
    found = TASK.measure(Scores(), parts, batch_size)
    assert found["wer"] == pytest.approx(expected.wer)
    assert found["cer"] == pytest.approx(expected.cer)
    assert found["words"] == sum(len(text.split()) for text in said) == expected.words
    edits = found["substitutions"] + found["insertions"] + found["deletions"]
    assert edits == round(expected.wer * expected.words)
    losses = [TASK.losses(Scores(), batch.take(torch.tensor([i]))) for i in range(count)]
    assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_a_perfect_transcript_has_no_errors_and_a_silent_model_deletes_every_word():
    texts = ["ab a", "b", "ba ab b"]
    paths = [[c for letter in text for c in (1 + "ab ".index(letter), 0)] for text in texts]
    perfect = [F.one_hot(torch.tensor(path), 4).float().log().clamp(min=-50) for path in paths]
    targets = [[1 + "ab ".index(c) for c in text] for text in texts]
    found = TASK.measure(Scores(), [utterances(perfect, targets)], 2)
    assert (found["wer"], found["cer"], found["words"]) == (0.0, 0.0, 6)
    assert found["loss"] == pytest.approx(0.0, abs=1e-4)
    silent = [F.one_hot(torch.zeros(9, dtype=torch.int64), 4).float().log().clamp(min=-50)] * 3
    found = TASK.measure(Scores(), [utterances(silent, targets)], 2)
    assert (found["wer"], found["cer"], found["deletions"]) == (1.0, 1.0, 6)


@pytest.mark.parametrize("decode", [greedy, partial(decoder("beam", 4))])
def test_a_model_is_measured_in_evaluation_mode_and_draws_nothing(decode):
    config = SpeechOptions(dim=16, depth=1, heads=2, mels=8, dropout=0.5)
    model = build_model(config, (RATE,), 4, seed=1).train()
    task = Recognition(Alphabet("ab "), decode)
    batch, state = task.prepare(model, tiny_speech().user(2)), torch.get_rng_state()
    first, second = (task.measure(model, [batch], size) for size in (1, 50))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == pytest.approx(second)
    assert not model.training


@settings(max_examples=30, deadline=None)
@given(SEEDS, PARTS, st.integers(1, 9))
def test_images_are_measured_as_in_a_plain_loop(seed, sizes, batch_size):
    torch.manual_seed(seed)
    count = sum(sizes)
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5)).train()
    examples = Examples(torch.randn(count, 5), torch.randint(0, 4, (count,)))
    parts = [examples.take(index) for index in torch.arange(count).split(sizes)]
    found = Classification().measure(model, parts, batch_size)
    loss, pairs = 0.0, []
    for x, y in zip(examples.inputs.double(), examples.targets.tolist(), strict=True):
        logits = (model[0].weight.double() @ x + model[0].bias.double()).tolist()
        loss += math.log(sum(math.exp(z) for z in logits)) - logits[y]
        pairs.append((y, max(range(4), key=logits.__getitem__)))
    assert found == {
        "loss": pytest.approx(loss / count, rel=1e-5),
        "accuracy": pytest.approx(sum(y == said for y, said in pairs) / count),
        "examples": count,
        "by_class": {
            "examples": [sum(y == each for y, _ in pairs) for each in range(4)],
            "right": [pairs.count((each, each)) for each in range(4)],
            "answers": [sum(said == each for _, said in pairs) for each in range(4)],
        },
    }


def test_the_loss_of_images_is_their_cross_entropy_and_they_are_left_alone():
    model = nn.Linear(5, 4)
    examples = Examples(torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 0, 1]))
    task = Classification()
    assert task.prepare(model, examples) is examples
    assert task.augment(examples, 1, torch.Generator()) is examples
    expected = -model(examples.inputs).log_softmax(-1)[torch.arange(6), examples.targets]
    torch.testing.assert_close(task.losses(model, examples), expected)
