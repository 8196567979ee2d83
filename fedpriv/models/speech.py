"""The speech transformer: waveforms to characters by CTC (Pelikan et al. 2025, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedpriv.errors import FedprivError, InputError
from fedpriv.models.packing import Packing, Ragged, valid_mask
from fedpriv.models.positions import PositionKind, Positions
from fedpriv.models.transformer import (
    NormName,
    NormPlacement,
    Transformer,
    TransformerOptions,
    require_heads,
)
from fedpriv.transfer import moved_to

WINDOW_SECONDS = 0.025
HOP_SECONDS = 0.010
KERNEL, STRIDE = 7, 3

# Added to mel energies before the logarithm: far below the quietest speech of a 16-bit recording.
_ENERGY_FLOOR = 1e-6
# Added to variances: a constant band becomes zeros and not noise.
_VARIANCE_FLOOR = 1e-4


class SpeechOptions(TransformerOptions):
    """The shape of a speech transformer."""

    name: str = Field(default="speech", description="speech: a transformer over waveforms, by CTC")
    mels: int = Field(
        default=80, gt=0, le=512, description="mel bands of the spectrogram; 1 to 512"
    )
    positions: PositionKind = Field(
        default="sinusoidal",
        description="sinusoidal, fixed; cape, the same with random shift and scale in training",
    )


def build_speech(
    options: SpeechOptions, input_shape: tuple[int, ...], classes: int
) -> SpeechTransformer:
    """Return the transformer of these options for waveforms with `input_shape` samples a second.

    Raises:
        InputError: the data are no sound, or the options do not fit one another.
    """
    if len(input_shape) != 1:
        raise InputError(
            f"model.name: speech reads waveforms, the data are of shape {input_shape}; write vit"
        )
    require_heads(options)
    if options.dim % 2:
        raise InputError(f"model.dim must be even for sinusoidal positions, got {options.dim}")
    shape = options.shape()
    return SpeechTransformer(input_shape[0], classes, **shape)


class LogMel(nn.Module):
    """Waveforms to normalised log-mel spectrograms; nothing is learnt.

    Windows of 25 ms every 10 ms lie wholly inside the waveform, so what follows its end changes
    nothing; each band is then centred and scaled over the real frames of its utterance.
    """

    window: Tensor
    bands: Tensor

    def __init__(self, sample_rate: int, mels: int) -> None:
        super().__init__()
        window = round(sample_rate * WINDOW_SECONDS)
        self.hop = round(sample_rate * HOP_SECONDS)
        self.size = 2 ** (window - 1).bit_length()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.register_buffer("bands", _mel_bands(self.size, mels, sample_rate), persistent=False)

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map waveforms `[B, samples]`, on any device, to features `[B, frames, mels]` and lengths.

        An utterance shorter than a window is one frame, filled up with silence.
        """
        waves = moved_to(self.window.device, waves)
        waves = F.pad(waves, (0, max(0, self.size - waves.shape[1])))
        frames = waves.unfold(1, self.size, self.hop)
        margin = self.size - len(self.window)
        window = F.pad(self.window, (margin // 2, margin - margin // 2))
        energy = torch.fft.rfft(frames * window).abs().square()
        logs = torch.log(energy @ self.bands + _ENERGY_FLOOR)
        counts = (lengths - self.size).clamp(min=0) // self.hop + 1
        return normalise(logs, counts), counts


def _mel_bands(size: int, mels: int, sample_rate: int) -> Tensor:
    """Return the triangular mel filters: `[size/2 + 1, mels]`."""
    # Imported here: only speech needs it, and it does not load beside every build of torch.
    try:
        from torchaudio.functional import melscale_fbanks
    except (ImportError, OSError) as error:
        raise FedprivError(
            f"speech needs torchaudio, which does not load here ({error}); install the torchaudio "
            "that belongs to your torch"
        ) from None
    # torchaudio looks at the numbers, of which a meta device has none.
    with torch.device("cpu"):
        bands = melscale_fbanks(size // 2 + 1, 0.0, sample_rate / 2, mels, sample_rate)
    return bands.to(torch.get_default_device())


def normalise(features: Tensor, lengths: Tensor) -> Tensor:
    """Centre and scale each band over the first `lengths` `[B]` frames; padding becomes zero.

    `features` are `[B, frames, mels]`; the mean, zero, is also what masked frames are set to.
    """
    lengths = moved_to(features.device, lengths)
    real = valid_mask(lengths, features.shape[1])[..., None]
    count = lengths[:, None, None]
    # Added up in float64: a band that is constant but for rounding would be scaled up 100 times.
    mean = (features * real).sum(1, keepdim=True, dtype=torch.float64) / count
    centred = (features - mean.to(features)) * real
    variance = centred.square().sum(1, keepdim=True, dtype=torch.float64) / count
    return centred / (variance + _VARIANCE_FLOOR).sqrt().to(features)


class Subsample(nn.Module):
    """A convolution over time, kernel 7 and stride 3, and GLU: one token for 30 ms.

    It is written as a linear map of windows of frames, as every engine knows linear maps. Three
    frames of zeros, the mean, at both ends make ⌈frames/3⌉ tokens.
    """

    def __init__(self, mels: int, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(mels * KERNEL, 2 * dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[B, frames, mels]` to tokens `[B, ⌈frames/3⌉, dim]`."""
        return self.mixed(self.windows(features))

    def windows(self, features: Tensor) -> Tensor:
        """Return the frames that each token is made of: `[B, ⌈frames/3⌉, mels·7]`."""
        side = KERNEL // 2
        return F.pad(features, (0, 0, side, side)).unfold(1, KERNEL, STRIDE).flatten(2)

    def mixed(self, windows: Tensor) -> Tensor:
        """Map windows `[..., mels·7]` to tokens `[..., dim]`."""
        return F.glu(self.mix(windows), dim=-1)


def tokens_of(frames: Tensor) -> Tensor:
    """Return how many tokens `frames` make."""
    return (frames - 1) // STRIDE + 1


class SpeechTransformer(Ragged):
    """Waveforms or features to log-probabilities of characters, index 0 being CTC's blank.

    Padding is exactly neutral: an utterance gives the same numbers alone and in any batch.
    """

    def __init__(
        self,
        sample_rate: int,
        classes: int,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mels: int = 80,
        mlp_ratio: float = 4.0,
        norm: NormName = "layernorm",
        norm_placement: NormPlacement = "pre",
        positions: PositionKind = "sinusoidal",
        dropout: float = 0.0,
        layer_drop: float = 0.0,
    ) -> None:
        """`sample_rate` is in Hz; `dim` is even, and `heads` divide it."""
        super().__init__()
        self.front_end = LogMel(sample_rate, mels)
        self.subsample = Subsample(mels, dim)
        self.positions = Positions(positions)
        self.transformer = Transformer(
            dim, depth, heads, mlp_ratio, norm_placement, norm, dropout, layer_drop
        )
        self.head = nn.Linear(dim, classes)
        # What is dropped is drawn for each place of a padded batch.
        self._drops = dropout > 0 or layer_drop > 0

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map inputs to log-probabilities `[B, tokens, classes]` and the number of real tokens.

        `inputs` are waveforms `[B, samples]` or the front end's features `[B, frames, mels]`;
        `lengths` `[B]` count the real ones, at least 1 each. They are best on the host, which reads
        them.
        """
        if inputs.dim() == 2:
            inputs, lengths = self.front_end(inputs, lengths)
        counts = tokens_of(lengths)
        if self.users and not self._drops:
            return self._packed(self.subsample.windows(inputs), counts), counts
        x = self.subsample(inputs)
        # Without padding there is nothing to hide, and attention without a mask is faster.
        # What is exported asks nothing, and hides what may be there.
        unread = counts.is_meta or torch.compiler.is_exporting()
        padded = unread or bool((counts < x.shape[1]).any())
        there = moved_to(x.device, counts)
        x = self.positions(x, there)
        x = self.transformer(x, valid_mask(there, x.shape[1]) if padded else None)
        return self.head(x).log_softmax(dim=-1), counts

    def tokens(self, lengths: Tensor) -> Tensor:
        """Return how many tokens utterances of so many frames make."""
        return tokens_of(lengths)

    def _packed(self, windows: Tensor, counts: Tensor) -> Tensor:
        """Map windows `[B, T, mels·7]` to log-probabilities, without computing any padding."""
        packing = Packing(counts, windows.shape[1], self.users)
        x = self.subsample.mixed(packing.pack(windows))
        places = self.positions.table(counts, packing.tokens, x.shape[2])
        x = self.transformer(x + packing.pack(places).to(x.dtype), packing)
        return packing.unpack(self.head(x).log_softmax(dim=-1))
