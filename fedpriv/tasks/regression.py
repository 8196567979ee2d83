"""Examples to numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpriv.counting import numbered
from fedpriv.data.federated import Examples
from fedpriv.errors import InputError
from fedpriv.tasks.base import Plain, in_order, outputs_of, require_kind, require_shape
from fedpriv.tasks.quality import Quality
from fedpriv.tasks.registry import TaskOptions

RMSE = Quality("rmse", "root mean squared error", "RMSE", higher_is_better=False)


class RegressionOptions(TaskOptions):
    """Nothing to choose."""

    name: str = Field(default="regression", description="regression: mean squared error")


@dataclass(frozen=True)
class Regression(Plain):
    """Examples to one number each, or to several: the mean of their squared errors.

    Targets are float32 `[n]` or `[n, outputs]`, in whatever unit the data set has; a data set's
    `classes` is its number of outputs. A model returns as many numbers an example.
    """

    quality: ClassVar[Quality] = RMSE

    def prepare(self, model: nn.Module, examples: Examples) -> Examples:
        """Return the examples as they are.

        Raises:
            InputError: their targets are no numbers.
        """
        fits = examples.targets.is_floating_point()
        require_kind("regression", fits, "numbers, float32 [n, outputs]", examples.targets)
        return examples

    def require_targets(self, examples: Examples, classes: int) -> None:
        """Take as many numbers an example as there are outputs: see `Task`."""
        width = examples.targets[:1].numel() if examples.targets.dim() > 1 else 1
        if len(examples) and width != classes:
            raise InputError(
                f"data: a target is {numbered(width, 'number')}, and the data set's classes, here "
                f"its outputs, are {classes}; let it give targets float32 [n, {classes}], or say "
                f"classes = {width}"
            )

    def require_model(self, model: nn.Module, examples: Examples, classes: int) -> None:
        """Take one with a number for each output: see `Task`."""
        outputs = outputs_of(model, examples.inputs)
        if outputs.dim() == 1:  # one number an example may come without a dimension of its own
            outputs = outputs[:, None]
        require_shape(outputs, (len(examples), classes), "the data's classes, outputs here")

    def losses(self, model: nn.Module, batch: Examples) -> Tensor:
        """Return the mean of the squared errors of each example: `[n]`."""
        return _errors(outputs_of(model, batch.inputs), batch.targets).square().mean(dim=1)

    @torch.no_grad()
    def measure(
        self, model: nn.Module, parts: Sequence[Examples], batch_size: int
    ) -> dict[str, float]:
        """Return mean `loss`, its root `rmse`, and the mean absolute error `mae`."""
        model.eval()
        squares = absolutes = 0.0
        count = sum(part.targets.numel() for part in parts)
        for batch in chain.from_iterable(in_order(part, batch_size) for part in parts):
            errors = _errors(outputs_of(model, batch.inputs), batch.targets).double()
            squares += float(errors.square().sum())
            absolutes += float(errors.abs().sum())
        loss = squares / count
        return {"loss": loss, "rmse": math.sqrt(loss), "mae": absolutes / count}


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return outputs minus targets, `[n, outputs]`."""
    wanted = targets.reshape(len(targets), -1)
    # Not left to broadcasting, which would take every target from every output.
    return outputs.reshape(wanted.shape) - wanted


def build_regression(options: RegressionOptions) -> Regression:
    """Return the task."""
    return Regression()
