"""What a finished round says of itself, to whoever writes metrics, checkpoints and reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedpriv.federation.payment import Draw, Payments
from fedpriv.privacy.accounts import PayerCosts
from fedpriv.training.cohort import CohortSum
from fedpriv.training.memory_store import Journal
from fedpriv.training.spans import Span


@dataclass(frozen=True)
class RoundRecord:
    """A finished round.

    Attributes:
        round: counted from 1.
        epsilon: RDP ε at the run's δ after this round; None without privacy.
        lr: the server's learning rate.
        seconds: wall time of the round.
        nodes_lost: nodes that were asked and did not answer.
        nodes_absent: nodes of a deployment that were not there to be asked.
        tries: how often the round was tried; too few nodes took part before.
        sums: what each node saw, in the order of partitions, without the sum itself, which is
            as large as the model. Private: simulation only.
        block_norms: `[blocks]`, L2 norms of the averaged update's blocks, of the release alone.
        block_sums: `[blocks]`, L2 norms of the sums of what users sent, before noise: private,
            simulation only; None where sums arrived with noise of their own.
        block_noise: `[blocks]`, the norm that the noise alone has in expectation in each; empty
            where silos or users added noise of their own.
        bound: the clip bound C of the round; None without privacy.
        bounds: the bounds of the next round where they adapt, a function of the release.
        spans: what the server did, where time is recorded.
        journals: what the users whose sums were counted keep, where they keep anything.
        payers: who pays for the round; None where all users do.
        costs: what they have spent; `epsilon` is that of the worst.
        noise_only: whether too few nodes answered to release their sum, and noise was instead.
    """

    round: int
    epsilon: float | None
    lr: float
    seconds: float
    nodes_lost: int
    nodes_absent: int
    tries: int
    sums: tuple[CohortSum, ...]
    block_norms: tuple[float, ...]
    block_sums: tuple[float | None, ...]
    block_noise: tuple[float, ...]
    bound: float | None
    bounds: tuple[float, ...]
    spans: tuple[Span, ...]
    journals: tuple[Journal, ...]
    payers: tuple[int, ...] | None = None
    costs: PayerCosts | None = None
    noise_only: bool = False

    @classmethod
    def of(
        cls,
        draw: Draw,
        payments: Payments,
        summed: tuple[Tensor, Tensor],
        sums: tuple[CohortSum, ...],
        noise: tuple[float, ...],
        **known: Any,
    ) -> RoundRecord:
        """Return the record of the round of `draw`; `summed` are its total and average update.

        The total is what came in, before noise unless others have added theirs. `known` are the
        attributes that only the server knows. `noise` is that of the average: see `Draw.noise`.
        """
        total, average = summed
        layout = payments.plan.layout
        update = payments.plan.sum_in(total.split(layout.total))
        return cls(
            round=draw.round,
            epsilon=payments.epsilon(),
            sums=sums,
            block_norms=tuple(float(block.norm()) for block in layout.split(average).values()),
            block_sums=tuple(
                None if draw.mechanism.in_sums else float(block.norm())
                for block in layout.split(update).values()
            ),
            block_noise=tuple(
                stddev * math.sqrt(size)
                # There may be none.
                for stddev, size in zip(noise, layout.sizes, strict=False)
            ),
            bound=payments.ledger.charges(draw.round)[-1].bound,
            payers=draw.payers,
            costs=payments.costs(),
            **known,
        )
