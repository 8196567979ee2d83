"""Text: each token from those before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedpriv.data.federated import Examples
from fedpriv.data.tokens import NO_TOKEN
from fedpriv.errors import InputError
from fedpriv.tasks.base import Plain, in_order, outputs_of, require_classes, require_shape
from fedpriv.tasks.quality import Quality
from fedpriv.tasks.registry import TaskOptions

PERPLEXITY = Quality("perplexity", "perplexity", "perplexity", higher_is_better=False)


class NextTokenOptions(TaskOptions):
    """Nothing to choose."""

    name: str = Field(
        default="next_token", description="next_token: cross-entropy of each token after the others"
    )


@dataclass(frozen=True)
class NextToken(Plain):
    """Sequences of tokens: each from those before it.

    Inputs are int64 `[n, T]`, targets `[n, T]` the tokens one place later, `NO_TOKEN` where there
    is none; a data set's `classes` is the size of its vocabulary, V. A model returns `[n, T, V]`.
    """

    quality: ClassVar[Quality] = PERPLEXITY

    def require_targets(self, examples: Examples, classes: int) -> None:
        """Take tokens of the vocabulary: see `Task`."""
        require_classes(examples.inputs, classes)
        require_classes(examples.targets[examples.targets != NO_TOKEN], classes)

    def largest_step(
        self, model: nn.Module, batch_size: int, batch_sizes: int | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """Return a batch of tokens: see `Task`."""
        return (torch.zeros(batch_size, *shape, dtype=torch.int64),)

    def prepare(self, model: nn.Module, examples: Examples) -> Examples:
        """Leave out sequences without any target; they are counted as skipped.

        Raises:
            InputError: inputs or targets are no tokens.
        """
        for tokens in (examples.inputs, examples.targets):
            if tokens.dtype != torch.int64 or tokens.shape != examples.inputs.shape:
                raise InputError(
                    "data: next_token is for sequences of tokens, int64 [n, T] for inputs and "
                    f"targets, got {tokens.dtype} {tuple(tokens.shape)}"
                )
        kept = (examples.targets != NO_TOKEN).any(dim=1)
        return Examples(
            examples.inputs[kept],
            examples.targets[kept],
            examples.skipped + int((~kept).sum()),
        )

    def require_model(self, model: nn.Module, examples: Examples, classes: int) -> None:
        """Take one with a score for each token of the vocabulary at each place: see `Task`."""
        wanted = (*examples.inputs.shape, classes)
        outputs = outputs_of(model, examples.inputs)
        require_shape(outputs, wanted, "for each place a score for each token of the vocabulary")

    def losses(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the mean cross-entropy of each sequence's tokens, nats: `[n]`."""
        losses = _cross_entropy(outputs_of(model, batch.inputs), batch.targets)
        return losses.sum(dim=1) / (batch.targets != NO_TOKEN).sum(dim=1).clamp(min=1)

    @torch.no_grad()
    def measure(
        self, model: nn.Module, parts: Sequence[Examples], batch_size: int
    ) -> dict[str, float]:
        """Return `loss`, nats a token, `perplexity` e^loss, and `accuracy` of the likeliest one."""
        model.eval()
        loss, correct, count = 0.0, 0, 0
        for batch in chain.from_iterable(in_order(part, batch_size) for part in parts):
            outputs = outputs_of(model, batch.inputs)
            loss += float(_cross_entropy(outputs, batch.targets).double().sum())
            correct += int((outputs.argmax(dim=-1) == batch.targets).sum())
            count += int((batch.targets != NO_TOKEN).sum())
        mean = loss / count
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return {"loss": mean, "perplexity": perplexity, "accuracy": correct / count}


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each token, zero where there is none: `[n, T]`."""
    return F.cross_entropy(
        outputs.transpose(1, 2), targets, reduction="none", ignore_index=NO_TOKEN
    )


def build_next_token(options: NextTokenOptions) -> NextToken:
    """Return the task."""
    return NextToken()
