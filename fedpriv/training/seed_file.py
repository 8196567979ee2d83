"""The file of a seed model: the blocks that a model begins with."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
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


def load_seed_blocks(
    path: Path, sha256: str, model: nn.Module, reinitialize: Sequence[str] = ()
) -> None:
    """Copy the blocks of the file at `path` into `model`: its parameters, and what else it has.

    What matches a pattern of `reinitialize` stays as it is in `model`.

    Raises:
        InputError: it is missing or another one, has other blocks than `model`, or numbers that
            are not finite; or a pattern matches no parameter, or all match one.
    """
    blocks = read_seed_model(path)
    if sha256 != digest_of(blocks):
        raise InputError(f"seed_model.path: {path} is not the file that this run began with")
    anew = _matching(model, reinitialize)
    blocks = {name: block for name, block in blocks.items() if name not in anew}
    constants = dict(model.named_buffers())
    own: dict[str, Tensor] = {
        name: p
        for name, p in model.named_parameters()
        if name not in anew and (p.requires_grad or name in blocks)
    }
    own |= {name: constants[name] for name in blocks.keys() & constants.keys()}
    _require_same(path, blocks, own)
    if not all(bool(block.isfinite().all()) for block in blocks.values()):
        raise InputError(f"seed_model.path: {path} holds a NaN or Inf")
    with torch.no_grad():
        for name, block in blocks.items():
            own[name].copy_(block)


def _matching(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"seed_model.reinitialize: no parameter matches {pattern!r}; the last ones are "
                f"{', '.join(names[-3:])}"
            )
    found = {name for name in names if any(fnmatchcase(name, each) for each in patterns)}
    if len(found) == len(names):
        raise InputError(
            "seed_model.reinitialize: every parameter matches, so that nothing of the seed model "
            "is used; leave seed_model out"
        )
    return found


def _require_same(path: Path, blocks: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    differing = [
        name
        for name in sorted(blocks.keys() | own.keys())
        if name not in blocks or name not in own or blocks[name].shape != own[name].shape
    ]
    if not differing:
        return
    first, shapes = differing[0], []
    for of, where in ((blocks, "there"), (own, "in the model")):
        shapes.append(f"{list(of[first].shape) if first in of else 'missing'} {where}")
    raise InputError(
        f"seed_model.path: {path} is of another shape than the config's model ({first} is "
        f"{' and '.join(shapes)}); write the model that it was made for, or name what may differ "
        f"in seed_model.reinitialize, such as ['{first}']"
    )
