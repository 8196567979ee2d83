"""The file of a seed model: the blocks that a model begins with."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedpriv.errors import InputError
from fedpriv.training.checkpoint import digest_of


def read_seed_model(path: Path) -> dict[str, Tensor]:
    """Return the blocks in a seed model's file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"seed_model.path: cannot read {path} ({error})") from None


def load_seed_blocks(path: Path, sha256: str, model: nn.Module) -> None:
    """Copy the blocks of the file at `path` into `model`: its parameters, and what else it has.

    Raises:
        InputError: it is missing or another one, has other blocks than `model`, or numbers that
            are not finite.
    """
    blocks = read_seed_model(path)
    if sha256 != digest_of(blocks):
        raise InputError(f"seed_model.path: {path} is not the file that this run began with")
    constants = dict(model.named_buffers())
    own: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.requires_grad or name in blocks
    }
    own |= {name: constants[name] for name in blocks.keys() & constants.keys()}
    shapes = {name: block.shape for name, block in own.items()}
    if {name: block.shape for name, block in blocks.items()} != shapes:
        raise InputError(f"seed_model.path: {path} is of another shape than the config's model")
    if not all(bool(block.isfinite().all()) for block in blocks.values()):
        raise InputError(f"seed_model.path: {path} holds a NaN or Inf")
    with torch.no_grad():
        for name, block in blocks.items():
            own[name].copy_(block)
