"""Whether a model can be trained here at all, told before anything is spent on it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from fedpriv.errors import InputError

# A process holds the parameters, float32, and a sum of updates, float64: more, but never less.
_BYTES_A_PARAMETER = 12
# Where the kernel says how much a container may have, version 2 and 1 of its interface.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def require_separate_users(model: nn.Module, name: str) -> None:
    """Refuse a model that would carry one user's data into the next user's contribution.

    A constant, such as a window function, is no part of a model's state: it is not persistent.

    Raises:
        InputError: it keeps something beside its parameters, or layers share a parameter.
    """
    owners: dict[int, str] = {}
    parameters = set()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        parameters.add(path)
        first = owners.setdefault(id(parameter), path)
        if first != path:
            raise InputError(
                f"model.name: {name} ties {first} and {path}, one tensor in two layers, which "
                "users who are trained together cannot share; give each layer its own"
            )
    kept = [path for path in model.state_dict() if path not in parameters]
    if not kept:
        return
    layer = kept[0].rpartition(".")[0]
    kind = type(model.get_submodule(layer)).__name__
    cure = (
        "write GroupNorm or LayerNorm in its place"
        if kind.endswith(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNorm"))
        else "keep nothing, or a constant with persistent=False"
    )
    raise InputError(
        f"model.name: {name} has the layer {layer or 'itself'} ({kind}), whose "
        f"{kept[0].rpartition('.')[2]} would carry one user's data to the next; {cure}"
    )


def require_memory(parameters: int, processes: int, device: torch.device) -> None:
    """Refuse a model that cannot fit: no process can do with less than is counted here.

    Raises:
        InputError: it takes more memory than the machine, or its GPU, has.
    """
    where, there = _memory(device)
    if device.type == "cuda":
        processes = 1
    needed = _BYTES_A_PARAMETER * parameters * processes
    if there is None or needed <= there:
        return
    raise InputError(
        f"model: its {parameters:,} parameters take at least {needed / 2**30:,.1f} GiB in "
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
