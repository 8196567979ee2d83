"""In how many threads Torch computes: a sum's last bits depend on it, so places that must agree
say it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads_of_torch(number: int | None) -> Iterator[None]:
    """Let the body compute in so many threads, None for those there are; they then are as before.

    The body may change their number itself.
    """
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
