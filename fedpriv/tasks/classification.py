"""Examples to classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedpriv.data.federated import Examples
from fedpriv.tasks.base import (
    BY_CLASS,
    Plain,
    in_order,
    outputs_of,
    require_classes,
    require_kind,
    require_shape,
)
from fedpriv.tasks.quality import ACCURACY, Quality
from fedpriv.tasks.registry import TaskOptions


@dataclass(frozen=True)
class Classification(Plain):
    """Images to classes: cross-entropy, and the share of right answers."""

    quality: ClassVar[Quality] = ACCURACY

    def prepare(self, model: nn.Module, examples: Examples) -> Examples:
        """Return the examples as they are.

        Raises:
            InputError: their targets are no classes.
        """
        targets = examples.targets
        fits = targets.dim() == 1 and targets.dtype == torch.int64
        require_kind("classification", fits, "classes, int64 [n]", targets)
        return examples

    def require_targets(self, examples: Examples, classes: int) -> None:
        """Take what is a class: see `Task`."""
        require_classes(examples.targets, classes)

    def require_model(self, model: nn.Module, examples: Examples, classes: int) -> None:
        """Take one with a score for each class: see `Task`."""
        outputs = outputs_of(model, examples.inputs)
        require_shape(outputs, (len(examples), classes), "a score for each class of the data")

    def losses(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the cross-entropy of each example: `[n]`."""
        return F.cross_entropy(outputs_of(model, batch.inputs), batch.targets, reduction="none")

    @torch.no_grad()
    def measure(
        self, model: nn.Module, parts: Sequence[Examples], batch_size: int
    ) -> dict[str, Any]:
        """Return mean `loss`, `accuracy` in [0, 1] of so many `examples`, and `BY_CLASS`."""
        model.eval()
        loss, count = 0.0, sum(len(part) for part in parts)
        targets, answers = [], []
        for batch in chain.from_iterable(in_order(part, batch_size) for part in parts):
            outputs = outputs_of(model, batch.inputs)
            loss += float(F.cross_entropy(outputs, batch.targets, reduction="sum"))
            targets.append(batch.targets.cpu())
            answers.append(outputs.argmax(dim=-1).cpu())
        by_class = _by_class(torch.cat(targets), torch.cat(answers), outputs.shape[-1])
        accuracy = sum(by_class["right"]) / count
        return {"loss": loss / count, "accuracy": accuracy, "examples": count, BY_CLASS: by_class}


def _by_class(targets: Tensor, answers: Tensor, classes: int) -> dict[str, list[int]]:
    """Count, of each class, its examples, the right answers, and how often it was the answer."""
    counted = {"examples": targets, "right": targets[answers == targets], "answers": answers}
    return {
        name: torch.bincount(which, minlength=classes).tolist() for name, which in counted.items()
    }


class ClassificationOptions(TaskOptions):
    """Nothing to choose."""

    name: str = Field(default="classification", description="classification: cross-entropy")


def build_classification(options: ClassificationOptions) -> Classification:
    """Return the task."""
    return Classification()
