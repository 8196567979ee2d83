"""LANTON (Hao et al. 2025, "Noise-adaptive layerwise learning rates: accelerating ...").

    B ← β₁B + (1-β₁)G;  O = LMO(B);  H ← β₂H + (1-β₂)‖G - G'‖*²
    α_l = α/√(α² + H_l);  Δ_l = √(α_l / the largest α of l's group) · O_l

G' is the average of the round before, as in the paper's practical option. Both are released, so
that nothing is paid for H; in the first round there is no G', and H stays 0. Groups, and what LMO
and ‖·‖* are in each:

    hidden matrices:       √(rows/columns) · UVᵀ of B = USVᵀ;  √(rows/columns) · sum of S
    embeddings, the head:  the sign of each number;            the sum of all |g|
    vectors of d numbers:  √d · b/‖b‖₂;                        √d · ‖g‖₂

UVᵀ is taken of singular values, of which those that are zero are left out, where the paper iterates
Newton-Schulz. Signs are 1 in size: Scion, whose norms these are, divides them by the number of
inputs. More than two dimensions are flattened behind the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

Decay = Annotated[float, Field(ge=0, lt=1)]


class _Group(NamedTuple):
    """Layers whose steps are bounded in one norm: where it leads, and its dual norm."""

    direction: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]


class Lanton:
    """Steps of one size in the norm of each layer's kind, smaller where averages are noisier."""

    cite = "LANTON (Hao et al. 2025)"

    def __init__(
        self,
        alpha: Annotated[float, Field(ge=1e-12, le=1e12)] = 1.0,
        beta1: Decay = 0.95,
        beta2: Decay = 0.9,
        tables: Sequence[str] = ("positions.*",),
    ) -> None:
        """Keep nothing yet.

        Where all H are far below α² rates are equal. `tables` are patterns of the names of
        embeddings, `embed.*` of `gpt`; the head is the last matrix.
        """
        self.alpha, self.beta1, self.beta2 = alpha, beta1, beta2
        self.tables = list(tables)
        self.kept: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.noise: dict[str, float] = {}  # √H of each block

    def __call__(self, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return Δ of each block; a block of zeros, or of no numbers, stays as it is."""
        whole, update = update, {name: each for name, each in update.items() if each.numel()}
        groups = self._groups(update)
        alphas = {name: self._alpha(name, block, groups[name]) for name, block in update.items()}
        found = {}
        for name, block in update.items():
            most = max(each for other, each in alphas.items() if groups[other] is groups[name])
            direction = groups[name].direction(self._averaged(name, block))
            rate = math.sqrt(alphas[name] / most)
            found[name] = (rate * direction).reshape(block.shape).to(block.dtype)
        return {name: found.get(name, block) for name, block in whole.items()}

    def _groups(self, update: dict[str, Tensor]) -> dict[str, _Group]:
        matrices = [name for name, block in update.items() if block.dim() > 1]
        found = dict.fromkeys(update, _VECTORS)
        for name in matrices:
            table = update[name].dim() == 2 and any(fnmatchcase(name, p) for p in self.tables)
            found[name] = _TABLES if table or name == matrices[-1] else _HIDDEN
        return found

    def _alpha(self, name: str, block: Tensor, group: _Group) -> float:
        """Return α_l, with H_l as it is now."""
        if name in self.before:
            change = float(group.dual(_matrix(block) - _matrix(self.before[name])))
            known = math.sqrt(self.beta2) * self.noise.get(name, 0.0)
            self.noise[name] = math.hypot(known, math.sqrt(1 - self.beta2) * change)
        self.before[name] = block.clone()
        return self.alpha / math.hypot(self.alpha, self.noise.get(name, 0.0))

    def _averaged(self, name: str, block: Tensor) -> Tensor:
        gradient = _matrix(block)
        before = self.kept.get(name, torch.zeros_like(gradient))
        self.kept[name] = self.beta1 * before + (1 - self.beta1) * gradient
        return self.kept[name]


def _matrix(block: Tensor) -> Tensor:
    return (block.flatten(1) if block.dim() > 1 else block).double()


def _orthogonal(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = (values > values.max() * 1e-7).to(matrix)
    return _scale(matrix) * (left * kept) @ right


def _nuclear(matrix: Tensor) -> Tensor:
    return _scale(matrix) * torch.linalg.matrix_norm(matrix, "nuc")


def _scale(matrix: Tensor) -> float:
    return math.sqrt(matrix.shape[0] / matrix.shape[1])


def _of_size_one(vector: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vector)
    return vector * (math.sqrt(vector.numel()) / torch.where(norm == 0, 1.0, norm))


def _root_sum(vector: Tensor) -> Tensor:
    return math.sqrt(vector.numel()) * torch.linalg.vector_norm(vector)


def _sum(table: Tensor) -> Tensor:
    return table.abs().sum()


_HIDDEN = _Group(_orthogonal, _nuclear)
_TABLES = _Group(torch.sign, _sum)
_VECTORS = _Group(_of_size_one, _root_sum)
