"""Adapters that begin with what public examples excite: EVA by `peft` (Paischer et al. 2024).

A begins with the principal directions of what its map reads, B with zeros, so that the model
computes what it did. The server alone does this: A is trained, and so it is sent like all that is.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from fedpriv.data.federated import Batch
from fedpriv.draws import drawing_from
from fedpriv.errors import InputError
from fedpriv.failures import told_as
from fedpriv.models.lora import adapters_of, merged
from fedpriv.tasks.base import Task, in_order
from fedpriv.threads import threads_of_torch
from fedpriv.training.cohort import CohortTrainer

# Passes after which directions that still turn will not settle.
_MOST_PASSES = 50
# Examples of unlike length are read one by one, without each other's padding.
_LONG_AT_ONCE = 1


class _Unsettled(Exception):  # noqa: N818 - ends a loop of peft's that would have no end
    """The directions turn with every pass."""


def begin_with_public(trainer: CohortTrainer, batch_size: int, seed: int) -> None:
    """Put the directions of what adapted maps read of held-out examples into their A, in place.

    Inputs alone bear on it, and not targets.

    Raises:
        InputError: a map that is adapted is not linear, or the examples excite too few directions.
    """
    model, task = trainer.model, trainer.task
    rank = _require_linear(model)
    size = _LONG_AT_ONCE if task.long_examples else batch_size
    parts = (task.prepare(model, part) for part in trainer.dataset.evaluation())
    batches = [batch for part in parts if len(part) for batch in in_order(part, size)]
    if not batches:
        raise InputError("model.lora.variant: eva reads held-out examples, and there are none")
    with drawing_from(seed, trainer.device), threads_of_torch(1):
        found = _directions(model, task, batches, rank)
    for path, layer in adapters_of(model):
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(found[path])


def _require_linear(model: nn.Module) -> int:
    """Return the rank of the adapters.

    Raises:
        InputError: one is not beside a linear map, or has a larger rank than what that reads.
    """
    from transformers.pytorch_utils import Conv1D

    rank = 0
    for path, layer in adapters_of(model):
        base, (rank, reads) = layer.get_base_layer(), layer.lora_A["default"].weight.shape[:2]
        if not isinstance(base, nn.Linear | Conv1D):
            raise InputError(
                f"model.lora.variant: eva is for linear maps, and {path} is a "
                f"{type(base).__name__}; leave it out of lora.target_modules"
            )
        if rank > reads:
            raise InputError(
                f"model.lora.r: {path} reads {reads} numbers, which have no {rank} directions for "
                f"eva; write at most {reads}, or leave it out of lora.target_modules"
            )
    return rank


def _directions(
    model: nn.Module, task: Task[Any], batches: Sequence[Batch], rank: int
) -> dict[str, Tensor]:
    """Return `[rank, inputs]` for each adapted map, by its path."""
    from peft import EvaConfig, LoraConfig, get_eva_state_dict

    paths = [path for path, _ in adapters_of(model)]
    config = LoraConfig(
        r=rank,
        target_modules="|".join(map(re.escape, paths)),
        init_lora_weights="eva",
        # Ranks stay as they are: the shapes of what is trained are known to every process.
        eva_config=EvaConfig(rho=1.0),
    )
    most, passes = _MOST_PASSES * len(batches), iter(range(_MOST_PASSES * len(batches)))

    def forward(whole: nn.Module, batch: Any) -> None:
        if next(passes, most) == most:
            raise _Unsettled
        task.losses(whole, batch)

    with told_as("model.lora.variant: eva cannot begin here"):  # model's code, or peft's
        try:
            with redirect_stdout(io.StringIO()):  # peft prints which batches are too small
                return get_eva_state_dict(
                    merged(model),
                    batches,
                    config,
                    forward_fn=forward,
                    prepare_model_inputs_fn=None,
                    prepare_layer_inputs_fn=_rows,
                    show_progress_bar=False,
                )
        except _Unsettled:
            raise InputError(
                f"model.lora.r: eva finds no {rank} directions that the public examples excite in "
                f"each of {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}; write a "
                "smaller one, or variant: pissa, which reads no data"
            ) from None


def _rows(read: Any, model_input: Any, name: str) -> Tensor:
    """Return what a map has read: `[rows, numbers]`."""
    inputs = read if isinstance(read, Tensor) else read[0]
    return inputs.reshape(-1, inputs.shape[-1]).contiguous()
