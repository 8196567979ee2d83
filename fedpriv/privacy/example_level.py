"""Example-level privacy in a silo: the object that samples, bounds, adds noise and accounts.

A silo, such as a hospital, trusts itself alone. In a round it takes T steps of DP-SGD (Abadi et
al. 2016, algorithm 1) on its own examples; what leaves it has been private since its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from fedpriv.errors import InputError
from fedpriv.privacy.clipping import AdaptiveBounds, bounds_of
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.privacy.sampling import Adjacency
from fedpriv.sections import Section

if TYPE_CHECKING:
    import dp_accounting

#: The adjacencies under which one example moves the sum of a Poisson sample by at most C.
EXAMPLE_ADJACENCIES = (Adjacency.ADD_OR_REMOVE_ONE, Adjacency.ZERO_OUT)


class ExampleConfig(Section):
    """Example-level privacy: how each silo samples its own examples. All of it is public."""

    sampling_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        description="q: probability with which an example is in a local step, each independently."
    )
    silo_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="N, a public number, the same for all silos: a step's noisy sum is divided by "
        "q·N. null: each silo's own number of examples, with adjacency: zero_out alone.",
    )
    gradients: Literal["instantiated", "ghost"] = Field(
        default="instantiated",
        description="instantiated: every example's gradient is written out, a model's size each; "
        "ghost: those of linear maps are clipped and added up without that, in less memory.",
    )


@dataclass(frozen=True)
class ExampleLevel:
    """T steps of DP-SGD, each over a Poisson sample of a silo's examples.

    A step releases (Σ clip(g_i, C) + N(0, (zC)²)) / (q·N): every example is in the sum
    independently with probability q. N must be public. With `silo_size` it is that number, the
    same for every silo, which need not be how many examples a silo has; without, it is the
    silo's own number of examples, which only zero-out adjacency takes to be public.

    Bounds that adapt do so from step to step, by noisy counts of a step's examples within them
    that are released with the sum: one Gaussian of multiplier z together (see
    `GaussianMechanism`), whose σ is in proportion to the bound of the step.

    Attributes:
        mechanism: the clip bound C on an example's gradient, and the noise on a step's sum and
            counts; where bounds adapt, of the first step.
        sampling_rate: q, in (0, 1].
        steps: T, the steps of a silo that takes part in a round.
        adjacency: add-or-remove-one or zero-out of one example within a silo.
        silo_size: N; None for each silo's own.
        adaptive: how the bounds follow the counts; None where they are fixed.

    Raises:
        ValueError: an adjacency without a proof, or one that keeps the denominator secret.
    """

    mechanism: GaussianMechanism
    sampling_rate: float
    steps: int
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE_ONE
    silo_size: int | None = None
    adaptive: AdaptiveBounds | None = None

    def __post_init__(self) -> None:
        if self.adjacency not in EXAMPLE_ADJACENCIES:
            raise ValueError(
                "the accountant bounds Poisson sampling for examples that come or go, not for one "
                "exchanged for another; write add_or_remove_one"
            )
        if self.silo_size is None and self.adjacency is not Adjacency.ZERO_OUT:
            raise ValueError(
                "a sum is divided by q·N, and add_or_remove_one keeps a silo's number of examples "
                "secret: write example.silo_size, a public N for all silos, or adjacency: zero_out"
            )

    def draw(self, examples: int, generator: np.random.Generator) -> np.ndarray:
        """Return the sample of one step: sorted int64 indices below `examples`, often fewer.

        Each example has a coin of its own, so the sample of the others is the same with and
        without it.
        """
        return np.flatnonzero(generator.random(examples) < self.sampling_rate)

    def denominator(self, examples: int) -> float:
        """Return q·N, exactly, for a silo of `examples`; 1 for a silo known to be empty."""
        size = examples if self.silo_size is None else self.silo_size
        return self.sampling_rate * size if size else 1.0

    @property
    def contributions(self) -> float | None:
        """How many examples are expected in a step's sum; None where silos have own sizes."""
        return None if self.silo_size is None else self.sampling_rate * self.silo_size

    def check_delta(self, delta: float, examples: int) -> None:
        """Check δ against the public size of a silo of `examples`.

        Raises:
            InputError: δ is so large that publishing one example at random could meet it.
        """
        size = examples if self.silo_size is None else self.silo_size
        if size and delta >= 1 / size:
            raise InputError(
                f"privacy.delta must be below 1/N ({1 / size:.3g} for a silo of {size} examples), "
                f"got {delta:g}"
            )

    def release(
        self, total: Tensor, sizes: Sequence[int], generator: np.random.Generator
    ) -> Tensor:
        """Return the float64 sum of clipped gradients, then of counts, with a step's noise."""
        return self.mechanism.release(total, sizes, generator)

    @property
    def counts(self) -> int:
        """How many counts a step releases beside its sum."""
        return self.mechanism.counts.counts if self.mechanism.counts else 0

    @property
    def bounds(self) -> tuple[float, ...]:
        """The bounds that adapt; empty where they are fixed."""
        return bounds_of(self.mechanism.clipping) if self.adaptive else ()

    def at(self, bounds: Sequence[float]) -> ExampleLevel:
        """Return the level with the mechanism at other bounds; the same for no bounds."""
        return replace(self, mechanism=self.mechanism.at(bounds))

    def after(self, counts: Tensor, examples: int) -> ExampleLevel:
        """Return the level of the step after one that released the noisy `counts`: `[counts]`.

        A silo of `examples` that is known to have none learns nothing from them.
        """
        if self.adaptive is None or not (self.silo_size or examples):
            return self
        fractions = counts / self.denominator(examples) + 0.5
        return self.at(self.adaptive.next(self.bounds, fractions.tolist()))

    def event(self) -> dp_accounting.DpEvent:
        """Return the privacy event of one round for a silo that takes part in it."""
        return steps_event(self.mechanism.noise_multiplier, self.sampling_rate, self.steps)


def steps_event(noise_multiplier: float, sampling_rate: float, steps: int) -> dp_accounting.DpEvent:
    """Return `steps` Poisson-sampled Gaussians (Mironov, Talwar, Zhang 2019), composed."""
    import dp_accounting  # see `fedpriv.privacy.sampling`

    if noise_multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(sampling_rate, gaussian)
    return dp_accounting.SelfComposedDpEvent(step, steps)
