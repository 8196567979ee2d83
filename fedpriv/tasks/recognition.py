"""Speech to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedpriv.data.text import BLANK, Alphabet
from fedpriv.data.utterances import Utterances
from fedpriv.errors import InputError
from fedpriv.models.speech import HOP_SECONDS, SpeechTransformer
from fedpriv.tasks.base import in_order, require_classes, require_shape
from fedpriv.tasks.decoding import Decode
from fedpriv.tasks.error_rates import error_rates
from fedpriv.tasks.quality import WORD_ERROR_RATE, Quality
from fedpriv.tasks.registry import TaskOptions
from fedpriv.tasks.spec_augment import SpecAugment
from fedpriv.transfer import moved_to

# Samples whose spectra are taken at once: they need many times the memory of the samples.
_SAMPLES_AT_ONCE = 2**22
_FRAMES_TO_A_MULTIPLE_OF = 24
# Of batches that have no length in time: an utterance's seconds.
_LONGEST_KNOWN = 20


class SpeechModel(Protocol):
    """A model that can be trained to write what is said.

    It may have a `front_end(waves, lengths)` that returns features, `[n, frames, ...]`, and how
    many of each are real. Features are then taken once, and are what the model reads, what is
    masked and what `lengths` count; without one that is waveforms, `[n, samples]`.
    """

    def tokens(self, lengths: Tensor) -> Tensor:
        """Return of how many tokens inputs of these lengths are given scores: int64 `[n]`."""

    def __call__(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities `[n, tokens, classes]`, the blank first, and `tokens`."""


def sizes_a_second(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Return how much a second of sound of `shape`, samples a second, adds to a length."""
    return 1 / HOP_SECONDS if hasattr(model, "front_end") else shape[0]


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
    quality: ClassVar[Quality] = WORD_ERROR_RATE
    waits: ClassVar[bool] = True  # PyTorch's CTC loss reads its lengths
    long_examples: ClassVar[bool] = True

    def require(self, dataset: Any) -> None:
        """Take recordings that can be used: see `Task`."""
        dataset.require_usable()

    def require_targets(self, examples: Utterances, classes: int) -> None:
        """Take what is in the alphabet: see `Task`."""
        require_classes(examples.targets, classes)

    def largest_step(
        self, model: nn.Module, batch_size: int, batch_sizes: int | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """Return features and lengths: see `Task`."""
        frames = batch_sizes or round(batch_size * _LONGEST_KNOWN / HOP_SECONDS)
        each = max(1, frames // batch_size)
        mels = cast(SpeechTransformer, model).front_end.bands.shape[1]
        return torch.empty(batch_size, each, mels), torch.full((batch_size,), each)

    def require_model(self, model: nn.Module, examples: Utterances, classes: int) -> None:
        """Take one that gives log-probabilities of characters, and their lengths: see `Task`."""
        given = model(examples.inputs, examples.lengths)
        if not (isinstance(given, tuple) and len(given) == 2 and given[0].dim() == 3):
            raise InputError(
                f"returns a {type(given).__name__}; for speech it must return log-probabilities, "
                "[n, tokens, classes], and how many tokens of each are real, [n]"
            )
        log_probs, tokens = given
        wanted = (len(examples), log_probs.shape[1], classes)
        require_shape(log_probs, wanted, "for each token a score for each character and the blank")
        if tokens.tolist() != cast(SpeechModel, model).tokens(examples.lengths).tolist():
            raise InputError("returns other numbers of tokens than its method `tokens` says")
        if self.spec_augment is not None and examples.inputs.dim() == 2:
            raise InputError(
                "reads waveforms, and local.spec_augment masks features, which a model with a "
                "front_end has; write local.spec_augment: null"
            )

    @torch.no_grad()
    def prepare(self, model: nn.Module, examples: Utterances) -> Utterances:
        """Return a model's features in place of waveforms, without what no path can spell.

        CTC needs a token for each character and one between equal neighbours; what is shorter
        has no finite loss. Those left out are counted in `skipped`.
        """
        if not hasattr(model, "tokens"):
            raise InputError(
                "model.name: a model of speech needs a method tokens(lengths), which returns for "
                "how many tokens inputs of these lengths get scores"
            )
        if len(examples) == 0:
            return examples
        whole = _features(model, examples) if hasattr(model, "front_end") else examples
        possible = cast(SpeechModel, model).tokens(whole.lengths) >= _shortest_path(whole)
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
        """Return mean `loss`, `wer`, `cer`, and the edits that make the word error rate.

        With ten utterances or more also `wer_low` and `wer_high`, its interval by a bootstrap.
        """
        model.eval()
        loss = 0.0
        spoken, heard = [], []
        # Neighbours in length share a batch, so that little of it is padding.
        ordered = [part.take(part.sizes.argsort()) for part in parts]
        for batch in chain.from_iterable(in_order(part, batch_size) for part in ordered):
            log_probs, tokens = model(batch.inputs, batch.lengths)
            loss += float(_ctc(log_probs, tokens, batch).sum())
            heard += [self.alphabet.decode(path) for path in self.decode(log_probs, tokens)]
            spoken += [
                self.alphabet.decode(target[:length].tolist())
                for target, length in zip(batch.targets.cpu(), batch.target_lengths, strict=True)
            ]
        rates = error_rates(spoken, heard)
        interval = zip(("wer_low", "wer_high"), rates.interval or (), strict=False)
        return {
            "loss": loss / len(spoken),
            "wer": rates.wer,
            "cer": rates.cer,
            "substitutions": rates.substitutions,
            "insertions": rates.insertions,
            "deletions": rates.deletions,
            "words": rates.words,
            **dict(interval),
        }


def _features(model: nn.Module, examples: Utterances) -> Utterances:
    front_end = cast(SpeechTransformer, model).front_end
    parts = []
    for part in in_order(examples, max(1, _SAMPLES_AT_ONCE // examples.inputs.shape[1])):
        features, frames = front_end(part.inputs, part.lengths)
        parts.append(replace(part, inputs=features.to(part.inputs.device), lengths=frames))
    return Utterances.join(parts)


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


class RecognitionOptions(TaskOptions):
    """What is not said elsewhere: `evaluation` has the decoder, `local` what is masked."""

    name: str = Field(
        default="recognition", description="recognition: speech to characters, by CTC"
    )


def build_recognition(
    options: RecognitionOptions,
    dataset: Any,
    decode: Decode,
    spec_augment: SpecAugment | None,
) -> Recognition:
    """Return the task for the data set's alphabet.

    Raises:
        InputError: the data set has none.
    """
    if not hasattr(dataset, "alphabet"):
        raise InputError(
            "task.name: recognition is for data sets of speech, which have an alphabet"
        )
    return Recognition(dataset.alphabet, decode, spec_augment)
