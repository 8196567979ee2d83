"""Canaries of an audit: made-up users, each in or out by coin, who send what they are told to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpriv.data.federated import Batch, FederatedDataset
from fedpriv.errors import InputError
from fedpriv.federation.audit_node import AuditNode
from fedpriv.federation.plan import Plan
from fedpriv.privacy.auditing import Coins
from fedpriv.privacy.sampling import Adjacency
from fedpriv.training.cohort import CohortTrainer

# Their directions are held in memory, float32 [canaries, parameters].
_MOST_BYTES = 4 * 2**30
# A canary's update before clipping, in clip bounds: far more than any block is allowed.
_SIZE = 100.0


@dataclass(frozen=True)
class Canaries:
    """Made-up users.

    Attributes:
        ids: of each: `canary_ids`.
        updates: float32 `[m, P·payloads]`, what each would send to be clipped.
        slots: in which of the algorithm's sums each is: int `[m]`.
        sizes: numbers of each block of `updates`.
        included: boolean `[m]`, the coins.
        signed: a canary that was not included sends its update with the other sign, for adjacency
            is replace-one; otherwise it sends nothing.
        block_norms: float64 `[m, H]`, of the blocks of `updates`.
    """

    ids: tuple[str, ...]
    updates: Tensor
    slots: NDArray[np.int64]
    sizes: list[int]
    included: Coins
    signed: bool
    block_norms: Tensor

    @classmethod
    def drawn(cls, ids: tuple[str, ...], plan: Plan, generator: np.random.Generator) -> Canaries:
        """Draw coins, and of each payload a random direction."""
        algorithm, number = plan.algorithm, len(ids)
        payloads = len(algorithm.payloads)
        sizes = plan.layout.sizes * payloads
        if number * sum(sizes) * 4 > _MOST_BYTES:
            most = _MOST_BYTES // (sum(sizes) * 4)
            raise InputError(
                f"--canaries: {number} directions of {sum(sizes):,} numbers take more than "
                f"{_MOST_BYTES / 2**30:g} GiB; write at most {most}"
            )
        seeded = torch.Generator().manual_seed(int(generator.integers(2**63)))
        each = [_directions(number, plan.layout.total, seeded) for _ in range(payloads)]
        drawn = torch.cat(each, dim=1)
        drawn *= _SIZE * plan.mechanism.gaussian.clipping.bound
        blocks = drawn.split(sizes, dim=1)
        norms = [torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in blocks]
        included = generator.integers(0, 2, size=number).astype(bool)
        signed = plan.sampling.adjacency is Adjacency.REPLACE_ONE
        slots = np.array([algorithm.slot(each) for each in ids])
        return cls(ids, drawn, slots, sizes, included, signed, torch.stack(norms, dim=1))

    def along(self, released: Tensor, there: NDArray[np.bool_] | slice) -> Tensor:
        """Return the products of the blocks of a release with those of some canaries: `[·, H]`."""
        updates = self.updates if isinstance(there, slice) else self.updates[there]
        parts = zip(updates.split(self.sizes, dim=1), released.split(self.sizes), strict=True)
        return torch.stack([block @ part.to(block.dtype) for block, part in parts], dim=1)

    def hosted(self, trainer: CohortTrainer) -> AuditNode:
        """Return the node at which they are clipped and added up as any user is."""
        planted, present = self.updates, self.included
        if self.signed:
            signs = torch.from_numpy(np.where(self.included, 1.0, -1.0)).float()
            planted, present = signs[:, None] * self.updates, np.ones_like(self.included)
        places = _Places(trainer.dataset, self.ids)
        device = trainer.device
        return AuditNode(replace(trainer, dataset=places, planted=planted.to(device)), present)


def _directions(number: int, parameters: int, generator: torch.Generator) -> Tensor:
    """Return random directions `[number, parameters]`, orthonormal where there is room for them.

    A direction of a random orthonormal frame is uniform on the sphere, as one drawn alone, and
    canaries then do not hide one another.
    """
    drawn = torch.randn(number, parameters, generator=generator)
    if number <= parameters:
        return torch.linalg.qr(drawn.T)[0].T.contiguous()
    return drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)


def canary_ids(real: Sequence[str], number: int) -> tuple[str, ...]:
    """Return an id for each canary: that of the real user whose number is its own mod N.

    What a public id decides, such as in which of several sums its user is, is decided as for them.
    """
    return tuple(real[each % len(real)] for each in range(number))


@dataclass(frozen=True)
class _Places:
    """A data set of canaries: each has the examples of a real user, whose number is its own mod N.

    What they train on does not matter, for what they send is planted; how many examples they have
    might, in a code that is wrong.
    """

    real: FederatedDataset
    user_ids: tuple[str, ...]

    @property
    def population(self) -> int:
        """How many canaries there are."""
        return len(self.user_ids)

    def user(self, index: int) -> Batch:
        """Build the examples of one canary."""
        return self.real.user(index % self.real.population)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)
