"""How many numbers the server keeps for each parameter: counted in its state after two steps."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fedpriv.optimizers.normalize import NORMALIZERS, NormalizerOptions
from fedpriv.optimizers.schedules import ScheduleConfig
from fedpriv.optimizers.server import Server

#: Of the one matrix that is counted: what is kept of rows, columns or a rank is a part of it.
SIDE = 64


@lru_cache(maxsize=256)
def numbers_kept(
    optimizer: str = "sgd", normalize: str | None = None, shared: int = 0, signs: bool = False
) -> float:
    """Return how many numbers a server keeps for each parameter of a square matrix, beside it.

    Args:
        optimizer: its name.
        normalize: the name of a normaliser.
        shared: how many vectors an algorithm's server keeps.
        signs: whether signs alone are trained.
    """
    options: Any = None if normalize is None else NORMALIZERS.parse(normalize)
    assert options is None or isinstance(options, NormalizerOptions)
    model = nn.Linear(SIDE, SIDE, bias=False)
    server = Server(model, optimizer, 1e-3, {}, ScheduleConfig(), options, 2, shared, signs=signs)
    generator = torch.Generator().manual_seed(0)
    for round_ in (1, 2):
        update = torch.randn(SIDE * SIDE, generator=generator)
        server.step(update, round_, seed=round_, noise=[0.1])
    return server.kept() / (SIDE * SIDE)
