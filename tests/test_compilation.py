"""Compiled loops where their machine code cannot be kept."""

import numba
import numpy as np
import torch

from fedpriv.compilation import compiled, is_compiled_for


def doubled(numbers, out):
    for i in range(len(numbers)):
        out[i] = 2 * numbers[i]


def test_a_loop_is_compiled_though_nothing_can_be_kept(monkeypatch):
    kept = numba.njit

    def njit(loop, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return kept(loop, **options)

    monkeypatch.setattr(numba, "njit", njit)
    out = np.empty(3)
    compiled(doubled)(np.arange(3.0), out)
    assert out.tolist() == [0, 2, 4]


def test_only_contiguous_float32_on_a_processor_is_for_loops():
    x = torch.zeros(4, 6)
    assert is_compiled_for(x, x[1:])
    for other in (x.double(), x.bfloat16(), x.T, x[:, 1:], x.to("meta")):
        assert not is_compiled_for(x, other)
