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


def set_tf32(wanted: bool, device: torch.device) -> None:
    """Let this process multiply float32 matrices in TF32 on its GPU, or not; convolutions likewise.

    PyTorch takes convolutions in TF32 where nobody says otherwise.

    Raises:
        InputError: it is wanted of another device.
    """
    if wanted and device.type != "cuda":
        raise InputError(
            f"local.precision: tf32 is for CUDA devices, and this is {device}; write float32 or "
            "bfloat16"
        )
    if device.type == "cuda":
        # Not by `fp32_precision`: where that of convolutions is set, exporters fail to read these.
        torch.backends.cuda.matmul.allow_tf32 = wanted
        torch.backends.cudnn.allow_tf32 = wanted
