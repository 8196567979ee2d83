"""One round of private federated training, from the draw of the cohort to the new model.

Read `PrivateFedAvg.run_round` and what follows it, downwards: that is the round, in its order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedpriv.federation.clip_counts import clip_counts, next_bounds
from fedpriv.federation.hosting import NodeUsers
from fedpriv.federation.messages import OwnNoise, flat_record, train_message
from fedpriv.federation.nodes import Nodes
from fedpriv.federation.payment import Draw, Payments
from fedpriv.federation.plan import Plan
from fedpriv.federation.round_record import RoundRecord
from fedpriv.federation.run_loop import RunLoop
from fedpriv.optimizers.server import GlobalModel
from fedpriv.privacy.clipping import bounds_of
from fedpriv.privacy.ledger import Ledger
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.privacy.randomness import Purpose
from fedpriv.training.memory_store import Journal, MemoryStore
from fedpriv.training.spans import Stopwatch


class PrivateFedAvg(RunLoop):
    """Federated averaging with user-level differential privacy (McMahan et al. 2018).

    Each round: draw a cohort; every user in it adds a contribution of L2 norm at most C to one sum;
    add N(0, (zC)²); charge the ledger, durably; divide by the public expected cohort; step the
    server optimizer.

    Where silos or users add noise none is added here, and the ledger charges all who were drawn.
    Where nodes add shares of it none is added here either, unless too few of them answered.
    """

    def __init__(
        self,
        plan: Plan,
        server: GlobalModel,
        ledger: Ledger,
        on_round: Callable[[RoundRecord], bool | None],
        stop: threading.Event,
        first_round: int = 1,
        bounds: tuple[float, ...] | None = None,
        memory: MemoryStore | None = None,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        super().__init__(plan, on_round, stop, first_round, say)
        self.server, self.ledger = server, ledger
        #: The clip bounds of the next round where they adapt; empty where they are fixed.
        adapting = bounds_of(plan.mechanism.gaussian.clipping) if plan.adaptive else ()
        self.bounds = bounds or adapting
        self.memory = memory  #: where users' memories lie; None where they keep none
        self._payments = Payments(plan, ledger)
        self._nodes = Nodes(plan, ledger, stop, say)
        self._noise_source = plan.noise(self._payments.finished_attempt)
        self._watch = Stopwatch(plan.config.runtime.profile)
        self._draw: Draw
        self._noise: Tensor | None = None
        self._started = 0.0

    def run_round(
        self, round_: int, arrays: ArrayRecord, grid: Grid
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Run a round; while nodes work, report the round before and draw this one's noise."""
        with self._watch.measure("draw and ask"):
            sent = self._nodes.ask(grid, self.configure_train(round_, arrays, ConfigRecord(), grid))
        self._report()
        with self._watch.measure("draw noise"):
            if not self.plan.mechanism.in_sums:
                self._noise = self._drawn_noise()
        with self._watch.measure("wait for workers"):
            # An iterator that is used up lets go of the replies, which are as large as the model.
            replies = iter(self._nodes.replies(grid, sent))
        outcome = self.aggregate_train(round_, replies)
        self._unreported = self._record
        # The next round takes up the memories that this commits, or is paid for before it is asked.
        if self.memory is not None or self._decides(round_):
            self._report()
        return outcome

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort and return one message a node: parameters and its share of users.

        Raises:
            BudgetError, RoundLost: the round would exceed the privacy budget, or too few nodes are
                there; nothing has been asked.
        """
        self._started = time.perf_counter()
        self._draw = self._payments.draw(server_round, self.bounds)
        shares = self._nodes.split(grid, self._draw.cohort, at_home=self.memory is not None)
        self._payments.before_asking(self._draw)
        return [self._message(node, users, arrays) for node, users in shares]

    def _message(self, node: NodeUsers, users: np.ndarray, arrays: ArrayRecord) -> Message:
        mechanism, own_noise, memories = self.plan.mechanism, None, None
        if mechanism.in_sums:
            own_noise = OwnNoise(self._draw.attempt, mechanism.gaussian.noise_multiplier)
        if self.memory is not None:
            memories = (self.memory.folder, self._journal(node.partition))
        config, data, round_ = self.plan.config, self.plan.data, self._draw.round
        return train_message(
            node.node_id, config, arrays, round_, users, self.bounds, memories, own_noise, data
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Add up the sums, release them with noise, pay for the release, and step the model.

        A node that did not answer takes nothing from the noise or the denominator: its users
        contribute zero. The sums of too few to have all the noise are none at all.
        """
        parameters = sum(self.plan.sizes)
        total = torch.zeros(parameters + len(self.bounds), dtype=torch.float64)
        with self._watch.measure("add up"):
            sums = self._nodes.sums(replies, self._draw)
            noise_only = len(sums) < self.plan.mechanism.needed
            sums = {} if noise_only else sums
            for partition, summed in sums.items():
                total[:parameters] += summed.total
                total[parameters:] += clip_counts(summed, self.bounds)
                sums[partition] = replace(summed, total=summed.total.new_empty(0))

        noise = self._draw.noise(self.plan, len(sums))
        with self._watch.measure("noise and ledger"):
            released = self._paid_release(total, noise_only)
            released[:parameters].div_(self.plan.sampling.expected_cohort)
            averages = list(released[:parameters].split(self.plan.layout.total))
        with self._watch.measure("server step"):
            step = self.move(averages, server_round, noise)
        self.bounds = next_bounds(self.plan, self.bounds, released[parameters:], sums.values())
        spans, self._watch.spans = tuple(self._watch.spans), []
        self._record = RoundRecord.of(
            self._draw,
            self._payments,
            (total, step),
            sums=tuple(sums.values()),
            noise=noise,
            lr=self.server.lr(server_round),
            seconds=time.perf_counter() - self._started,
            nodes_lost=self._nodes.lost,
            nodes_absent=self._nodes.absent,
            tries=self.tries,
            bounds=self.bounds,
            spans=spans,
            journals=tuple(map(self._journal, sums)) if self.memory else (),
            noise_only=noise_only,
        )
        self.next_round = server_round + 1
        return self.broadcast(), MetricRecord({"nodes-lost": self._nodes.lost})

    def move(self, averages: list[Tensor], round_: int, noise: tuple[float, ...]) -> Tensor:
        """Move the model by averages `[P]`, one a payload or slot, and return its update."""
        plan, server, update = self.plan, self.server, self.plan.update_in(averages)
        server.step(update, round_, plan.randomness.torch_seed(Purpose.SERVER, round_), noise)
        server.require_finite(round_)
        algorithm = plan.algorithm.of_round(round_, server.lr(round_))
        server.shared = algorithm.server(averages, server.shared, plan.fraction)
        return update

    def _paid_release(self, total: Tensor, noise_only: bool) -> Tensor:
        """Return `total` with noise, after the ledger has been charged for it (see `settle`)."""
        released = self._noisy(total, noise_only)
        self._payments.settle(self._draw, released)
        return released

    def _noisy(self, total: Tensor, noise_only: bool) -> Tensor:
        # Silos and users have added noise at full strength, whoever answered; nodes have where
        # enough of them did. Where not, `total` is zero, and the noise here is all there is.
        if self.plan.mechanism.in_sums and not noise_only:
            return total
        noise, self._noise = self._noise, None
        return GaussianMechanism.add(total, self._drawn_noise() if noise is None else noise)

    def _drawn_noise(self) -> Tensor:
        draw = self._draw
        return self._noise_source.draw(draw.round, draw.attempt, draw.mechanism.gaussian)

    def broadcast(self) -> ArrayRecord:
        """Return the parameters as they travel, and what the algorithm's server sends beside."""
        parameters = torch.cat([self.server.parameters(), self.server.shared.flatten()])
        return flat_record(parameters, getattr(torch, self.plan.config.server.broadcast))

    def _journal(self, partition: int) -> Journal:
        assert self.memory is not None
        return Journal(self._draw.round, self._draw.attempt, partition, self.memory.session)
