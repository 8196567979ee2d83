"""Group normalisation in the place of batch normalisation, which mixes users."""

from __future__ import annotations

import math

import torch
from torch import nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Wu and He (2018) found 32 groups best; no group is of a single channel where that can be.
_GROUPS = 32


def batch_to_group_norms(model: nn.Module) -> nn.Module:
    """Return `model` with a GroupNorm for each BatchNorm, with its weight and bias.

    Statistics that were gathered in pre-training are dropped: examples are normalised by their own.
    What timm puts into one layer with its normalisation, an activation, follows it.
    """
    if isinstance(model, _BATCH_NORMS):
        return _group_norm(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, _BATCH_NORMS):
            model.set_submodule(path, _group_norm(layer))
    return model


def _group_norm(norm: nn.Module) -> nn.Module:
    channels = int(norm.num_features)  # type: ignore[arg-type]
    groups = math.gcd(channels, _GROUPS)
    if groups == channels > 1:
        groups //= 2
    group_norm = nn.GroupNorm(groups, channels, float(norm.eps), bool(norm.affine))  # type: ignore[arg-type]
    if norm.affine:
        with torch.no_grad():
            group_norm.weight.copy_(norm.weight)  # type: ignore[arg-type]
            group_norm.bias.copy_(norm.bias)  # type: ignore[arg-type]
    after = [each for each in norm.children() if not isinstance(each, nn.Identity)]
    return nn.Sequential(group_norm, *after) if after else group_norm
