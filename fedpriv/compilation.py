"""Loops that are compiled for the machine at hand.

For what PyTorch's own operations do in several passes through memory, or with a float64 copy: numba
compiles the loop when it is first called and keeps the result on the disk. It is for contiguous
float32 tensors on a CPU; whoever calls such a loop does the same with PyTorch on all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import torch
from torch import Tensor

# Sums may be taken in any order and products be added without rounding between, which is what lets
# a loop run in vectors. NaN and Inf stay what they are: clipping tells by them what to leave out.
_FASTMATH = {"reassoc", "contract"}


def compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """Return `loop`, a function of numpy arrays, compiled when it is first called."""
    options: dict[str, Any] = {"fastmath": _FASTMATH, "error_model": "numpy", "nogil": True}
    try:
        return numba.njit(loop, cache=True, **options)
    except RuntimeError:  # nowhere to keep it: neither beside the module nor in the user's cache
        return numba.njit(loop, **options)


def is_compiled_for(*tensors: Tensor) -> bool:
    """Say whether compiled loops may be given these tensors."""
    for tensor in tensors:
        if not (tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()):
            return False
    return True
