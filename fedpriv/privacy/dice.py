"""DiceSGD's step: clipped gradients, and a clipped memory of what clipping cut off.

Zhang, Bu, Wu, Hong: Differentially Private SGD Without Clipping Bias: An Error-Feedback Approach,
ICLR 2024, algorithm 2. What a step costs is in `fedpriv.privacy.dice_accounting`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpriv.privacy.clipping import ClippingRule, PerLayerClipping, Unclipped, clip_and_sum
from fedpriv.privacy.sampling import PoissonSampling

# `clip` stays below its bound by up to 2^-20 of it, so a residual g - clip(g, C1) can exceed
# G - C1 by as much.
_MARGIN = 2.0**-19

_WHOLE = Unclipped()


@dataclass(frozen=True)
class DiceMechanism:
    """What is public about a DiceSGD step, with B the expected batch size of `sampling`:

        v_t = (1/B) Σ clip(g_i, C1) + clip(e_t, C2)
        release = v_t + N(0, (z·C1/B)² I)
        e_{t+1} = e_t + (1/B) Σ clip(g_i, G) - v_t

    Without `gradients` G is infinite: the memory sees whole gradients, as in the paper.

    Attributes:
        sampling: how batches are drawn: N examples, each with probability q = B/N.
        noise_multiplier: z = σB/C1: the noise on the *sum* of clipped gradients over C1, as
            Opacus counts it. The noise on v_t has standard deviation σ = z·C1/B.
        examples: the rule that bounds each gradient by C1.
        memory: the rule that bounds the memory by C2, in the units of the mean v_t.
        gradients: the rule that bounds by G what a gradient adds to the memory.

    Raises:
        ValueError: a batch that is not drawn by Poisson sampling, a negative or infinite number
            where none may be, or a G without a proof: below C1, not in proportion to C1's bounds,
            above 1e100, or beside a rule that scales small blocks up.
    """

    sampling: PoissonSampling
    noise_multiplier: float
    examples: ClippingRule
    memory: ClippingRule
    gradients: ClippingRule = _WHOLE

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, PoissonSampling):
            raise ValueError(
                "DiceSGD needs Poisson sampling: where other examples' chances depend on one, the "
                "memory has no proof"
            )
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier is a number ≥ 0, got {self.noise_multiplier}")
        if not (0 < self.examples.bound < math.inf and 0 <= self.memory.bound < math.inf):
            raise ValueError("C1 is a number above 0, and C2 one of at least 0")
        if self.gradients.bound < math.inf:
            self._check_gradients()

    def _check_gradients(self) -> None:
        ratio = self.gradients.bound / self.examples.bound
        bounds, larger = (_bounds(rule) for rule in (self.examples, self.gradients))
        alike = len(bounds) == len(larger) and all(
            math.isclose(ratio * small, large, rel_tol=1e-9)
            for small, large in zip(bounds, larger, strict=True)
        )
        rules = (self.examples, self.memory, self.gradients)
        stretched = any(getattr(rule, "normalize", False) for rule in rules)
        # Beyond 1e100 the memory could overflow and start again, which G's proof does not allow.
        if ratio < 1 or not alike or stretched or self.gradients.bound > 1e100:
            raise ValueError(
                "a bound G on what the memory sees is proved for rules that only shrink, with "
                "every bound the same multiple, at least 1, of C1's, and G at most 1e100"
            )

    @property
    def batch(self) -> float:
        """B, the expected batch size: the public denominator."""
        return self.sampling.expected_cohort

    @property
    def stddev(self) -> float:
        """σ = z·C1/B, the standard deviation of the noise on each coordinate of v_t."""
        return self.noise_multiplier * self.examples.bound / self.batch

    @property
    def residual_bound(self) -> float:
        """The largest L2 norm of what one example adds to the memory in a step: (G - C1)/B."""
        return (self.gradients.bound - self.examples.bound * (1 - _MARGIN)) / self.batch


def _bounds(rule: ClippingRule) -> tuple[float, ...]:
    return rule.block_bounds if isinstance(rule, PerLayerClipping) else (rule.bound,)


@dataclass(frozen=True)
class BatchSums:
    """The sums over a batch, block after block; physical batches of one step add up.

    Attributes:
        clipped: Σ clip(g_i, C1): float64 `[P]`.
        gradients: Σ clip(g_i, G), what the memory sees: float64 `[P]`.
        non_finite: how many gradients held a NaN or Inf, and so are in neither sum. Private.
    """

    clipped: Tensor
    gradients: Tensor
    non_finite: int

    def __add__(self, other: BatchSums) -> BatchSums:
        return BatchSums(
            self.clipped + other.clipped,
            self.gradients + other.gradients,
            self.non_finite + other.non_finite,
        )


def sum_batch(gradients: Tensor, sizes: Sequence[int], mechanism: DiceMechanism) -> BatchSums:
    """Add up a batch of per-example gradients `[n, P]`, n ≥ 0, with blocks of `sizes`."""
    clipped = clip_and_sum(gradients, sizes, mechanism.examples)
    seen = clip_and_sum(gradients, sizes, mechanism.gradients)
    return BatchSums(clipped.total, seen.total, int((~clipped.finite).sum()))


def dice_step(
    memory: Tensor, sums: BatchSums, sizes: Sequence[int], mechanism: DiceMechanism
) -> tuple[Tensor, Tensor]:
    """Return v_t, before its noise, and e_{t+1}: float64 `[P]` each, from e_t `[P]`.

    v_t may be used only with the noise of `mechanism` on it; the memory must not be released. A
    memory that overflows starts again from zero: the proof holds for any memory whatsoever.
    """
    recalled = clip_and_sum(memory[None], sizes, mechanism.memory).total
    released = sums.clipped / mechanism.batch + recalled
    following = memory + sums.gradients / mechanism.batch - released
    if not bool(torch.isfinite(torch.linalg.vector_norm(following))):
        following = torch.zeros_like(following)
    return released, following
