"""Utterances as a speech model reads them: padded, with their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedpriv.transfer import moved_to


@dataclass(frozen=True, eq=False)
class Utterances:
    """Utterances with their transcripts, each padded to the longest.

    Attributes:
        inputs: float `[n, samples]`, waveforms in [-1, 1], or `[n, frames, mels]`, features.
        lengths: int64 `[n]`, how many samples or frames of each row are real.
        targets: int64 `[n, characters]`, indices into the alphabet, padded with the blank, 0.
        target_lengths: int64 `[n]`, how many of them are real.
        skipped: how many more there were that could not be used. Private, as the others are.
    """

    inputs: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    skipped: int = 0

    @classmethod
    def pack(
        cls, inputs: Sequence[Tensor], targets: Sequence[Tensor], skipped: int = 0
    ) -> Utterances:
        """Pad waveforms `[samples]` (or features `[frames, mels]`) and targets `[characters]`."""
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
        if not inputs:
            none = torch.zeros(0, dtype=torch.int64)
            return cls(torch.zeros(0, 0), none, torch.zeros(0, 0, dtype=torch.int64), none, skipped)
        return cls(
            pad_sequence(list(inputs), batch_first=True),
            torch.tensor([len(one) for one in inputs]),
            pad_sequence(list(targets), batch_first=True),
            torch.tensor([len(one) for one in targets]),
            skipped,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sizes(self) -> Tensor:
        """What each utterance costs to train on, relative to the others: its length."""
        return self.lengths

    def take(self, index: Tensor) -> Utterances:
        """Return the utterances at `index` (int64 `[m]`), padded to the longest among them."""
        lengths, target_lengths = self.lengths[index], self.target_lengths[index]
        longest = int(lengths.max()) if len(index) else 0
        most = int(target_lengths.max()) if len(index) else 0
        return Utterances(
            self.inputs[index, :longest], lengths, self.targets[index, :most], target_lengths
        )

    def padded_to_multiple(self, frames: int) -> Utterances:
        """Return them padded further, until their padded length is a multiple of `frames`."""
        padding = self.inputs.new_zeros(
            len(self), -self.inputs.shape[1] % frames, *self.inputs.shape[2:]
        )
        return replace(self, inputs=torch.cat([self.inputs, padding], dim=1))

    def to(self, device: torch.device) -> Utterances:
        """Return them with inputs and targets on another device; the host reads the lengths."""
        inputs, targets = moved_to(device, self.inputs), moved_to(device, self.targets)
        return replace(self, inputs=inputs, targets=targets)

    @classmethod
    def join(cls, parts: Sequence[Utterances]) -> Utterances:
        """Lay the utterances of several users end to end, all padded to the longest."""
        return cls(
            _joined([part.inputs for part in parts]),
            torch.cat([part.lengths for part in parts]),
            _joined([part.targets for part in parts]),
            torch.cat([part.target_lengths for part in parts]),
            sum(part.skipped for part in parts),
        )

    @classmethod
    def gather(cls, parts: Sequence[Utterances], indices: Sequence[Tensor]) -> Utterances:
        """Lay the utterances at each part's own indices end to end, padded to the longest."""
        return cls.join([part.take(index) for part, index in zip(parts, indices, strict=True)])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate `[n_i, t_i, ...]`, padded with zeros to the longest t."""
    rows, longest = sum(len(part) for part in parts), max(part.shape[1] for part in parts)
    whole = parts[0].new_zeros(rows, longest, *parts[0].shape[2:])
    first = 0
    for part in parts:
        whole[first : first + len(part), : part.shape[1]] = part
        first += len(part)
    return whole
