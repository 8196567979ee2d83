"""Whether a model can be trained here at all, told before anything is spent on it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from fedpriv.errors import InputError

# A process holds the parameters, float32, and a sum of updates, float64: more, but never less.
_BYTES_A_PARAMETER, _BYTES_A_FROZEN_ONE = 12, 4
# Where the kernel says how much a container may have, version 2 and 1 of its interface.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def require_separate_users(model: nn.Module, name: str) -> None:
    """Refuse a model that would carry one user's data into the next user's contribution.

    Constants, such as a window function or a table of positions, pass. What else changes in
    training is noticed there: see `unchanged_buffers`.

    Raises:
        InputError: a layer keeps running statistics, or has no size yet, or nothing is trained.
    """
    lazy = [each for each, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise InputError(
            f"model.name: {name} leaves the size of {lazy[0]} to its first input, and each process "
            "would draw it anew; write the size, as in Linear for LazyLinear"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"model.name: {name} has no parameter that is trained")
    for layer, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            kind = type(module).__name__
            raise InputError(
                f"model.name: {name} has the layer {layer or 'itself'} ({kind}), whose "
                "running_mean would carry one user's data to the next; write GroupNorm or "
                "LayerNorm in its place, or model.convert: groupnorm"
            )


def count(model: nn.Module) -> int:
    """Return how many parameters a model has, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def require_memory(parameters: int, processes: int, device: torch.device, frozen: int = 0) -> None:
    """Refuse a model that cannot fit: no process can do with less than is counted here.

    `frozen` are those of its parameters beside the trained ones, which are only there.

    Raises:
        InputError: it takes more memory than the machine, or its GPU, has.
    """
    where, there = _memory(device)
    if device.type == "cuda":
        processes = 1
    needed = (_BYTES_A_PARAMETER * parameters + _BYTES_A_FROZEN_ONE * frozen) * processes
    if there is None or needed <= there:
        return
    raise InputError(
        f"model: its {parameters + frozen:,} parameters take at least {needed / 2**30:,.1f} GiB in "
        f"{processes} process{'es' if processes > 1 else ''}, and {where} has "
        f"{there / 2**30:,.1f} GiB; write a smaller model.dim or model.depth"
        + (", or fewer runtime.workers" if processes > 1 else "")
    )


def _memory(device: torch.device) -> tuple[str, int | None]:
    """Return the name of where the model will lie, and its bytes, if they are known."""
    if device.type == "cuda":
        return f"the GPU {device}", torch.cuda.mem_get_info(device)[1]
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (OSError, ValueError):
        sizes = []
    for limit in _LIMITS:
        try:
            sizes.append(int(limit.read_text(encoding="ascii")))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return "this machine", min(sizes, default=None)
