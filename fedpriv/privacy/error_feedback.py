"""Error feedback in the users' own hands: what clipping cut off is kept, and sent later.

User k keeps a memory e_k, which never leaves it. What it sends is a function of its own data, its
own past and what was released, and its norm is bounded whatever the memory holds: so the memory
costs no privacy under Poisson sampling (proof: docs/privacy.md, "Memory that a user keeps").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedpriv.privacy.clipping import (
    ClippedSum,
    ClippingRule,
    GlobalClipping,
    bounds_of,
    clip_and_sum,
    with_bounds,
)
from fedpriv.sections import NO_BEARING, Positive, Section


class ErrorFeedbackConfig(Section):
    """What users keep of what clipping cut off; also written as just `none`, `user` or `dice`."""

    kind: Literal["none", "user"] = Field(
        default="none",
        description="user: each user keeps a memory of its own, at no privacy cost.",
    )
    variant: Literal["remainder", "dice"] = Field(
        default="remainder",
        description="remainder: update and memory are clipped as one, to clipping.bound; dice: "
        "each alone, and a contribution's norm is up to clipping.bound + memory_bound.",
    )
    memory_bound: Annotated[float, Field(ge=1e-20, le=1e20)] | None = Field(
        default=None, description="dice: bound C2 on the memory; null: clipping.bound."
    )
    decay: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="Factor on a user's memory each time that it takes part."
    )
    norm_cap: Positive | None = Field(
        default=None, description="Largest L2 norm of a memory; null: any."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="How memories are stored; bfloat16 halves them."
    )
    ram_mib: Annotated[int, Field(ge=0), NO_BEARING] = Field(
        default=1024,
        description="RAM in which all workers together keep memories (MiB); all lie on disk.",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        short = {"none": {}, "user": {"kind": "user"}, "dice": {"kind": "user", "variant": "dice"}}
        if value not in short:
            raise ValueError("write none, user or dice, or a section with kind: user")
        return short[value]

    @model_validator(mode="after")
    def _options_go_with_kind(self) -> ErrorFeedbackConfig:
        for name, field in type(self).model_fields.items():
            if self.kind == "none" and getattr(self, name) != field.default:
                raise ValueError(f"{name} goes with kind: user only")
        if self.memory_bound is not None and self.variant != "dice":
            raise ValueError("memory_bound goes with variant: dice only")
        return self


class ErrorFeedback(Protocol):
    """How a user's memory enters its contribution."""

    @property
    def decay(self) -> float:
        """γ in [0, 1]: the factor on the memory each time its user takes part."""
        ...

    @property
    def norm_cap(self) -> float | None:
        """The largest L2 norm that a memory may have; None for any."""
        ...

    def contribution(self, clipping: ClippingRule) -> ClippingRule:
        """Return a rule whose bounds hold for every contribution made with `clipping`."""
        ...

    def send(
        self, updates: Tensor, memories: Tensor, sizes: Sequence[int], clipping: ClippingRule
    ) -> tuple[ClippedSum, Tensor]:
        """Return the sum of contributions, and what was not sent: `[U, P]`.

        `memories` are finite and have decayed. The rest of a user that is not finite is undefined.
        """
        ...


@dataclass(frozen=True)
class Remainder:
    """u = clip(Δ + γe, C), e ← Δ + γe − u (Seide et al. 2014, with clipping as the compressor)."""

    decay: float = 1.0
    norm_cap: float | None = None

    def contribution(self, clipping: ClippingRule) -> ClippingRule:
        """Return `clipping` itself: the memory is clipped together with the update."""
        return clipping

    def send(
        self, updates: Tensor, memories: Tensor, sizes: Sequence[int], clipping: ClippingRule
    ) -> tuple[ClippedSum, Tensor]:
        """Clip update and memory as one."""
        wanted = updates + memories
        sent = clip_and_sum(wanted, sizes, clipping)
        return sent, _cut_off(wanted, sizes, sent)


@dataclass(frozen=True)
class Dice:
    """u = clip(Δ, C1) + clip(γe, C2), e ← Δ + γe − u: DiceSGD's step (Zhang et al. 2024) by user.

    There the memory is the server's and costs privacy; here each user has its own, and the norm of
    what it sends is at most C1 + C2.

    Attributes:
        memory_clipping: the rule of bound C2, of the kind of the rule that bounds updates.
    """

    memory_clipping: ClippingRule
    decay: float = 1.0
    norm_cap: float | None = None

    def contribution(self, clipping: ClippingRule) -> ClippingRule:
        """Return `clipping` with the bounds of both parts added, block by block."""
        parts = zip(bounds_of(clipping), bounds_of(self.memory_clipping), strict=True)
        return with_bounds(clipping, [update + memory for update, memory in parts])

    def send(
        self, updates: Tensor, memories: Tensor, sizes: Sequence[int], clipping: ClippingRule
    ) -> tuple[ClippedSum, Tensor]:
        """Clip update and memory each by its own rule; what is seen is seen of the update."""
        sent = clip_and_sum(updates, sizes, clipping)
        # Who contributes zero sends nothing of its memory either.
        usable = memories.masked_fill(~sent.finite[:, None], 0.0)
        recalled = clip_and_sum(usable, sizes, self.memory_clipping)
        rest = _cut_off(updates, sizes, sent) + _cut_off(usable, sizes, recalled)
        return replace(sent, total=sent.total + recalled.total), rest


@dataclass(frozen=True)
class Fed:
    """What a stack of users sends, and what it keeps (private: simulation only).

    Attributes:
        sent: the sum of the contributions, with what clipping saw.
        memories: `[U, P]`, the users' new memories.
        reset: boolean `[U]`, True where the old memory was not finite and was taken to be zero.
    """

    sent: ClippedSum
    memories: Tensor
    reset: Tensor


def feed_back(
    updates: Tensor,
    memories: Tensor,
    sizes: Sequence[int],
    clipping: ClippingRule,
    feedback: ErrorFeedback,
) -> Fed:
    """Bound each row's update and memory, in exact terms, and add the contributions up.

    Args:
        updates: `[U, P]`, a user's update with its blocks, of `sizes`, laid end to end.
        memories: `[U, P]`, the users' memories e.
        sizes: number of parameters of each block.
        clipping: the rule that bounds an update.
        feedback: the variant.

    Each row of the sum has norm at most `feedback.contribution(clipping).bound` for every input.
    A memory that holds a NaN or Inf is taken to be zero. An update that does, or that overflows
    together with the memory, contributes zero and leaves the memory as it was.
    """
    reset = ~torch.isfinite(_norms(memories))
    before = memories.masked_fill(reset[:, None], 0.0)
    sent, rest = feedback.send(updates, feedback.decay * before, sizes, clipping)
    if feedback.norm_cap is not None:
        norms = _norms(rest)[:, None]
        rest = rest * GlobalClipping(feedback.norm_cap).scales(norms).to(rest.dtype)
    after = torch.where(sent.finite[:, None], rest, before)
    return Fed(sent, after, reset)


def _cut_off(numbers: Tensor, sizes: Sequence[int], sent: ClippedSum) -> Tensor:
    """Return what clipping took from each row: `[U, P]`."""
    # 1 - scale is taken in float64, so that a rest is exact to its own last digits.
    left = (1 - sent.scales).to(numbers.dtype)
    blocks = numbers.split(list(sizes), dim=1)
    return torch.cat([block * left[:, h, None] for h, block in enumerate(blocks)], dim=1)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
