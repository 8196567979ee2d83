"""What draws from a global generator draws from a seed of ours, and leaves no trace there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_CPU = torch.device("cpu")


@contextmanager
def drawing_from(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Let the body draw from global generators that start at `seed`; they then are as before.

    They are torch's, NumPy's and Python's: models from outside draw their masks from any of them.
    Where there is no GPU none is asked for: `torch.manual_seed` alone takes a millisecond.
    """
    on_gpu = device.type == "cuda"
    of_numpy, of_python = np.random.get_state(), random.getstate()
    words = seed % 2**64
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        if on_gpu:
            torch.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        np.random.seed([words % 2**32, words >> 32])
        random.seed(words)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)
