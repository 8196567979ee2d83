"""Clipping: what one user may add to the sum.

A user's update is a dict of blocks, one a parameter tensor. A clipping rule sees the norms of
the blocks alone and answers with one scale a block; `clip` does the arithmetic for every rule,
so that the bound is proved, and tested, in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from fedpriv.privacy.model_deltas import ModelDeltas
from fedpriv.privacy.outer_products import OuterProducts
from fedpriv.privacy.row_sums import add_rows, row_norms

# The rule is shown norms that are a millionth too large, so that neither the rounding of the
# scale, nor that of the scaled float32 numbers (2^-24 each), nor that of the norm itself in
# float64 can lift a contribution above the bound.
_MARGIN = 2.0**-20
# `normalize` scales small blocks up. Beyond this factor a float32 scale could overflow.
_LARGEST_SCALE = 2.0**100
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


class ClippingRule(Protocol):
    """A rule that bounds a user's contribution by the L2 norm `bound` (C)."""

    @property
    def bound(self) -> float:
        """The clip bound C: the largest L2 norm of a contribution."""
        ...

    def scales(self, norms: Tensor) -> Tensor:
        """Return the factor for each block: float64 `[..., H]` from block norms `[..., H]`.

        For all finite norms the scaled norms satisfy sqrt(sum((scale * norm)^2)) <= bound.
        """
        ...


@dataclass(frozen=True)
class GlobalClipping:
    """g · min(1, C/‖g‖): one factor for the whole update (Abadi et al. 2016)."""

    bound: float

    def scales(self, norms: Tensor) -> Tensor:
        """Return min(1, C/‖g‖) for every block."""
        total = torch.linalg.vector_norm(norms, dim=-1, keepdim=True)
        return _shrink(total, torch.as_tensor(self.bound, dtype=norms.dtype)).expand_as(norms)


@dataclass(frozen=True)
class PerLayerClipping:
    """g_h · min(1, C_h/‖g_h‖) for each block, with sum(C_h^2) = C^2 (McMahan et al. 2018).

    With `normalize`, as the released code of pfl4asr (Pelikan et al. 2025) does: an update with
    ‖g‖ > C has every block set to norm C_h exactly, small ones scaled up; any other is left alone.
    """

    bound: float
    block_bounds: tuple[float, ...]
    normalize: bool = False

    def scales(self, norms: Tensor) -> Tensor:
        """Return the factor of each block."""
        bounds = _on(norms.device, self.block_bounds, norms.dtype)
        if not self.normalize:
            return _shrink(norms, bounds)
        to_bound = torch.where(norms == 0, torch.ones_like(norms), bounds / norms)
        total = torch.linalg.vector_norm(norms, dim=-1, keepdim=True)
        return torch.where(total <= self.bound, torch.ones_like(norms), to_bound)


@dataclass(frozen=True)
class PayloadClipping:
    """A rule of its own for each of several payloads of equally many blocks.

    Attributes:
        payloads: what they are called.
        rules: the rule that bounds each.
    """

    payloads: tuple[str, ...]
    rules: tuple[ClippingRule, ...]

    @property
    def bound(self) -> float:
        """The largest L2 norm of all payloads together."""
        return math.hypot(*(rule.bound for rule in self.rules))

    def scales(self, norms: Tensor) -> Tensor:
        """Return the factor of each block of each payload: `[..., payloads·H]`."""
        parts = norms.chunk(len(self.rules), dim=-1)
        scales = [rule.scales(part) for rule, part in zip(self.rules, parts, strict=True)]
        return torch.cat(scales, dim=-1)


@dataclass(frozen=True)
class UndoneClipping:
    """A rule that is shown, and bounds, an update whose block h was divided by m_h.

    What a user adds to the sum is clip(g_h / m_h), and so within the rule's bound; after the
    release, whose noise is that of the divided updates, the server multiplies block h by m_h. The
    m_h are public: multipliers of local learning rates, of which block sizes then say nothing.

    Attributes:
        rule: the rule.
        multipliers: m_h, one a block.
    """

    rule: ClippingRule
    multipliers: tuple[float, ...]

    @property
    def bound(self) -> float:
        """The rule's."""
        return self.rule.bound

    def scales(self, norms: Tensor) -> Tensor:
        """Return the factor of each block of the update as it is, 1/m_h where nothing is cut."""
        multipliers = _on(norms.device, self.multipliers, norms.dtype)
        return self.rule.scales(norms / multipliers) / multipliers


def undone(rule: ClippingRule) -> tuple[float, ...]:
    """Return what the blocks of a payload are divided by before `rule` bounds them; empty: not."""
    if isinstance(rule, PayloadClipping):
        return undone(rule.rules[0])
    return rule.multipliers if isinstance(rule, UndoneClipping) else ()


@dataclass(frozen=True)
class Unclipped:
    """No bound at all: for training without privacy. Its sensitivity is infinite."""

    bound: float = math.inf

    def scales(self, norms: Tensor) -> Tensor:
        """Return one for every block."""
        return torch.ones_like(norms)


@lru_cache(maxsize=8)
def _on(device: torch.device, numbers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Return numbers as a tensor that is only read; a GPU is waited for but once."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def _shrink(norms: Tensor, bounds: Tensor) -> Tensor:
    """Return min(1, bound/norm), one for a zero norm, and NaN for a norm that is no number."""
    return torch.where(norms <= bounds, torch.ones_like(norms), bounds / norms)


def uniform_split(bound: float, sizes: Sequence[int]) -> tuple[float, ...]:
    """Return C_h = C/√H for each of H blocks."""
    return tuple(bound / math.sqrt(len(sizes)) for _ in sizes)


def dim_split(bound: float, sizes: Sequence[int]) -> tuple[float, ...]:
    """Return C_h = C·√(d_h/Σd), where d_h is the number of parameters of block h."""
    total = sum(sizes)
    return tuple(bound * math.sqrt(size / total) for size in sizes)


#: How the bound is shared among blocks; a new split is one function and one line here.
SPLITS: dict[str, Callable[[float, Sequence[int]], tuple[float, ...]]] = {
    "uniform": uniform_split,
    "dim": dim_split,
}


def bounds_of(rule: ClippingRule) -> tuple[float, ...]:
    """Return the bounds that `with_bounds` exchanges: one for a global rule, else one a block."""
    return rule.block_bounds if isinstance(rule, PerLayerClipping) else (rule.bound,)


def with_bounds(rule: ClippingRule, bounds: Sequence[float]) -> ClippingRule:
    """Return `rule` with other bounds: one for a global rule, else one a block.

    Raises:
        TypeError: the rule has no bounds to exchange.
    """
    if isinstance(rule, PerLayerClipping):
        return PerLayerClipping(math.hypot(*bounds), tuple(bounds), rule.normalize)
    if isinstance(rule, GlobalClipping):
        return GlobalClipping(*bounds)
    raise TypeError(f"{type(rule).__name__} has no bounds")


@dataclass(frozen=True)
class AdaptiveBounds:
    """Bounds that follow a quantile of the norms (Andrew et al. 2021, algorithm 1).

    After each release C ← C·exp(-η·(b̃ - γ)), where b̃ is the noisy fraction of contributions whose
    norm was within C. Only the noisy fraction is used, so the bounds are post-processing.

    Attributes:
        quantile: γ, the fraction that should be within the bound.
        lr: η, the rate of the geometric update.
    """

    quantile: float
    lr: float

    def next(self, bounds: Sequence[float], fractions: Sequence[float]) -> tuple[float, ...]:
        """Return the bounds of the next release from the noisy `fractions` within each."""
        return moved(bounds, [-self.lr * (within - self.quantile) for within in fractions])


def moved(bounds: Sequence[float], exponents: Sequence[float]) -> tuple[float, ...]:
    """Return each bound times e^exponent, within 1e-20 and 1e20.

    Noise can put a fraction, and so an exponent, anywhere: none counts for more than ±10.
    """
    factors = [math.exp(min(max(exponent, -10.0), 10.0)) for exponent in exponents]
    return tuple(
        min(max(bound * factor, 1e-20), 1e20) for bound, factor in zip(bounds, factors, strict=True)
    )


@dataclass(frozen=True)
class ClippedUpdate:
    """A user's bounded contribution, with what clipping saw of it (private: simulation only).

    Attributes:
        blocks: float32 blocks whose joint L2 norm is at most the rule's bound.
        norms: float64 `[H]`, the norms of the blocks before clipping.
        scales: float64 `[H]`, the factors that were applied.
        finite: False where the update held a NaN or Inf; its blocks are then zero.
    """

    blocks: dict[str, Tensor]
    norms: Tensor
    scales: Tensor
    finite: bool


def clip(update: Mapping[str, Tensor], rule: ClippingRule) -> ClippedUpdate:
    """Bound an update by `rule`, in exact terms.

    The blocks that come back are float32 and their joint norm, computed exactly, is at most
    `rule.bound` for every input: float32, bfloat16 or float64, of any size. An update with a NaN
    or Inf, or whose norm overflows float64, contributes zero.

        >>> import torch
        >>> clipped = clip({"weight": torch.tensor([3.0, 4.0])}, GlobalClipping(bound=1.0))
        >>> clipped.blocks["weight"]
        tensor([0.6000, 0.8000])
    """
    norms = torch.stack(
        [torch.linalg.vector_norm(block, dtype=torch.float64) for block in update.values()]
    )
    if not bool(torch.isfinite(torch.linalg.vector_norm(norms))):
        zeros = {name: torch.zeros_like(b, dtype=torch.float32) for name, b in update.items()}
        return ClippedUpdate(zeros, norms, torch.zeros_like(norms), finite=False)
    scales = _safe_scales(norms, rule)
    blocks = {
        name: _scaled(block, scale)
        for (name, block), scale in zip(update.items(), scales.tolist(), strict=True)
    }
    return ClippedUpdate(blocks, norms, scales, finite=True)


@dataclass(frozen=True)
class ClippedUsers:
    """What clipping saw of many users (private: simulation only).

    Attributes:
        norms: float64 `[U, H]`, the norms of the blocks before clipping.
        scales: float64 `[U, H]`, the factors that were applied; 0 for an update that is not finite.
        finite: boolean `[U]`, False where the update held a NaN or Inf and so contributed zero.
    """

    norms: Tensor
    scales: Tensor
    finite: Tensor

    def within(self, bounds: int) -> Tensor:
        """Return Σ(b - 1/2) over the finite users, b = 1 within the bound: float64 `[bounds]`.

        With one bound it is that of whole updates, otherwise that of each block.
        """
        kept = self.scales[self.finite] >= 1
        inside = kept if bounds > 1 else kept.all(dim=1, keepdim=True)
        return (inside.double() - 0.5).sum(dim=0)


@dataclass(frozen=True)
class ClippedSum(ClippedUsers):
    """The sum of many users' bounded contributions, with what clipping saw of each.

    Attributes:
        total: float64 `[P]`, the sum over users.
    """

    total: Tensor


def clip_and_sum(updates: Tensor, sizes: Sequence[int], rule: ClippingRule) -> ClippedSum:
    """Return the sum of the rows of `updates` `[U, P]`, each bounded as by `clip_and_add`.

    A row is a user's update with its blocks, of `sizes`, laid end to end.
    """
    total = torch.zeros(updates.shape[1], dtype=torch.float64, device=updates.device)
    seen = clip_and_add(updates.split(list(sizes), dim=1), rule, total)
    return ClippedSum(seen.norms, seen.scales, seen.finite, total)


def clip_and_add(
    updates: Sequence[Tensor | OuterProducts] | ModelDeltas, rule: ClippingRule, total: Tensor
) -> ClippedUsers:
    """Bound each user's update by `rule`, in exact terms, and add all to `total`, in place.

    `updates` are blocks `[U, d_h]`, row u of each being a block of user u's update, which is
    bounded as `clip` bounds it. `total` is float64 `[Σd_h]`, and so are the scaled numbers, so that
    no rounding to float32 intervenes. Of `OuterProducts` the norms are upper bounds, which are
    tight unless nearly all of an update cancels within itself.

    Raises:
        ValueError: `total` is of another dtype or length.
    """
    sizes = _sizes(updates)
    if total.dtype != torch.float64 or total.shape != (sum(sizes),):
        raise ValueError(
            f"users of {sum(sizes)} numbers cannot be added to a total of {total.dtype} and "
            f"shape {tuple(total.shape)}"
        )
    norms = block_norms(updates)
    finite = torch.isfinite(torch.linalg.vector_norm(norms, dim=1))
    safe = norms
    if _any_left_out(finite):
        safe = torch.where(finite[:, None], norms, torch.zeros_like(norms))
    scales = _safe_scales(safe, rule) * finite[:, None]
    add_weighted(updates, scales, finite, total)
    return ClippedUsers(norms, scales, finite)


def add_weighted(
    updates: Sequence[Tensor | OuterProducts] | ModelDeltas,
    weights: Tensor,
    finite: Tensor,
    total: Tensor,
) -> None:
    """Add each block of the `finite` users (boolean `[U]`), times its weight, to `total`.

    `weights` `[U, H]` and `total` `[P]` are float64.
    """
    if isinstance(updates, ModelDeltas):
        updates.add_weighted(weights, finite, total)
        return
    sums = total.split(_sizes(updates))
    for block, weight, sum_ in zip(updates, weights.unbind(dim=1), sums, strict=True):
        if isinstance(block, OuterProducts):
            block.add_weighted(weight, sum_)
        else:
            add_rows(block, weight, finite, sum_)


def _sizes(updates: Sequence[Tensor | OuterProducts] | ModelDeltas) -> list[int]:
    if isinstance(updates, ModelDeltas):
        return list(updates.sizes)
    return [one.size if isinstance(one, OuterProducts) else one.shape[1] for one in updates]


def block_norms(updates: Sequence[Tensor | OuterProducts] | ModelDeltas) -> Tensor:
    """Return what each block's norm is not above, but for rounding in float64: `[U, H]`."""
    if isinstance(updates, ModelDeltas):
        return updates.norms()
    norms = [
        block.norm_bounds() if isinstance(block, OuterProducts) else row_norms(block)
        for block in updates
    ]
    return torch.stack(norms, dim=1)


def _any_left_out(finite: Tensor) -> bool:
    """Say whether users must be left out; of a GPU, whose answer would be waited for, yes."""
    return not finite.is_cpu or not bool(finite.all())


def _safe_scales(norms: Tensor, rule: ClippingRule) -> Tensor:
    """Return the rule's factors `[..., H]`, such that rounding lifts nothing above its bound.

    They are zeros where the rule would let more than its bound pass, or where that is not known: a
    norm that was divided may be no number.
    """
    scales = rule.scales(norms * (1 + _MARGIN)).clamp(max=_LARGEST_SCALE)
    within = torch.linalg.vector_norm(scales * norms, dim=-1, keepdim=True) <= rule.bound
    return torch.where(within, scales, torch.zeros_like(scales))


def _scaled(block: Tensor, scale: float) -> Tensor:
    # float64 numbers may lie outside float32's range until they are scaled, and a scale below
    # float32's normal numbers would lose the precision that the bound rests on.
    if block.dtype == torch.float64 or scale < _SMALLEST_NORMAL:
        return (block.double() * scale).float()
    return block.float() * scale
