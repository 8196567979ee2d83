"""SpecAugment: training on features with parts masked out (Park et al. 2019), without warping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedpriv.models.packing import valid_mask
from fedpriv.sections import Section


class SpecAugmentConfig(Section):
    """What is masked of a user's features in training (Park et al. 2019); speech only."""

    from_round: Annotated[int, Field(ge=1)] = Field(
        default=1, description="First round in which features are masked."
    )
    freq_masks: Annotated[int, Field(ge=0)] = Field(
        default=2, description="Masks over neighbouring mel bands."
    )
    freq_width: Annotated[int, Field(ge=0)] = Field(
        default=30, description="Widest such mask (bands)."
    )
    time_masks: Annotated[int, Field(ge=0)] = Field(
        default=10, description="Masks over neighbouring frames."
    )
    time_width: Annotated[int, Field(ge=0)] = Field(
        default=50, description="Widest such mask (frames of 10 ms)."
    )
    time_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Widest such mask as a part of the utterance."
    )


@dataclass(frozen=True)
class SpecAugment:
    """How features are masked; the defaults are those of Pelikan et al. 2025 for 80 mels.

    Attributes:
        from_round: the first round, counted from 1, whose users mask their features.
        freq_masks: number of masks over mels.
        freq_width: F, the most mels that one of them covers.
        time_masks: number of masks over frames.
        time_width: T, the most frames that one of them covers.
        time_ratio: p, the largest share of an utterance's frames that one of them covers.
    """

    from_round: int = 1
    freq_masks: int = 2
    freq_width: int = 30
    time_masks: int = 10
    time_width: int = 50
    time_ratio: float = 0.1

    def apply(self, features: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """Return masked features: zero, the mean of normalised ones, where a mask lies.

        Args:
            features: float `[n, frames, mels]`, normalised per utterance; left as they are.
            lengths: int64 `[n]`, how many frames of each are real; no mask touches the others.
            generator: decides the masks, anew for each utterance.

        The width of a mask is uniform on 0, 1, ..., its maximum, and its start uniform on the
        places where it fits. Masks may overlap.
        """
        _, frames, mels = features.shape
        longest = (lengths * self.time_ratio).floor().clamp(max=self.time_width)
        in_time = _masked(frames, self.time_masks, longest, lengths, generator)
        size = torch.full_like(lengths, mels)
        in_freq = _masked(mels, self.freq_masks, size.clamp(max=self.freq_width), size, generator)
        real = valid_mask(lengths, frames)
        masked = in_time[:, :, None] | (in_freq[:, None, :] & real[:, :, None])
        return features.masked_fill(masked, 0.0)


def _masked(
    positions: int, masks: int, widest: Tensor, sizes: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw masks, and return where at least one lies: bool `[n, positions]`.

    Args:
        positions: number of positions of the result.
        masks: how many for each row.
        widest: `[n]`, the largest width, at most the size.
        sizes: `[n]`, masks lie within the first so many positions of each row.
        generator: decides the masks.
    """
    # Drawn where the generator is, so that every device masks alike.
    draws = torch.rand(2, len(sizes), masks, generator=generator, device=generator.device)
    for_width, for_start = draws.to(sizes.device)
    width = (for_width * (widest[:, None] + 1)).floor()
    start = (for_start * (sizes[:, None] - width + 1)).floor()
    position = torch.arange(positions, device=sizes.device)[:, None, None]
    return ((position >= start) & (position < start + width)).any(dim=-1).T
