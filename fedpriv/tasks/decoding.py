"""From the scores of a CTC model to what it writes (Graves et al. 2006)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedpriv.data.text import BLANK
from fedpriv.models.packing import valid_mask
from fedpriv.transfer import moved_to

#: A decoder: log probabilities `[n, frames, classes]` and lengths `[n]` to indices without blanks.
Decode = Callable[[Tensor, Tensor], list[list[int]]]

# Prefixes are identified by a 64-bit polynomial hash; any odd multiplier with mixed bits will do.
_ROOT, _NONE, _MULTIPLIER = 0, -1, 0x5851F42D4C957F2D


def decoder(name: Literal["greedy", "beam"], width: int = 8) -> Decode:
    """Return the decoder called `name`; `width` is how many prefixes a beam search keeps."""
    decoders: dict[str, Decode] = {"greedy": greedy, "beam": partial(prefix_beam, width=width)}
    return decoders[name]


def greedy(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """Return the labelling of the most probable path of each utterance (best path decoding).

    Args:
        log_probs: float `[n, frames, classes]`, log probabilities; class 0 is the blank.
        lengths: int64 `[n]`, how many frames of each row are real.

    Repeated classes become one and blanks are dropped. A frame with a NaN counts as a blank.
    """
    path = log_probs.argmax(dim=-1).masked_fill(_silent(log_probs, lengths), BLANK)
    repeats = torch.zeros_like(path, dtype=torch.bool)
    repeats[:, 1:] = path[:, 1:] == path[:, :-1]
    return _written(path.masked_fill(repeats, BLANK))


@torch.no_grad()
def prefix_beam(log_probs: Tensor, lengths: Tensor, width: int) -> list[list[int]]:
    """Return the most probable labelling that a prefix beam search finds for each utterance.

    The probability of a prefix is the sum over all of its paths (Hannun et al. 2014, algorithm 1,
    without a language model). After each frame the `width` most probable prefixes stay, so a beam
    that no prefix ever leaves finds the most probable labelling. All characters are tried in every
    frame, for all utterances at once.

    Args:
        log_probs: float `[n, frames, classes]`, log probabilities; class 0 is the blank.
        lengths: int64 `[n]`, how many frames of each row are real.
        width: how many prefixes to keep, at least 1.

    A frame with a NaN counts as a blank.
    """
    silent = _silent(log_probs, lengths)
    log_probs = log_probs.double().masked_fill(silent[..., None], -math.inf)
    log_probs[..., BLANK].masked_fill_(silent, 0.0)
    count, frames, _ = log_probs.shape
    beam = _Beam.start(count, width, log_probs.device)
    origins = torch.empty(count, frames, width, dtype=torch.int64, device=log_probs.device)
    emitted = torch.empty_like(origins)
    for time in range(frames):
        beam, origins[:, time], emitted[:, time] = _advance(beam, log_probs[:, time])
    return _written(_best_path(origins, emitted))


@dataclass(frozen=True, eq=False)
class _Beam:
    """The prefixes of a beam, each `[n, width]`, the most probable first.

    Attributes:
        blank: log probability of the prefix over the paths that end in a blank.
        label: the same over the paths that end in its last character.
        last: that character, or the blank where the prefix is empty.
        key: hash of the prefix.
        parent: hash of the prefix without its last character; `_NONE` where there is none, or
            where the slot is empty, which is where both probabilities are zero.
    """

    blank: Tensor
    label: Tensor
    last: Tensor
    key: Tensor
    parent: Tensor

    @classmethod
    def start(cls, count: int, width: int, device: torch.device) -> _Beam:
        """Return beams with the empty prefix alone."""
        label = torch.full((count, width), -math.inf, dtype=torch.float64, device=device)
        blank = label.clone()
        blank[:, 0] = 0.0
        key = torch.full((count, width), _ROOT, device=device)
        return cls(blank, label, torch.full_like(key, BLANK), key, torch.full_like(key, _NONE))


def _advance(beam: _Beam, frame: Tensor) -> tuple[_Beam, Tensor, Tensor]:
    """Read a frame `[n, classes]`.

    Returns:
        The next beam; the slot `[n, width]` that each of its prefixes came from; and the character
        `[n, width]` that was added to it, or the blank where the prefix stayed as it was.
    """
    total = torch.logaddexp(beam.blank, beam.label)
    of_last = frame.gather(1, beam.last)
    scores = total[..., None] + frame[:, None]
    # Right after a character the same one only prolongs it; it is written anew after a blank.
    scores.scatter_(2, beam.last[..., None], (beam.blank + of_last)[..., None])
    merged = _take_extensions_within(beam, scores)
    blank = total + frame[:, BLANK, None]
    label = torch.logaddexp(beam.label + of_last, merged)
    scores[..., BLANK] = torch.logaddexp(blank, label)

    best, index = scores.flatten(1).topk(beam.key.shape[1])
    origin, emitted = index // frame.shape[1], index % frame.shape[1]
    stays = emitted == BLANK
    key = beam.key.gather(1, origin)
    parent = torch.where(stays, beam.parent.gather(1, origin), key)
    following = _Beam(
        blank=blank.gather(1, origin).masked_fill(~stays, -math.inf),
        label=torch.where(stays, label.gather(1, origin), best),
        last=torch.where(stays, beam.last.gather(1, origin), emitted),
        key=torch.where(stays, key, key * _MULTIPLIER + emitted),
        # An empty slot may hold the hash of a prefix that lives elsewhere; nothing joins it.
        parent=parent.masked_fill(best == -math.inf, _NONE),
    )
    return following, origin, emitted


def _take_extensions_within(beam: _Beam, scores: Tensor) -> Tensor:
    """Move the extensions that are prefixes of the beam already out of `scores`, in place.

    Returns:
        What each prefix of the beam gains: its parent's extension by its last character, or -inf
        where the parent is not in the beam: `[n, width]`.
    """
    is_parent = beam.key[:, :, None] == beam.parent[:, None, :]
    into = beam.last[:, None, :].expand_as(is_parent)
    gains = scores.gather(2, into).masked_fill(~is_parent, -math.inf).amax(dim=1)
    # A minimum, since two prefixes with the same last character write to the same places.
    limit = torch.where(is_parent, -math.inf, math.inf).to(scores)
    scores.scatter_reduce_(2, into, limit, "amin")
    return gains


def _best_path(origins: Tensor, emitted: Tensor) -> Tensor:
    """Follow the first slot of the last frame back, through `origins` `[n, frames, width]`.

    Returns:
        What was emitted on the way: `[n, frames]`.
    """
    path = torch.empty_like(emitted[..., 0])
    row = torch.arange(len(path), device=path.device)
    slot = torch.zeros_like(row)
    for time in reversed(range(path.shape[1])):
        path[:, time] = emitted[row, time, slot]
        slot = origins[row, time, slot]
    return path


def _silent(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Return where nothing can be written, bool `[n, frames]`: in padding and where NaNs are."""
    real = valid_mask(moved_to(log_probs.device, lengths), log_probs.shape[1])
    return ~real | log_probs.isnan().any(dim=-1)


def _written(path: Tensor) -> list[list[int]]:
    """Return the rows of `path` without blanks."""
    return [row[row != BLANK].tolist() for row in path.cpu()]
