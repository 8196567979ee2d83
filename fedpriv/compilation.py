"""Loops that are compiled for the machine at hand.

For what PyTorch's own operations do in several passes through memory, or with a float64 copy: numba
compiles the loop when it is first called and keeps the result on the disk. It is for contiguous
float32 tensors on a CPU; whoever calls such a loop does the same with PyTorch on all others.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpriv.caches import cache_folder

# Sums may be taken in any order and products be added without rounding between, which is what lets
# a loop run in vectors. NaN and Inf stay what they are: clipping tells by them what to leave out.
_FASTMATH = {"reassoc", "contract"}


def compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """Return `loop`, a function of numpy arrays, compiled when it is first called.

    It should be called with arrays of one type and layout only, and call only loops of its file.
    """
    # Imported here: it takes a quarter of a second, which commands that train nobody need not wait.
    import numba

    options: dict[str, Any] = {"fastmath": _FASTMATH, "error_model": "numpy", "nogil": True}
    folder = _folder(loop)
    if folder is None:
        return numba.njit(loop, **options)
    settings: Any = numba.config  # it makes its attributes when it is imported
    before, settings.CACHE_DIR = settings.CACHE_DIR, str(folder)
    try:
        return numba.njit(loop, cache=True, **options)
    finally:
        settings.CACHE_DIR = before


def _folder(loop: Callable[..., None]) -> Path | None:
    """Return where the machine code of `loop` is kept; None where nothing can be written.

    numba tells old code from new by the file's time alone, and processes that write at once can
    mix up what they wrote. So whatever the code depends on has a folder of its own, and all who
    write there write the same.
    """
    import llvmlite.binding
    import numba

    machine = [llvmlite.binding.get_host_cpu_name(), str(llvmlite.binding.get_host_cpu_features())]
    versions = [numba.__version__, llvmlite.__version__, platform.python_version()]
    try:
        sources = [Path(f).read_text(encoding="utf-8") for f in (__file__, inspect.getfile(loop))]
        digest = hashlib.sha256("\0".join(machine + versions + sources).encode()).hexdigest()
        folder = cache_folder() / "loops" / digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None


def is_compiled_for(*tensors: Tensor) -> bool:
    """Say whether compiled loops may be given these tensors."""
    for tensor in tensors:
        plain = tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()
        if not plain or tensor.is_neg():
            return False
    return True
