"""The clipping rules by name, what configs say of them, and rules from outside.

A rule of your own is a class, or a function that returns an object, with `scales(norms)`: the
factors of H blocks, `[H]`, for their norms, `[H]`. It may ask for `bound` and `sizes`, the numbers
of parameters of the blocks. Whatever it returns, the bound is enforced: see `OutsideRule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedpriv.components import Kind, Options
from fedpriv.errors import InputError
from fedpriv.privacy.clipping import (
    SPLITS,
    AdaptiveBounds,
    ClippingRule,
    GlobalClipping,
    PerLayerClipping,
)

CountNoise = Annotated[float, Field(ge=1e-6, le=1e9)]


class ClippingOptions(Options):
    """How a user's contribution is bounded; each rule adds its own options."""

    kind: str = Field(description="name of the rule, or package.module:object for your own")
    # Below 1e-20 the squares of float32 block norms and their rounding come too near to zero.
    bound: Annotated[float, Field(ge=1e-20, le=1e20)] = Field(
        description="C, the largest L2 norm of a user's contribution."
    )

    @property
    def bounds_each_block(self) -> bool:
        """Whether every block has a bound of its own, whatever an update is."""
        return False

    @property
    def undoes(self) -> bool:
        """Whether multipliers of local learning rates are undone before an update is bounded."""
        return False


Undo = Annotated[
    bool,
    Field(
        description="Divide each block by the multiplier of its local learning rate before it is "
        "bounded, and multiply what is released by it."
    ),
]


class GlobalOptions(ClippingOptions):
    """One norm for the whole update."""

    split: Literal["uniform", "dim"] = Field(
        default="dim", description="Of no effect where one norm bounds the whole update."
    )
    undo: Undo = False

    @property
    def undoes(self) -> bool:
        """Whether multipliers of local learning rates are undone before an update is bounded."""
        return self.undo


class PerLayerOptions(ClippingOptions):
    """One norm a tensor."""

    split: Literal["uniform", "dim"] = Field(
        default="dim", description="C_h = C/√H (uniform) or C·√(d_h/Σd) (dim)."
    )
    normalize: bool = Field(
        default=False,
        description="Set every block of an update above C to norm C_h exactly.",
    )
    undo: Undo = False

    @property
    def undoes(self) -> bool:
        """Whether multipliers of local learning rates are undone before an update is bounded."""
        return self.undo

    @property
    def bounds_each_block(self) -> bool:
        """Whether every block has a bound of its own, whatever an update is."""
        return not (self.normalize or self.undo)


class AdaptiveOptions(ClippingOptions):
    """Bounds that follow a quantile of the norms (Andrew et al. 2021).

    With privacy.unit: example they do so from step to step.
    """

    split: Literal["uniform", "dim"] = Field(
        default="dim",
        description="adapts: per_layer: at first C_h = C/√H (uniform) or C·√(d_h/Σd) (dim).",
    )
    adapts: Literal["global", "per_layer"] = Field(
        default="global", description="One bound for all, or one a tensor."
    )
    quantile: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="Fraction of users (or examples) whose norm should be within."
    )
    adapt_lr: Annotated[float, Field(gt=0, le=10)] = Field(
        default=0.2, description="Rate η of C ← C·exp(-η(fraction within - quantile))."
    )
    count_noise: CountNoise | None = Field(
        default=None,
        description="Noise standard deviation on each count of users within, charged to z; null: "
        "the larger of z and a twentieth of the cohort (with unit: example of q·N), times "
        "√(number of bounds).",
    )

    @property
    def bounds_each_block(self) -> bool:
        """Whether every block has a bound of its own, whatever an update is."""
        return self.adapts == "per_layer"

    def bounds(self) -> AdaptiveBounds:
        """Return how the bounds follow the norms."""
        return AdaptiveBounds(self.quantile, self.adapt_lr)


def build_global(options: GlobalOptions) -> ClippingRule:
    """Return the rule with one factor for the whole update."""
    return GlobalClipping(options.bound)


def build_per_layer(options: PerLayerOptions, sizes: Sequence[int]) -> ClippingRule:
    """Return the rule with one factor a block, for blocks of `sizes`."""
    bounds = SPLITS[options.split](options.bound, sizes)
    return PerLayerClipping(options.bound, bounds, options.normalize)


def build_adaptive(options: AdaptiveOptions, sizes: Sequence[int]) -> ClippingRule:
    """Return the rule of the first round, for blocks of `sizes`."""
    if options.adapts == "global":
        return GlobalClipping(options.bound)
    return PerLayerClipping(options.bound, SPLITS[options.split](options.bound, sizes))


CLIPPING = Kind(
    key="privacy.clipping",
    noun="clipping rule",
    registered={
        "adaptive": "fedpriv.privacy.clipping_rules:build_adaptive",
        "global": "fedpriv.privacy.clipping_rules:build_global",
        "per_layer": "fedpriv.privacy.clipping_rules:build_per_layer",
    },
    base="fedpriv.privacy.clipping_rules:ClippingOptions",
    facts=("sizes",),
    group="fedpriv.clipping",
    name_key="kind",
    default="per_layer",
)


def build_rule(options: ClippingOptions, sizes: Sequence[int]) -> ClippingRule:
    """Return the rule of these options for blocks of `sizes`.

    Raises:
        InputError: a rule from outside does not keep its bound, or answers nonsense.
    """
    component = CLIPPING.of(options)
    if component.origin is None:
        own: ClippingRule = component.build(options, sizes=tuple(sizes))
        return own
    rule = OutsideRule(
        component.name, options.bound, lambda: component.build(options, sizes=tuple(sizes))
    )
    rule.try_out(len(sizes))
    return rule


@dataclass(frozen=True)
class OutsideRule:
    """A rule from outside, held to its bound whatever it answers.

    It is made anew for each user and shown that user's norms alone: what it answers for one cannot
    depend on another, as sensitivity takes for granted. Factors that would lift a contribution
    above the bound are shrunk to it, all by one factor; where one is negative, infinite or NaN, the
    contribution is zero. Code that goes out of its way, through files or globals, is not stopped.

    Attributes:
        name: how configs name it.
        bound: C, the config's.
        make: makes the rule.
    """

    name: str
    bound: float
    make: Callable[[], Any]

    def scales(self, norms: Tensor) -> Tensor:
        """Return the factor of each block: float64 `[..., H]` from block norms `[..., H]`."""
        if norms.numel() == 0:
            return torch.ones_like(norms)
        users = [self._held(row) for row in norms.reshape(-1, norms.shape[-1])]
        return torch.stack(users).reshape(norms.shape)

    def try_out(self, blocks: int) -> None:
        """Ask the rule about norms that are nobody's.

        Raises:
            InputError: it fails, or its factors break the bound.
        """
        ramp = torch.linspace(0, 1, blocks, dtype=torch.float64)
        for size in (0.0, 1e-12, 0.5, 1.0, 3.0, 1e6):
            for shape in (torch.ones_like(ramp), ramp, ramp.flip(0)):
                norms = size * self.bound * shape
                try:
                    scales = self._asked(norms)
                except InputError:
                    raise
                except Exception as error:
                    raise InputError(
                        f"privacy.clipping.kind: {self.name} fails on norms of blocks, "
                        f"[{blocks}]: {type(error).__name__}: {' '.join(str(error).split())}"
                    ) from error
                lifted = float(torch.linalg.vector_norm(scales * norms))
                if not bool((scales >= 0).all() & scales.isfinite().all()):
                    raise InputError(
                        f"privacy.clipping.kind: {self.name} returns {_few(scales)} for the norms "
                        f"{_few(norms)}; factors must be finite and at least 0"
                    )
                if lifted > self.bound * (1 + 1e-9):
                    raise InputError(
                        f"privacy.clipping.kind: {self.name} breaks its bound: it would let a "
                        f"contribution have the norm {lifted:.4g}, and privacy.clipping.bound is "
                        f"{self.bound:g}; its factors must keep sqrt(sum((factor·norm)²)) below it"
                    )

    def _held(self, norms: Tensor) -> Tensor:
        scales = self._asked(norms)
        usable = (scales >= 0).all() & scales.isfinite().all()
        scales = torch.where(usable, scales, torch.zeros_like(scales))
        norm = torch.linalg.vector_norm(scales * norms)
        # One that overflows is divided into nothing.
        return torch.where(norm > self.bound, scales * (self.bound / norm), scales)

    def _asked(self, norms: Tensor) -> Tensor:
        answer = self.make().scales(norms.clone())
        scales = torch.as_tensor(answer, dtype=norms.dtype, device=norms.device)
        if scales.shape != norms.shape:
            raise InputError(
                f"privacy.clipping.kind: {self.name} returns factors of shape {list(scales.shape)} "
                f"for the norms of {len(norms)} blocks; it must return one for each"
            )
        return scales


def _few(numbers: Tensor) -> str:
    """Return the first of some numbers, as they are printed."""
    first = ", ".join(f"{number:.4g}" for number in numbers.tolist()[:4])
    return f"[{first}{', ...' if len(numbers) > 4 else ''}]"
