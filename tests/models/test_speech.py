import math

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from sounds import tone
from torch import nn
from torch.nn import functional as F

from fedpriv.errors import InputError
from fedpriv.models import MODELS as KINDS
from fedpriv.models import SpeechOptions, build_model
from fedpriv.models.positions import Positions, sinusoids
from fedpriv.models.speech import LogMel, Subsample, normalise, tokens_of
from fedpriv.models.stochastic import Dropout, LayerDrop
from fedpriv.models.transformer import Attention, Transformer

RATE = 8_000
WINDOW, HOP, SIZE = 200, 80, 256  # samples of 25 ms and 10 ms at 8 kHz, and the next power of two
# float32 operations in another order: numbers of up to 10 round more than those below one.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def speech(**changes) -> nn.Module:
    """A small model in eval mode, whose biases and norms are not trivial."""
    shape = {"dim": 16, "depth": 2, "heads": 2, "mels": 12} | changes
    model = build_model(SpeechOptions(**shape), (RATE,), 5, seed=3).eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


MODELS = {kind: speech(positions=kind) for kind in ("sinusoidal", "cape")}


def waves_of(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(length, generator=generator) for length in lengths]


def padded(waves: list[torch.Tensor], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(wave) for wave in waves])
    return F.pad(nn.utils.rnn.pad_sequence(waves, batch_first=True), (0, extra)), lengths


# Padding.


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 3_000), min_size=1, max_size=4),
    st.integers(0, 1_500),
    st.sampled_from(sorted(MODELS)),
)
def test_an_utterance_gives_the_same_numbers_alone_and_in_any_batch(lengths, extra, kind):
    model, waves = MODELS[kind], waves_of(lengths)
    together, counts = model(*padded(waves, extra))
    for wave, row, count in zip(waves, together, counts.tolist(), strict=True):
        alone, tokens = model(*padded([wave]))
        assert tokens.tolist() == [count] == [alone.shape[1]]
        torch.testing.assert_close(row[:count], alone[0], **CLOSE)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(SIZE, 3_000), min_size=2, max_size=4), st.integers(0, 99))
def test_what_follows_the_end_of_a_waveform_changes_nothing(lengths, seed):
    inputs, lengths = padded(waves_of(lengths), extra=500)
    garbage = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed))
    hidden = torch.arange(inputs.shape[1]) >= lengths[:, None]
    expected, counts = MODELS["sinusoidal"](inputs, lengths)
    found, _ = MODELS["sinusoidal"](torch.where(hidden, 100 * garbage, inputs), lengths)
    for a, b, count in zip(expected, found, counts.tolist(), strict=True):
        torch.testing.assert_close(a[:count], b[:count], **CLOSE)


@torch.no_grad()
def test_features_may_come_from_the_front_end_or_be_taken_inside():
    model = MODELS["sinusoidal"]
    inputs, lengths = padded(waves_of([900, 2_000, 300]))
    features, frames = model.front_end(inputs, lengths)
    whole, tokens = model(inputs, lengths)
    again, counts = model(features, frames)
    assert torch.equal(whole, again)
    assert tokens.tolist() == counts.tolist() == [-(-f // 3) for f in frames.tolist()]
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(whole.shape[:2]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(SIZE, 3_000), min_size=1, max_size=3), st.integers(0, 1_500))
def test_bands_in_which_nothing_happens_do_not_make_rounding_loud(lengths, extra):
    """A tone leaves all but a few bands at the floor: what varies there is rounding alone."""
    front_end = LogMel(RATE, 12)
    waves = [torch.from_numpy(tone(n / RATE, RATE, 500.0)).float() for n in lengths]
    together, frames = front_end(*padded(waves, extra))
    for wave, row, count in zip(waves, together, frames.tolist(), strict=True):
        alone, _ = front_end(*padded([wave]))
        torch.testing.assert_close(row[:count], alone[0], **CLOSE)


# The front end.


def htk_bands(mels: int) -> np.ndarray:
    """Triangles over the bins of the spectrum, equally far apart in m = 2595·log10(1 + f/700)."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    bins = np.arange(SIZE // 2 + 1) * RATE / SIZE
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rise, fall))


def plain_features(wave: np.ndarray, mels: int) -> np.ndarray:
    """Frame by frame: Hann window, power spectrum, mel bands, logarithm, normalisation."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    margin = (SIZE - WINDOW) // 2
    if len(wave) < SIZE:
        wave = np.pad(wave, (0, SIZE - len(wave)))
    rows = []
    for start in range(0, len(wave) - SIZE + 1, HOP):
        piece = wave[start + margin : start + margin + WINDOW] * hann
        power = np.abs(np.fft.rfft(piece, SIZE)) ** 2
        rows.append(np.log(power @ htk_bands(mels) + 1e-6))
    logs = np.array(rows)
    return (logs - logs.mean(0)) / np.sqrt(logs.var(0) + 1e-4)


@pytest.mark.parametrize("samples", [1, 100, SIZE - 1, SIZE, SIZE + HOP - 1, SIZE + HOP, 4_321])
def test_features_are_those_of_a_plain_loop(samples):
    wave = waves_of([samples], seed=5)[0]
    features, frames = LogMel(RATE, 12)(wave[None], torch.tensor([samples]))
    expected = plain_features(wave.double().numpy(), 12)
    assert frames.tolist() == [len(expected)]
    np.testing.assert_allclose(features[0].numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_energies_are_those_of_torchaudio(rate):
    front_end = LogMel(rate, 40)
    theirs = torchaudio.transforms.MelSpectrogram(
        rate,
        n_fft=front_end.size,
        win_length=round(rate * 0.025),
        hop_length=round(rate * 0.010),
        center=False,
        power=2.0,
        n_mels=40,
    )
    wave = torch.from_numpy(tone(0.7, rate, 700.0)).float() + 0.1 * waves_of([round(0.7 * rate)])[0]
    logs = torch.log(theirs(wave[None]) + 1e-6).mT
    expected = (logs - logs.mean(1)) / (logs.var(1, correction=0) + 1e-4).sqrt()
    features, frames = front_end(wave[None], torch.tensor([len(wave)]))
    assert frames.tolist() == [logs.shape[1]]
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-4)


def test_the_energy_of_a_tone_is_in_its_band():
    front_end = LogMel(RATE, 12)
    loudest = []
    for frequency in (300.0, 1_000.0, 3_000.0):
        wave = torch.from_numpy(tone(0.2, RATE, frequency)).float()
        wave[: len(wave) // 2] = 0  # normalisation shows what changes
        features, _ = front_end(wave[None], torch.tensor([len(wave)]))
        power = torch.fft.rfft(wave[-SIZE:] * torch.hann_window(SIZE)).abs().square()
        loudest.append(int((power.double().numpy() @ htk_bands(12)).argmax()))
        assert features[0, -1, loudest[-1]] > 0
    assert loudest == sorted(set(loudest))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), st.integers(0, 20), st.integers(0, 99))
def test_normalised_bands_have_mean_0_variance_1_and_padding_0(lengths, extra, seed):
    generator = torch.Generator().manual_seed(seed)
    features = 3 + 5 * torch.randn(len(lengths), max(lengths) + extra, 6, generator=generator)
    found = normalise(features.double(), torch.tensor(lengths))
    for row, before, length in zip(found, features.double(), lengths, strict=True):
        assert not row[length:].any()
        torch.testing.assert_close(row[:length].mean(0), torch.zeros(6).double(), rtol=0, atol=1e-9)
        variance = before[:length].var(0, correction=0)
        expected = variance / (variance + 1e-4)  # 1, but for the floor
        torch.testing.assert_close(row[:length].var(0, correction=0), expected)


@pytest.mark.parametrize("samples", [1, 50, SIZE, 3_000])
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_a_silent_or_constant_file_is_all_zeros_and_gives_finite_numbers(samples, level):
    model, wave = speech(), torch.full((1, samples), level)
    features, _ = model.front_end(wave, torch.tensor([samples]))
    assert not features.any()
    log_probs, tokens = model(wave, torch.tensor([samples]))
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), torch.ones(1, 1, dtype=torch.int64), tokens, torch.tensor([1])
    )
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.isfinite(log_probs).all()
    assert all(torch.isfinite(g).all() for g in gradients)


def test_the_loudest_sound_gives_finite_numbers():
    model = speech()
    for wave in (torch.ones(1, 2_000), torch.randn(1, 2_000).sign(), 1e4 * torch.randn(1, 2_000)):
        assert torch.isfinite(model(wave, torch.tensor([2_000]))[0]).all()


# Tokens.


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9, 10, 50])
def test_the_subsample_is_a_convolution_and_glu(frames):
    ours = Subsample(6, 8).double()
    nn.init.normal_(ours.mix.bias)
    features = torch.randn(3, frames, 6, dtype=torch.float64)
    # A window lists, for each mel, its seven frames: a kernel's own order.
    kernel = ours.mix.weight.view(16, 6, 7)
    mixed = F.conv1d(features.mT, kernel, ours.mix.bias, stride=3, padding=3).mT
    expected = mixed[..., :8] * torch.sigmoid(mixed[..., 8:])
    assert torch.allclose(ours(features), expected, atol=1e-12)
    assert ours(features).shape[1] == tokens_of(torch.tensor(frames)) == math.ceil(frames / 3)


def test_sinusoids_follow_the_formula():
    places = [-7.5, 0.0, 1.0, 123.0]
    found = sinusoids(torch.tensor(places), 6)
    for row, place in zip(found.tolist(), places, strict=True):
        angles = [place / 10_000 ** (2 * i / 6) for i in range(3)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row == pytest.approx(expected, abs=2e-6)


def test_fixed_positions_are_the_same_for_all_and_always():
    positions, lengths = Positions("sinusoidal"), torch.tensor([4, 9])
    x = torch.randn(2, 9, 8)
    expected = x + sinusoids(torch.arange(9.0), 8)
    for training in (True, False):
        assert torch.equal(positions.train(training)(x, lengths), expected)


def places_in(encoded: torch.Tensor) -> torch.Tensor:
    """The places of which the last dimension is the encoding, from its slowest angle."""
    half = encoded.shape[-1] // 2
    period = 10_000 ** ((2 * half - 2) / (2 * half))
    return torch.atan2(encoded[..., half - 1], encoded[..., -1]) * period


def test_cape_outside_training_centres_the_places_and_draws_nothing():
    positions = Positions("cape").eval()
    lengths, state = torch.tensor([4, 9]), torch.get_rng_state()
    found = places_in(positions(torch.zeros(2, 9, 8), lengths))
    assert torch.equal(torch.get_rng_state(), state)
    expected = torch.arange(9.0) - torch.tensor([[1.5], [4.0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_cape_in_training_keeps_order_and_distances_up_to_one_scale_an_utterance():
    torch.manual_seed(4)
    positions = Positions("cape").train()
    tokens, lengths = torch.zeros(2_000, 30, 8), torch.full((2_000,), 30)
    found = places_in(positions(tokens, lengths))
    steps = found.diff(dim=1)
    scale = steps.mean(1)
    # Each place moves by up to ½, so the mean of 29 steps is known to 1/29; the scale is in ½..2.
    assert scale.min() >= 0.5 * (1 - 1 / 29) - 1e-3
    assert scale.max() <= 2 * (1 + 1 / 29) + 1e-3
    assert scale.log2().mean().abs() < 0.05
    assert scale.log2().std().item() == pytest.approx(2 / math.sqrt(12), rel=0.05)
    local = steps / scale[:, None]
    assert (local > -0.08).all()  # 1 ± 2·½, over a scale that is known to 1/29
    assert local.std().item() == pytest.approx(math.sqrt(2 / 12), rel=0.05)
    middle = found.mean(1) / scale
    assert middle.abs().max() <= 32
    assert middle.std().item() == pytest.approx(60 / math.sqrt(12), rel=0.05)
    assert not torch.equal(found, places_in(positions(tokens, lengths)))


# Randomness.


def test_dropout_drops_its_share_and_keeps_the_expectation():
    torch.manual_seed(0)
    layer, x = Dropout(0.3), torch.full((400, 500), 2.0)
    dropped = layer.train()(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 2 / 0.7]))
    assert dropped.mean().item() == pytest.approx(2.0, abs=0.02)
    assert layer.eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_layer_drop_skips_whole_examples_with_its_probability():
    torch.manual_seed(0)
    before, after = torch.zeros(20_000, 2, 3), torch.ones(20_000, 2, 3)
    layer = LayerDrop(0.2)
    kept = layer.train()(before, after)
    assert kept.flatten(1).std(dim=1).max() == 0
    assert kept[:, 0, 0].mean().item() == pytest.approx(0.8, abs=0.01)
    assert layer.eval()(before, after) is after


def test_a_skipped_block_is_the_identity():
    stack = Transformer(8, 3, 2, layer_drop=0.999999).train()
    x = torch.randn(2, 4, 8)
    assert torch.equal(stack(x), stack.norm(x))
    stack.eval()
    assert not torch.allclose(stack(x), stack.norm(x), atol=1e-3)


@pytest.mark.parametrize("valid", [None, torch.tensor([[True] * 6, [True, True] + [False] * 4])])
def test_attention_written_out_equals_the_librarys_where_nothing_is_dropped(valid):
    attention = Attention(12, 3, dropout=0.5).double()
    attention.mixed.drop.draw = lambda shape, device: torch.ones(shape)  # above any probability
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    library = attention.eval()(x, valid) - attention.o.bias
    written_out = attention.train()(x, valid) - attention.o.bias
    assert torch.allclose(written_out, library / (1 - 0.5), atol=1e-12)


@torch.no_grad()
def test_attention_drops_weights_and_keeps_their_expectation():
    torch.manual_seed(1)
    attention = Attention(5, 1, dropout=0.4)
    for layer in (attention.v, attention.o):
        layer.weight.copy_(torch.eye(5))
        layer.bias.zero_()
    x = torch.eye(5).repeat(4_000, 1, 1)  # what comes out is then the weights themselves
    found, expected = attention.train()(x), attention.eval()(x[:1])[0]
    assert (found == 0).float().mean().item() == pytest.approx(0.4, abs=0.01)
    torch.testing.assert_close(found.mean(0), expected, rtol=0.1, atol=0.01)


def test_nothing_is_drawn_in_evaluation_and_everything_in_training():
    model = speech(positions="cape", dropout=0.2, layer_drop=0.2)
    batch, state = padded(waves_of([900, 1_500])), torch.get_rng_state()
    first = model(*batch)[0]
    assert torch.equal(model(*batch)[0], first)
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    assert not torch.equal(model(*batch)[0], model(*batch)[0])


@pytest.mark.parametrize("change", [{"positions": "cape"}, {"dropout": 0.2}, {"layer_drop": 0.3}])
def test_the_global_state_decides_what_is_drawn_in_training(change):
    model, batch = speech(**change).train(), padded(waves_of([900, 1_500]))
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(*batch)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# Building it.


def test_equal_seeds_give_equal_parameters():
    config = SpeechOptions(dim=16, depth=1, heads=2, mels=12)
    state = torch.get_rng_state()
    first, again, other = (build_model(config, (RATE,), 5, seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not any("window" in name or "bands" in name for name in first)


def test_the_published_shape_has_255_million_parameters():
    config = SpeechOptions(dim=768, depth=36, heads=4, mels=80)
    with torch.device("meta"):
        model = build_model(config, (16_000,), 29, seed=0)
        log_probs, tokens = model(torch.empty(2, 16_000), torch.empty(2, dtype=torch.int64))
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    block = 4 * (768 * 768 + 768) + 2 * 4 * 768 * 768 + 4 * 768 + 768 + 2 * 2 * 768
    expected = 36 * block + (7 * 80 + 1) * 2 * 768 + 2 * 768 + 769 * 29
    assert sum(p.numel() for p in model.parameters()) == expected
    assert expected == pytest.approx(255e6, rel=0.02)
    assert log_probs.shape == (2, 33, 29)  # 1 + (16,000 - 512) // 160 = 97 frames
    assert tokens.shape == (2,)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"dim": 9, "heads": 3}, (RATE,), "model.dim must be even .* got 9"),
        ({"dim": 10, "heads": 4}, (RATE,), "model.heads must divide model.dim"),
        ({}, (1, 8, 8), r"model.name: speech reads waveforms, the data are of shape \(1, 8, 8\)"),
        ({"name": "vit"}, (RATE,), r"model.name: vit reads images .* the data are \(8000,\)"),
    ],
)
def test_errors_name_the_key(changes, shape, message):
    with pytest.raises(InputError, match=message) as error:
        build_model(KINDS.parse({"name": "speech", **changes}), shape, 5, seed=0)
    assert "\n" not in str(error.value)
