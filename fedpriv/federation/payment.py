"""What a round's release costs whom, charged durably before anybody can see the release.

In order: `draw` refuses a round that would exceed the budget, `before_asking` charges a deployment
in which nodes or users add the noise, and `settle` charges all others, once the noisy sum exists
and before it is used."""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedpriv.errors import BudgetError
from fedpriv.federation.plan import Plan
from fedpriv.privacy.accounts import PayerCosts, accounts_of
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.ledger import Ledger, Release
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.privacy.mechanisms.outside import told
from fedpriv.privacy.randomness import Purpose

# Numbers of a release whose digest one thread takes at once.
_DIGESTED_NUMBERS = 2**18


class RoundChanged(Exception):  # noqa: N818 - not an error: the round is drawn afresh
    """A repeated round gave another sum than the one that was charged."""


@dataclass(frozen=True)
class Draw:
    """A round whose cohort is drawn.

    Attributes:
        round: counted from 1.
        attempt: which draw of cohort and noise the round uses.
        cohort: who was drawn: sorted int64 places in the population.
        mechanism: the mechanism with the bounds of this round.
        payers: who pays for it; None where all users do.
        bounds: how many clip bounds adapt.
    """

    round: int
    attempt: int
    cohort: np.ndarray
    mechanism: Mechanism
    payers: tuple[int, ...] | None
    bounds: int = 0

    def noise(self, plan: Plan, answers: int) -> tuple[float, ...]:
        """Return the standard deviation of the noise on each block of the averaged update.

        `answers` are the sums of nodes that are in it. It is empty where `stddevs` is, and where
        the algorithm makes of its slots something else than their sum.
        """
        if not plan.algorithm.adds_slots:
            return ()
        with told(self.mechanism):
            stddevs = self.mechanism.stddevs(len(plan.sizes), self.round, answers)
        # Of slots it is the average of all: their sum, in which each has its noise.
        divisor = plan.sampling.expected_cohort / math.sqrt(plan.algorithm.slots)
        return tuple(stddev / divisor for stddev in stddevs[: len(plan.layout.sizes)])


class Payments:
    """The ledger of a run and the accounts of those who pay."""

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self.ledger = ledger
        self.plan = plan
        self._changed: set[int] = set()
        self._accounts = accounts_of(plan.mechanism)
        self._accounts.charge_all(ledger)

    def draw(self, round_: int, bounds: tuple[float, ...]) -> Draw:
        """Draw who takes part in a round; `bounds` are its clip bounds where they adapt.

        Raises:
            BudgetError: the round has yet to be paid for and would exceed the budget.
            InputError: its noise is less than that which its block of rounds has paid for, or the
                code of a mechanism from outside failed.
        """
        attempt = self._attempt(round_)
        with told(self.plan.mechanism):
            mechanism = self.plan.mechanism.at(bounds)
            mechanism = mechanism.of_round(round_, attempt, self.finished_attempt)
            coins = mechanism.coins(round_, attempt)
            generator = self.plan.randomness.numpy(Purpose.SAMPLING, *coins)
            cohort = mechanism.cohort(round_, generator)
            payers = mechanism.payers(round_, cohort)
        draw = Draw(round_, attempt, cohort, mechanism, payers, len(bounds))
        if attempt == len(self.ledger.charges(round_)):
            # Before anybody is asked: a ledger that says no comes too late for the model.
            self.ledger.require_paid(_release_of(draw, ""))
            self._check_budget(draw)
        return draw

    def before_asking(self, draw: Draw) -> None:
        """Charge for a round of which somebody may see more before its release."""
        if self._ahead:
            self._pay(draw, digest="")

    def settle(self, draw: Draw, released: Tensor) -> None:
        """Charge for a release, unless this very release has been charged for.

        Raises:
            RoundChanged: the round was charged before and its repetition gave another sum.
        """
        if self._ahead:
            return
        charges, digest = self.ledger.charges(draw.round), digest_of(released)
        if draw.attempt == len(charges):
            self._pay(draw, digest)
        elif digest != charges[draw.attempt].digest:
            self._changed.add(draw.round)
            raise RoundChanged(draw.round)

    def epsilon(self) -> float | None:
        """Return the RDP ε spent so far at the run's δ, by the worst silo; None for no privacy."""
        return None if self.plan.delta is None else self._accounts.epsilon(self.plan.delta)

    def costs(self) -> PayerCosts | None:
        """Return what those who pay apart have spent; None where nobody does."""
        return None if self.plan.delta is None else self._accounts.costs(self.plan.delta)

    def finished_attempt(self, round_: int) -> int:
        """Return the attempt with which an earlier round was finished: its last."""
        return len(self.ledger.charges(round_)) - 1

    def _attempt(self, round_: int) -> int:
        """Return which draw of cohort and noise the round uses.

        A round that was charged before (the process died between charge and checkpoint) may have
        been seen. A simulation repeats its last draw: the same cohort and noise give the same
        release, which is paid for. Where the sum turned out to have changed, neither may be used
        again: old noise would reveal the change, and an old cohort with fresh noise would cost
        more than two independent draws. Then, and in a deployment, all is drawn afresh.
        """
        charged = len(self.ledger.charges(round_))
        repeats = self.plan.randomness.reproducible and round_ not in self._changed
        return charged - 1 if charged and repeats else charged

    @property
    def _ahead(self) -> bool:
        """Whether the charge must be on the disk before any node is asked.

        The noise of nodes or users of a deployment protects them from the server too, who has
        seen it by the time that sums arrive. A simulation pays afterwards, when it knows whether
        a repeated round gives the release that was paid for.
        """
        return self.plan.config.runtime.deployment and self.plan.mechanism.in_sums

    def _check_budget(self, draw: Draw) -> None:
        if self.plan.limit is None:
            return
        # As the ledger will have it, so that its events are of one kind and can be counted.
        if (after := self._accounts.above(self.plan.limit, _release_of(draw, ""))) is not None:
            raise BudgetError(
                f"round {draw.round} is not run: it would raise ε to "
                f"{epsilon_text(after.epsilon)} by {after.accountant.upper()}, above the budget "
                f"of {self.plan.limit.epsilon:g}; the model of round {draw.round - 1} is kept"
            )

    def _pay(self, draw: Draw, digest: str) -> None:
        release = _release_of(draw, digest)
        self.ledger.append(release)
        self._accounts.charge_all([release])


def _release_of(draw: Draw, digest: str) -> Release:
    """Return what the ledger records of a release of the round."""
    with told(draw.mechanism):
        return Release.of(draw.round, draw.attempt, draw.mechanism, digest, draw.payers)


def digest_of(released: Tensor) -> str:
    """Return the SHA-256 of the SHA-256 of each piece, taken on all processors."""
    pieces = [piece.numpy().data for piece in released.split(_DIGESTED_NUMBERS)]
    with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1)) as threads:
        digests = threads.map(lambda piece: hashlib.sha256(piece).digest(), pieces)
        return hashlib.sha256(b"".join(digests)).hexdigest()
