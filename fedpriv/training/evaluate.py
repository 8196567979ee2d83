"""Measuring a model on held-out examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedpriv.data.federated import Examples
from fedpriv.training.local import Loss


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and the share of right answers, in [0, 1]."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, loss: Loss, batch_size: int) -> Evaluation:
    """Return mean loss and accuracy of `model` on `examples` (on the model's device)."""
    model.eval()
    total_loss, correct = 0.0, 0
    for first in range(0, len(examples), batch_size):
        inputs = examples.inputs[first : first + batch_size]
        targets = examples.targets[first : first + batch_size]
        outputs = model(inputs)
        total_loss += float(loss(outputs, targets)) * len(targets)
        correct += int((outputs.argmax(dim=-1) == targets).sum())
    return Evaluation(total_loss / len(examples), correct / len(examples))
