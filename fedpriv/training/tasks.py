"""What a model is trained to do: how its loss is taken, and how it is measured.

A task is a frozen dataclass; what it knows is public.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpriv.data.federated import Batch, Examples
from fedpriv.data.text import BLANK, Alphabet
from fedpriv.data.utterances import Utterances
from fedpriv.models.speech import SpeechTransformer, tokens_of
from fedpriv.training.decoding import Decode
from fedpriv.training.error_rates import error_rates
from fedpriv.training.spec_augment import SpecAugment
from fedpriv.transfer import moved_to

B = TypeVar("B", bound=Batch)

# Samples whose spectra are taken at once: they need many times the memory of the samples.
_SAMPLES_AT_ONCE = 2**22
_FRAMES_TO_A_MULTIPLE_OF = 24


class Task(Protocol[B]):
    """How a model learns from a batch, and how well it does.

    Examples are prepared and augmented on the host, and go to the model's device step by step: a
    GPU's memory is for users' parameters, and whoever chooses rows there has to send indices.
    """

    def prepare(self, model: nn.Module, examples: B) -> B:
        """Do what is the same in every round: features, and leaving out what cannot be learnt."""

    #: Whether taking losses reads numbers on the host, which a recorded pass cannot.
    waits: ClassVar[bool]

    def augments(self, round_: int) -> bool:
        """Whether `augment` changes anything in a round; where not, nobody draws for it."""

    def augment(self, batch: B, round_: int, generator: torch.Generator) -> B:
        """Return the batch as it is trained on in a round."""

    def losses(self, model: nn.Module, batch: B) -> Tensor:
        """Return the loss of each example: `[n]`."""

    def measure(self, model: nn.Module, parts: Sequence[B], batch_size: int) -> dict[str, float]:
        """Return mean loss and error measures of prepared examples, which come in parts."""


@dataclass(frozen=True)
class Classification:
    """Images to classes: cross-entropy, and the share of right answers."""

    waits: ClassVar[bool] = False

    def prepare(self, model: nn.Module, examples: Examples) -> Examples:
        """Return the examples as they are."""
        return examples

    def augments(self, round_: int) -> bool:
        """Never."""
        return False

    def augment(self, batch: Examples, round_: int, generator: torch.Generator) -> Examples:
        """Return the batch as it is."""
        return batch

    def losses(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the cross-entropy of each example: `[n]`."""
        return F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")

    @torch.no_grad()
    def measure(
        self, model: nn.Module, parts: Sequence[Examples], batch_size: int
    ) -> dict[str, float]:
        """Return mean `loss`, and `accuracy` in [0, 1]."""
        model.eval()
        loss, correct, count = 0.0, 0, sum(len(part) for part in parts)
        for batch in chain.from_iterable(_in_order(part, batch_size) for part in parts):
            outputs = model(batch.inputs)
            loss += float(F.cross_entropy(outputs, batch.targets, reduction="sum"))
            correct += int((outputs.argmax(dim=-1) == batch.targets).sum())
        return {"loss": loss / count, "accuracy": correct / count}


@dataclass(frozen=True)
class Recognition:
    """Speech to text: CTC (Graves et al. 2006), word and character error rates.

    Attributes:
        alphabet: the characters.
        decode: how log-probabilities become characters.
        spec_augment: what is masked in training; None for nothing.
    """

    alphabet: Alphabet
    decode: Decode
    spec_augment: SpecAugment | None = None
    waits: ClassVar[bool] = True  # PyTorch's CTC loss reads its lengths

    @torch.no_grad()
    def prepare(self, model: nn.Module, examples: Utterances) -> Utterances:
        """Return features instead of waveforms, without utterances that no path can spell.

        CTC needs a token for each character and one between equal neighbours; what is shorter
        has no finite loss. Those left out are counted in `skipped`.
        """
        if len(examples) == 0:
            return examples
        front_end = _front_end(model)
        parts = []
        for part in _in_order(examples, max(1, _SAMPLES_AT_ONCE // examples.inputs.shape[1])):
            features, frames = front_end(part.inputs, part.lengths)
            parts.append(replace(part, inputs=features.to(part.inputs.device), lengths=frames))
        whole = Utterances.join(parts)
        possible = tokens_of(whole.lengths) >= _shortest_path(whole)
        kept = whole.take(possible.nonzero().flatten())
        return replace(kept, skipped=examples.skipped + len(examples) - len(kept))

    def augments(self, round_: int) -> bool:
        """From the recipe's round on, where it masks anything."""
        return self.spec_augment is not None and round_ >= self.spec_augment.from_round

    def augment(self, batch: Utterances, round_: int, generator: torch.Generator) -> Utterances:
        """Return the batch with parts of its features masked, from the recipe's round on."""
        if not self.augments(round_):
            return batch
        assert self.spec_augment is not None
        masked = self.spec_augment.apply(batch.inputs, batch.lengths, generator)
        return replace(batch, inputs=masked)

    def losses(self, model: nn.Module, batch: Utterances) -> Tensor:
        """Return the CTC loss of each utterance, divided by its number of characters: `[n]`."""
        # Matrix libraries compile a kernel for each shape they meet, so they should meet few.
        batch = batch.padded_to_multiple(_FRAMES_TO_A_MULTIPLE_OF)
        log_probs, tokens = model(batch.inputs, batch.lengths)
        return _ctc(log_probs, tokens, batch)

    @torch.no_grad()
    def measure(
        self, model: nn.Module, parts: Sequence[Utterances], batch_size: int
    ) -> dict[str, float]:
        """Return mean `loss`, `wer`, `cer`, and the edits that make the word error rate."""
        model.eval()
        loss = 0.0
        spoken, heard = [], []
        # Neighbours in length share a batch, so that little of it is padding.
        ordered = [part.take(part.sizes.argsort()) for part in parts]
        for batch in chain.from_iterable(_in_order(part, batch_size) for part in ordered):
            log_probs, tokens = model(batch.inputs, batch.lengths)
            loss += float(_ctc(log_probs, tokens, batch).sum())
            heard += [self.alphabet.decode(path) for path in self.decode(log_probs, tokens)]
            spoken += [
                self.alphabet.decode(target[:length].tolist())
                for target, length in zip(batch.targets.cpu(), batch.target_lengths, strict=True)
            ]
        rates = error_rates(spoken, heard)
        return {
            "loss": loss / len(spoken),
            "wer": rates.wer,
            "cer": rates.cer,
            "substitutions": rates.substitutions,
            "insertions": rates.insertions,
            "deletions": rates.deletions,
            "words": rates.words,
        }


def _front_end(model: nn.Module) -> nn.Module:
    return cast(SpeechTransformer, model).front_end


def _ctc(log_probs: Tensor, tokens: Tensor, batch: Utterances) -> Tensor:
    """Return the CTC loss of each utterance, divided by its number of characters: `[n]`."""
    losses = F.ctc_loss(
        log_probs.transpose(0, 1),
        batch.targets,
        tokens,
        batch.target_lengths,
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    return losses / moved_to(losses.device, batch.target_lengths.clamp(min=1))


def _shortest_path(examples: Utterances) -> Tensor:
    """Return the least number of tokens that can spell each transcript: int64 `[n]`.

    An empty transcript counts as impossible: there is nothing to learn from it.
    """
    targets, lengths = examples.targets, examples.target_lengths
    places = torch.arange(1, max(1, targets.shape[1]), device=targets.device)
    repeats = (targets[:, 1:] == targets[:, :-1]) & (places < lengths[:, None])
    needed = lengths + repeats.sum(1)
    return torch.where(lengths > 0, needed, torch.iinfo(torch.int64).max)


def _in_order(examples: B, batch_size: int) -> Iterator[B]:
    for first in range(0, len(examples), batch_size):
        yield examples.take(torch.arange(first, min(first + batch_size, len(examples))))
