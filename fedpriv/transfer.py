"""Tensors on their way between the host and a GPU, for which nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def moved_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Return `tensor` on `device`.

    To a GPU it goes from page-locked memory, so that nobody waits: what the GPU is asked to do with
    it comes after it. From other memory the copy would wait for all that the GPU has still to do.
    PyTorch keeps the page-locked memory until the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetched(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to copy tensors to the host, and return what waits for the copies and returns them."""
    device = tensors[0].device
    copies = [one.to("cpu", non_blocking=True) for one in tensors]
    if device.type != "cuda":
        return lambda: copies
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))

    def arrived() -> list[Tensor]:
        done.synchronize()
        return copies

    return arrived
