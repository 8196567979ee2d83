"""Where tensors live."""

from __future__ import annotations

import torch

from fedpriv.errors import InputError


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`: auto is the first GPU where there is one, else the CPU.

    Raises:
        InputError: a CUDA device that this process does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"runtime.device: {name} is not there ({torch.cuda.device_count()} CUDA devices seen); "
            "write auto or cpu"
        )
    return device
