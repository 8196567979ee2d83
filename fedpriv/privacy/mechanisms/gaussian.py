"""Gaussian noise, and the server that adds it: noise is added in `GaussianMechanism.add` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedpriv.privacy.clipping import (
    ClippingRule,
    PayloadClipping,
    PerLayerClipping,
    with_bounds,
)
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.mechanisms.base import (
    Facts,
    Mechanism,
    Sentences,
    count_release,
    dp_fedavg,
)
from fedpriv.privacy.randomness import standard_normal
from fedpriv.privacy.sampling import Adjacency

if TYPE_CHECKING:
    from fedpriv.privacy.ledger import Release


@dataclass(frozen=True)
class CountNoise:
    """The noisy counts of users, or examples, within their bound, which adaptive clipping follows.

    Each adds ±1/2 to each of `counts` numbers, so their joint L2 sensitivity is √counts/2
    (Andrew et al. 2021, remark 1).

    Attributes:
        counts: 1, or the number of blocks where each block has a bound of its own.
        stddev: standard deviation σ_b of the noise on each count.
    """

    counts: int
    stddev: float

    @property
    def inverse_square(self) -> float:
        """(sensitivity / σ_b)², what the counts add to 1/z²."""
        return self.counts / (2 * self.stddev) ** 2


@dataclass(frozen=True)
class GaussianMechanism:
    """Releases the sum of clipped updates, and counts where there are any, with Gaussian noise.

    The release is one Gaussian mechanism of multiplier z whatever its parts: with update noise of
    multiplier z_Δ and counts of multiplier z_c, 1/z² = 1/z_Δ² + 1/z_c². With `per_block` noise
    block h has multiplier z_Δ·√H relative to its own bound C_h, and 1/z_Δ² = Σ_h 1/(z_Δ²·H).

    Attributes:
        noise_multiplier: z of the whole release: what the accountant is told.
        clipping: the rule that bounds each contribution; its bound is C.
        counts: noise of the counts for adaptive clipping; None where bounds are fixed.
        per_block: noise of each block in proportion to its own bound, instead of spherical.

    Raises:
        ValueError: the counts alone already cost more than z allows, or per-block noise goes with
            a rule that does not bound each block.
    """

    noise_multiplier: float
    clipping: ClippingRule
    counts: CountNoise | None = None
    per_block: bool = False

    def __post_init__(self) -> None:
        if self.noise_multiplier and self.counts and self._inverse_square_left() <= 0:
            least = self.noise_multiplier * math.sqrt(self.counts.counts) / 2
            raise ValueError(f"the noise on the counts must be above {least:.4g}")
        if self.per_block and not (
            isinstance(self.clipping, PerLayerClipping) and not self.clipping.normalize
        ):
            raise ValueError("per-block noise needs per-layer clipping without normalize")

    @property
    def update_multiplier(self) -> float:
        """z_Δ: standard deviation of the noise on the updates divided by C."""
        if self.noise_multiplier == 0:
            return 0.0
        return 1 / math.sqrt(self._inverse_square_left())

    def _inverse_square_left(self) -> float:
        spent = self.counts.inverse_square if self.counts else 0.0
        return self.noise_multiplier**-2 - spent

    @property
    def stddev(self) -> float:
        """σ = z_Δ·C, on each coordinate of the sum of updates (spherical noise)."""
        # Without noise the bound may be infinite, and 0·inf is not a number.
        return 0.0 if self.noise_multiplier == 0 else self.update_multiplier * self.clipping.bound

    @property
    def payloads(self) -> tuple[tuple[str, float, float], ...]:
        """Name, bound C_p and noise σ_p of each payload, where there are several; else nothing.

        Each of n has multiplier z_p = z_Δ·√n relative to its own bound: 1/z_Δ² = Σ_p 1/z_p².
        """
        if not isinstance(self.clipping, PayloadClipping):
            return ()
        scale = self.update_multiplier * math.sqrt(len(self.clipping.rules))
        named = zip(self.clipping.payloads, self.clipping.rules, strict=True)
        return tuple((name, rule.bound, scale * rule.bound) for name, rule in named)

    def block_stddevs(self, blocks: int) -> tuple[float, ...]:
        """Return the standard deviation of the noise on each of `blocks` blocks.

        Of several payloads `blocks` are those of all, one payload after another; of slots, of which
        a user fills one (`Algorithm.slots`), those of all slots.
        """
        if self.payloads:
            each = blocks // len(self.payloads)
            return tuple(stddev for _, _, stddev in self.payloads for _ in range(each))
        if not self.per_block:
            return (self.stddev,) * blocks
        assert isinstance(self.clipping, PerLayerClipping)
        bounds = self.clipping.block_bounds
        scale = self.update_multiplier * math.sqrt(len(bounds))
        return tuple(scale * bound for bound in bounds) * (blocks // len(bounds))

    def largest_noise(self, sizes: Sequence[int]) -> float:
        """Return the L2 norm that noise for blocks of `sizes` exceeds once in 10^12 times.

        The norm of N(0, diag(σ²)) exceeds √(Σ_h σ_h²·d_h) + t·max σ with probability e^(-t²/2) at
        most (Boucheron et al. 2013, theorem 5.6: it is max σ-Lipschitz in standard normals).
        """
        stddevs = self.block_stddevs(len(sizes))
        expected = math.hypot(*(s * math.sqrt(d) for s, d in zip(stddevs, sizes, strict=True)))
        return expected + math.sqrt(2 * math.log(1e12)) * max(stddevs)

    def at(self, bounds: Sequence[float]) -> GaussianMechanism:
        """Return the mechanism with other bounds, and noise in proportion; itself for no bounds."""
        if not bounds:
            return self
        return replace(self, clipping=with_bounds(self.clipping, bounds))

    def release(
        self, total: Tensor, sizes: Sequence[int], generator: np.random.Generator
    ) -> Tensor:
        """Return the float64 vector `total` with noise drawn from `generator`.

        Args:
            total: the sum of updates, block after block, then the sum of counts.
            sizes: number of coordinates of each block.
            generator: the owner of this release's noise.

        The noise is of full strength, whoever dropped out of the sum.
        """
        return self.add(total, self.noise(sizes, generator))

    @staticmethod
    def add(total: Tensor, noise: Tensor) -> Tensor:
        """Return `total` with `noise`, which is used up: float64.

        Whoever adds noise calls this: the server, a node for its share, a user, a silo.

        Raises:
            ValueError: there is not one number of noise for each of the sum.
        """
        if total.shape != noise.shape:
            raise ValueError(f"noise {list(noise.shape)} for a sum {list(total.shape)}")
        return noise.to(total.device).add_(total)

    def noise(self, sizes: Sequence[int], generator: np.random.Generator) -> Tensor:
        """Return the noise of one release, a float64 vector; zeros for a multiplier of 0.

        It depends on nobody's data, so it may be drawn before the sum is there. It is drawn in
        float64: the remaining floating-point gap (Mironov 2012) is stated in reports.
        """
        stddevs, repeats = list(self.block_stddevs(len(sizes))), list(sizes)
        if self.counts is not None:
            stddevs.append(self.counts.stddev)
            repeats.append(self.counts.counts)
        if self.noise_multiplier == 0:
            return torch.zeros(sum(repeats), dtype=torch.float64)
        noise = torch.from_numpy(standard_normal(sum(repeats), generator))
        for part, stddev in zip(noise.split(repeats), stddevs, strict=True):
            part.mul_(stddev)
        return noise


@dataclass(frozen=True)
class CentralMechanism(Mechanism):
    """The server adds noise once, to the sum over the cohort, at full strength."""

    kind = "server"

    @classmethod
    def adversaries(
        cls, releases: Sequence[Release], adjacency: Adjacency, delta: float
    ) -> dict[str, float]:
        """Return what holds against a node, where the size of the cohort tells it too much."""
        if all(release.sampling != "fixed_size" for release in releases):
            return {}  # ε itself holds against a node
        from fedpriv.privacy.adversaries import epsilon_against_a_node

        node = epsilon_against_a_node(releases, adjacency, delta)
        return {} if node is None else {"node": node}

    @classmethod
    def sentences(cls, facts: Facts) -> Sentences:
        """Return who must be trusted, and where the noise is added."""
        noise = (
            "Gaussian noise N(0, σ²) is added once, centrally, to each coordinate of the sum, at "
            f"full strength whoever dropped out.{count_release(facts.release)}"
        )
        if facts.noise_from_outside:
            noise = (
                "Noise is added once, centrally, to the sum, whoever dropped out. Code from "
                "outside draws it: each round is charged as Gaussian noise N(0, σ²) with the σ on "
                f"record, and the code may add more.{count_release(facts.release)}"
            )
        return {"trust": central_trust(facts), "mechanism": dp_fedavg(facts, noise)}


#: What the nodes and the server of a run see whose sums come without noise.
EXACT_SUMS = (
    "The nodes receive the model of every round, and each sends back the exact sum of its own "
    "users' updates.",
    "The server sees these exact sums, who was sampled and which node has which user: it must "
    "be trusted, and so must the channel to it.",
)


def central_trust(facts: Facts) -> tuple[str, ...]:
    """Return who sees what where the server adds the noise."""
    return (
        "Central differential privacy with a trusted aggregator.",
        *EXACT_SUMS,
        "Everybody else may see every released model: the guarantee covers all of them together, "
        "not the last one alone.",
        _against_a_node(facts),
        "Nothing is promised against the server itself or whoever breaks into it.",
    )


def _against_a_node(facts: Facts) -> str:
    """Return what holds against nodes, who see which of their own users were drawn."""
    if facts.of_trials:
        return (
            "Nodes are NOT covered by this ε: they receive the models of all trials, and it holds "
            "for those who see this run alone."
        )
    if facts.sampling.kind == "fixed_size":
        return (
            "Nodes are NOT covered by this ε: a node knows how many of its own users were drawn, "
            "and of a fixed number that tells how many others were. Against nodes, for a user of "
            "another, and against users, each of whom knows this of itself, it is at most "
            f"ε = {epsilon_text(facts.adversaries.get('node', math.inf))} by RDP, without "
            "amplification."
        )
    others = {
        "poisson": "it knows which of its own users were drawn, and each is drawn by a coin of "
        "its own.",
        "all": "everybody is in every round.",
        "random_allocation": "it knows when its own users took part, and each user's round is "
        "drawn independently of all others'.",
        "min_separation": "nothing is claimed for who was drawn.",
    }[facts.sampling.kind]
    return (
        "Nodes see the data of the users whom they train. For users of other nodes ε holds against "
        f"a node too: {others}"
    )
