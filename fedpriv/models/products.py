"""Which library multiplies float32 matrices on a CPU: the faster one, where it is exact.

PyTorch leaves float32 products to MKL and hands them to oneDNN only where bfloat16 would do. On
CPUs without bfloat16 units oneDNN then multiplies in float32 all the same, on some of them at twice
MKL's speed; on others the same switch loses digits. So it is tried, and kept only where products
are as exact as float32 arithmetic promises.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

_UNIT = 2.0**-24
# Rows, inner and outer size: a projection, its gradients, and an attention head's scores.
_SHAPES = ((400, 64, 256), (64, 400, 256), (80, 16, 80))


@cache
def route_products() -> bool:
    """Let oneDNN multiply float32 matrices on the CPU where that is exact, and say whether it does.

    Exact means that every number of a product A·B of inner size K is within K·2^-24·(|A|·|B|) of
    the true one, the bound that holds for float32 in any order of summation (Higham 2002, eq.
    3.13). The choice holds for this process, on all its CPU tensors, and is made once.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    settings = _settings()
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    generator = torch.Generator().manual_seed(0)
    exact = all(
        _is_exact(
            torch.randn(4, rows, inner, generator=generator),
            torch.randn(4, inner, columns, generator=generator),
        )
        for rows, inner, columns in _SHAPES
    )
    if not exact:
        settings.fp32_precision = before
    return exact


def products_are_routed() -> bool:
    """Say whether `route_products` has been asked for in this process, and was granted."""
    return bool(_settings().fp32_precision == "bf16")


def _settings() -> Any:
    # PyTorch makes this attribute when it is imported, so type checkers do not know it.
    return cast(Any, torch.backends.mkldnn).matmul


def _is_exact(left: Tensor, right: Tensor) -> bool:
    """Say whether float32 products of `[..., n, K]` and `[..., K, m]` keep float32's bound."""
    bound = left.shape[-1] * _UNIT * (left.double().abs() @ right.double().abs())
    true = left.double() @ right.double()
    batched = (left @ right - true).abs() <= bound
    single = (left[0] @ right[0] - true[0]).abs() <= bound[0]
    return bool(batched.all() and single.all())
