"""Which library multiplies float32 matrices on a CPU: PyTorch's choice, or oneDNN if it is exact.

PyTorch leaves float32 products to MKL and hands them to oneDNN only where bfloat16 would do. On
CPUs without bfloat16 units oneDNN then multiplies in float32 all the same, on some of them at twice
MKL's speed; on others it is slower, or the switch loses digits. So it is asked for by hand, is
tried on products of the model's own shapes, and is kept only where they are as exact as float32
arithmetic promises.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

_UNIT = 2.0**-24
# Rows of a product: those of one example's few tokens, and of many users' together.
_ROWS = (8, 400)
# Inner sizes of attention: a head's numbers, and the tokens that it mixes.
_HEADS = ((80, 16, 80), (80, 80, 16))


def route_products(model: nn.Module) -> bool:
    """Let oneDNN multiply float32 matrices on the CPU where that is exact, and say whether it does.

    Exact means that every number of a product A·B of inner size K is within K·2^-24·(|A|·|B|) of
    the true one, the bound that holds for float32 in any order of summation (Higham 2002, eq.
    3.13). It is tried on the products of each linear map of `model`, forward and backward, and of
    attention. The choice holds for this process, on all its CPU tensors, until the next call.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    settings = _settings()
    settings.fp32_precision = "bf16"
    generator = torch.Generator().manual_seed(0)
    exact = all(
        _is_exact(
            torch.randn(2, rows, inner, generator=generator),
            torch.randn(2, inner, columns, generator=generator),
        )
        for rows, inner, columns in _shapes(model)
    )
    if not exact:
        settings.fp32_precision = "none"
    return exact


def _shapes(model: nn.Module) -> set[tuple[int, int, int]]:
    """Return rows, inner size and columns of a model's products."""
    maps = {
        (layer.in_features, layer.out_features)
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    }
    found = set(_HEADS)
    for inputs, outputs in maps:
        for rows in _ROWS:  # the outputs, and the gradients of inputs and weight
            found |= {(rows, inputs, outputs), (rows, outputs, inputs), (outputs, rows, inputs)}
    return found


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
