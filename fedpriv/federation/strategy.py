"""One round of private federated training, from the draw of the cohort to the new model.

Read `configure_train`, then `aggregate_train`: they are the round, in its order.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedpriv.errors import BudgetError, ClientFault, InputError, Interrupted, WorkerLost
from fedpriv.federation.hosting import Hosting, NodeUsers
from fedpriv.federation.messages import (
    OwnNoise,
    failure_of,
    flat_record,
    hosting_of,
    query_message,
    sum_of,
    train_message,
)
from fedpriv.federation.plan import Plan
from fedpriv.optimizers.server import Server
from fedpriv.privacy.accounts import SiloCosts, accounts_of
from fedpriv.privacy.charging import Cost
from fedpriv.privacy.clipping import bounds_of, moved
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.ledger import Ledger, Release
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.privacy.randomness import Purpose
from fedpriv.training.cohort import CohortSum
from fedpriv.training.memory_store import Journal, MemoryStore
from fedpriv.training.spans import Span, Stopwatch

# Between two looks for what nobody announces: nodes that come, and replies on Flower's own grids.
_POLL_SECONDS = 0.005
# Numbers of a release whose digest one thread takes at once.
_DIGESTED_NUMBERS = 2**18


class RoundChanged(Exception):  # noqa: N818 - not an error: the round is drawn afresh
    """A repeated round gave another sum than the one that was charged."""


@dataclass(frozen=True)
class RoundRecord:
    """What a finished round says of itself.

    Attributes:
        round: counted from 1.
        epsilon: RDP ε at the run's δ after this round; None without privacy.
        lr: the server's learning rate.
        seconds: wall time of the round.
        nodes_lost: nodes that were asked and did not answer.
        sums: what each node saw, in the order of partitions, without the sum itself, which is
            as large as the model. Private: simulation only.
        block_norms: `[blocks]`, L2 norms of the averaged update's blocks, of the release alone.
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
    sums: tuple[CohortSum, ...]
    block_norms: tuple[float, ...]
    block_noise: tuple[float, ...]
    bound: float | None
    bounds: tuple[float, ...]
    spans: tuple[Span, ...]
    journals: tuple[Journal, ...]
    payers: tuple[int, ...] | None = None
    costs: SiloCosts | None = None
    noise_only: bool = False


class PrivateFedAvg(Strategy):
    """Federated averaging with user-level differential privacy (McMahan et al. 2018).

    Each round: draw a cohort; every sampled user adds a contribution of L2 norm at most C to one
    sum; add N(0, (zC)²); divide by the public expected cohort; step the server optimizer. The
    ledger is charged, durably, before the noisy sum is used.

    With example-level privacy the cohort is one of silos, whose changes come with noise of their
    own: none is added here, and the ledger charges the silos that were drawn, whether or not they
    answered. So it is with users who add noise of their own. Where nodes add shares of the noise,
    none is added here either, unless too few of them answered.
    """

    def __init__(
        self,
        plan: Plan,
        server: Server,
        ledger: Ledger,
        on_round: Callable[[RoundRecord], None],
        stop: threading.Event,
        first_round: int = 1,
        bounds: tuple[float, ...] | None = None,
        memory: MemoryStore | None = None,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.plan = plan
        self.server = server
        self.ledger = ledger
        self.next_round = first_round
        #: The clip bounds of the next round where they adapt; empty where they are fixed.
        self.bounds = bounds or (
            bounds_of(plan.mechanism.gaussian.clipping) if plan.adaptive else ()
        )
        #: Where users' memories lie; None where they keep none.
        self.memory = memory
        self._on_round = on_round
        self._say = say
        self._stop = stop
        self._watch = Stopwatch(plan.config.runtime.profile)
        self._noise: Tensor | None = None
        self._noise_source = plan.mechanism.noise(
            plan.sizes, plan.randomness, self._finished_attempt
        )
        self._changed: set[int] = set()
        self._hosting: Hosting | None = None
        self._record: RoundRecord | None = None
        self._unreported: RoundRecord | None = None
        self._started = 0.0
        self._asked = self._lost = 0
        self._noise_only = False
        self._drawn = 0
        #: Who pays for this round; None for all users.
        self._payers: tuple[int, ...] | None = None
        self._accounts = accounts_of(plan.mechanism)
        self._accounts.charge_all(ledger)

    # ---------------------------------------------------------------- the round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort and return one message a node: parameters and its share of users.

        Nodes that add a share of the noise are asked though they have none of the users.

        Raises:
            BudgetError: the round would exceed the privacy budget; nothing has been asked.
        """
        self._started = time.perf_counter()
        attempt = self._drawn = self._attempt(server_round)
        unpaid = attempt == len(self.ledger.charges(server_round))
        generator = self.plan.randomness.numpy(Purpose.SAMPLING, server_round, attempt)
        cohort = self.plan.mechanism.cohort(server_round, generator)
        self._payers = self.plan.mechanism.payers(server_round, cohort)
        if unpaid:
            self._check_budget(server_round)
        hosting, at_home = self._known_hosting(grid), self.memory is not None
        shares = [
            (node, users)
            for node, users in hosting.shares(cohort, at_home)
            if len(users) or self.plan.mechanism.asks_all_nodes
        ]
        self._asked = len(shares)
        if self._pays_before_asking:
            self._pay(server_round, attempt, digest="")
        return [self._message(node, users, arrays, server_round) for node, users in shares]

    def _message(
        self, node: NodeUsers, users: np.ndarray, arrays: ArrayRecord, round_: int
    ) -> Message:
        own_noise, memories = None, None
        if self.plan.mechanism.in_sums:
            own_noise = OwnNoise(self._drawn, self.plan.mechanism.gaussian.noise_multiplier)
        if self.memory is not None:
            memories = (self.memory.folder, self._journal(round_, node.partition))
        config = self.plan.config
        return train_message(
            node.node_id,
            config,
            arrays,
            round_,
            users,
            self.bounds,
            memories,
            own_noise,
            self.plan.data,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up the sums, release them with noise, pay for the release, and step the model.

        A node that did not answer takes nothing from the noise or the denominator: its users
        contribute zero.
        """
        parameters = sum(self.plan.sizes)
        total = torch.zeros(parameters + len(self.bounds), dtype=torch.float64)
        with self._watch.measure("add up"):
            sums = self._enough(self._sums(replies))
            for partition, summed in sums.items():
                total[:parameters] += summed.total
                total[parameters:] += self._beside(summed)
                sums[partition] = replace(summed, total=summed.total.new_empty(0))

        with self._watch.measure("noise and ledger"):
            released = self._paid_release(server_round, total)
            beside = released[parameters:].clone()
            averages = released[:parameters].div_(self.plan.sampling.expected_cohort)
            average, *others = averages.split(self.plan.layout.total)
        with self._watch.measure("server step"):
            seed = self.plan.randomness.torch_seed(Purpose.SERVER, server_round)
            self.server.step(average, server_round, seed)
            fraction = self.plan.sampling.expected_cohort / self.plan.sampling.population
            shared = self.plan.algorithm.server(others, self.server.shared, fraction)
            self.server.shared = shared

        stddevs = self._mechanism.stddevs(len(self.plan.sizes), server_round, len(sums))
        self.bounds = self._next_bounds(beside, sums)
        self._record = self._recorded(server_round, sums, average, stddevs)
        self.next_round = server_round + 1
        metrics = MetricRecord({"nodes-lost": self._lost})
        return self._broadcast(), metrics

    def _enough(self, sums: dict[int, CohortSum]) -> dict[int, CohortSum]:
        """Return `sums`, or none of them where too few have a share of the noise."""
        self._lost = self._asked - len(sums)
        self._noise_only = len(sums) < self.plan.mechanism.needed
        return {} if self._noise_only else sums

    def _paid_release(self, round_: int, total: Tensor) -> Tensor:
        """Return `total` with noise, after the ledger has been charged for it.

        Raises:
            RoundChanged: the round was charged before and its repetition gave another sum.
        """
        if self._pays_before_asking:
            return self._noisy(total, round_, self._drawn)
        attempt, charges = self._attempt(round_), self.ledger.charges(round_)
        released = self._noisy(total, round_, attempt)
        if attempt < len(charges):
            if _digest(released) != charges[attempt].digest:
                self._changed.add(round_)
                raise RoundChanged(round_)
            return released
        self._pay(round_, attempt, _digest(released))
        return released

    def _pay(self, round_: int, attempt: int, digest: str) -> None:
        """Charge the ledger, durably, and the accountant for a release."""
        release = self._release(round_, attempt, digest)
        self.ledger.append(release)
        self._accounts.charge_all([release])

    def _release(self, round_: int, attempt: int, digest: str) -> Release:
        """Return what the ledger records of a release of this round."""
        return Release.of(round_, attempt, self._mechanism, digest, self._payers)

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

    def _noisy(self, total: Tensor, round_: int, attempt: int) -> Tensor:
        # Silos and users have added noise at full strength, whoever answered; nodes have where
        # enough of them did. Where not, `total` is zero, and the noise here is all there is.
        if self.plan.mechanism.in_sums and not self._noise_only:
            return total
        noise, self._noise = self._noise, None
        if noise is None:
            noise = self._drawn_noise(round_, attempt)
        return GaussianMechanism.add(total, noise)

    def _drawn_noise(self, round_: int, attempt: int) -> Tensor:
        return self._noise_source.draw(round_, attempt, self._mechanism.gaussian)

    def _finished_attempt(self, round_: int) -> int:
        """Return the attempt with which an earlier round was finished: its last."""
        return len(self.ledger.charges(round_)) - 1

    @property
    def _pays_before_asking(self) -> bool:
        """Whether the charge must be on the disk before any node is asked.

        The noise of nodes or users of a deployment protects them from the server too, who has
        seen it by the time that sums arrive. A simulation pays afterwards, when it knows whether
        a repeated round gives the release that was paid for.
        """
        return self._deployed and self.plan.mechanism.in_sums

    @property
    def _mechanism(self) -> Mechanism:
        """The mechanism of this round: the plan's, with the bounds as they have adapted."""
        return self.plan.mechanism.at(self.bounds)

    def _beside(self, summed: CohortSum) -> Tensor:
        """Return what a node's sum has beside updates where bounds adapt: float64 `[bounds]`.

        It is Σ(b - 1/2) over its users, b = 1 within the bound: each adds ±1/2 to each count, or 0
        where its update was not finite. Of silos it is by how much their own have moved.
        """
        if not self.bounds:
            return torch.zeros(0, dtype=torch.float64)
        if summed.bound_moves:
            return torch.tensor(summed.bound_moves, dtype=torch.float64)
        finite = summed.users - summed.non_finite
        above = summed.block_clipped if len(self.bounds) > 1 else [summed.clipped]
        return finite / 2 - torch.tensor(above, dtype=torch.float64)

    def _next_bounds(self, beside: Tensor, sums: Mapping[int, CohortSum]) -> tuple[float, ...]:
        """Return the bounds of the next round, a function of what was released."""
        if self.plan.adaptive is None:
            return self.bounds
        if not self.plan.mechanism.in_sums:
            within = beside / self.plan.sampling.expected_cohort + 0.5
            return self.plan.adaptive.next(self.bounds, within.tolist())
        # Who answered is no secret of silos: the geometric mean over them.
        silos = sum(summed.users for summed in sums.values())
        return moved(self.bounds, (beside / max(silos, 1)).tolist())

    def _check_budget(self, round_: int) -> None:
        if (after := self._above_budget(round_)) is not None:
            raise BudgetError(
                f"round {round_} is not run: it would raise ε to {epsilon_text(after.epsilon)} by "
                f"{after.accountant.upper()}, above the budget of {self.plan.budget:g}; the model "
                f"of round {round_ - 1} is kept"
            )

    def _above_budget(self, round_: int) -> Cost | None:
        """Return what the round would raise ε to; None where that is within the budget."""
        if self.plan.limit is None:
            return None
        # As the ledger will have it, so that its events are of one kind and can be counted.
        event = self._release(round_, self._drawn, "").event()
        return self._accounts.above(self.plan.limit, self._payers, event)

    def epsilon(self) -> float | None:
        """Return the RDP ε spent so far at the run's δ, by the worst silo; None for no privacy."""
        if self.plan.delta is None:
            return None
        return self._accounts.epsilon(self.plan.delta)

    # ---------------------------------------------------------------- the run

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left, from `next_round` to the config's last.

        The config decides rounds, start, timeout and evaluation, which the ledger depends on: of
        Flower's other arguments none is taken but a `num_rounds` that is the config's own.

        Raises:
            InputError: an argument that would be ignored, with the key to write instead; or as
                below.
            Interrupted: the user asked to stop, between rounds or while nodes were working.
            BudgetError: the next round would exceed the budget.
            WorkerLost: a simulated node died that nobody replaces, or again and again; finished
                rounds are kept.
            InputError: a node found the user's data or config wrong.
        """
        _refuse_arguments(
            self.plan.config.rounds,
            num_rounds=num_rounds,
            initial_arrays=initial_arrays,
            timeout=timeout,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
        )
        arrays = self._broadcast()
        result = Result(arrays=arrays)
        try:
            for round_ in range(self.next_round, self.plan.config.rounds + 1):
                try:
                    new_arrays, metrics = self._run_round(round_, arrays, grid)
                except RoundChanged:
                    new_arrays, metrics = self._run_round(round_, arrays, grid)
                assert new_arrays is not None
                assert metrics is not None
                result.arrays = arrays = new_arrays
                result.train_metrics_clientapp[round_] = metrics
                self._check_end(round_, grid)
        finally:
            self._report()
        return result

    def _run_round(
        self, round_: int, arrays: ArrayRecord, grid: Grid
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Run a round; while nodes work, report the round before and draw this one's noise."""
        with self._watch.measure("draw and ask"):
            messages = list(self.configure_train(round_, arrays, ConfigRecord(), grid))
            asked = grid.push_messages(messages)
        self._report()
        with self._watch.measure("draw noise"):
            if not self.plan.mechanism.in_sums:
                self._noise = self._drawn_noise(round_, self._drawn)
        with self._watch.measure("wait for workers"):
            # An iterator that is used up lets go of the replies, which are as large as the model.
            replies = iter(self._replies(grid, asked))
        outcome = self.aggregate_train(round_, replies)
        self._unreported = self._record
        # The next round's users take up the memories that this report commits; and a deployment
        # may pay for its next round before it asks.
        if self.memory is not None or self._deployed:
            self._report()
        return outcome

    def _report(self) -> None:
        """Hand on the record of the round that was finished last, once."""
        record, self._unreported = self._unreported, None
        if record is not None:
            self._on_round(record)

    def _check_end(self, round_: int, grid: Grid) -> None:
        """Stop after `round_` where that was asked for, or nodes died in it whom none replaces."""
        assert self._record is not None
        if self._stop.is_set():
            raise Interrupted(f"stopped after round {round_}")
        if not self._record.nodes_lost or self._deployed or self.finished:
            return
        if not getattr(grid, "replaces_nodes", False):
            raise WorkerLost(f"{self._record.nodes_lost} workers died in round {round_}")

    def _broadcast(self) -> ArrayRecord:
        """Return the parameters as they travel to the nodes."""
        dtype = getattr(torch, self.plan.config.server.broadcast)
        return flat_record(
            torch.cat([self.server.parameters(), self.server.shared.flatten()]), dtype
        )

    @property
    def finished(self) -> bool:
        """Whether no round is left to run."""
        return self.next_round > self.plan.config.rounds

    @property
    def _deployed(self) -> bool:
        return self.plan.config.runtime.deployment

    def _known_hosting(self, grid: Grid) -> Hosting:
        """Return who hosts whom; nodes come and go, and are then asked again."""
        known = self._hosting
        if known is None or known.node_ids != set(grid.get_node_ids()):
            self._hosting = known = self._ask_nodes(grid, first=known is None)
        return known

    def _ask_nodes(self, grid: Grid, first: bool) -> Hosting:
        """Wait for nodes (at the first time for all of them) and ask each whom it hosts.

        Those of a simulation that add shares of the noise are waited for: too few, and the round
        would cost what it costs for noise alone.
        """
        needed = 0 if self._deployed else self.plan.mechanism.needed
        expected = self.plan.config.runtime.workers if first or needed else 1
        deadline = time.monotonic() + self.plan.config.runtime.round_timeout
        while len(nodes := list(grid.get_node_ids())) < expected:
            self._pause(deadline, f"only {len(nodes)} of {expected} nodes (runtime.workers) came")
        config, data = self.plan.config, self.plan.data
        replies = self._exchange(grid, [query_message(node, config, data) for node in nodes])
        found = [hosting_of(reply) for reply in self._answers(replies)]
        if len(found) < max(1, needed):
            if not getattr(grid, "replaces_nodes", False):
                raise WorkerLost("no worker answered")
            return self._ask_nodes(grid, first)
        hosting, places = Hosting.of(found), self.plan.sampling.population
        if first and hosting.population is not None and hosting.population > places:
            raise InputError(
                f"data.users is {places}, but the nodes host {hosting.population} users: write "
                "their number, which the accounting depends on"
            )
        hosting = hosting.placed(self.ledger, places, self._say)
        if not hosting.nodes:
            raise InputError("no node is left that hosts the users that this run began with")
        return hosting

    def _exchange(self, grid: Grid, messages: list[Message]) -> list[Message]:
        """Send `messages` and return the replies that come before the round's timeout."""
        return self._replies(grid, grid.push_messages(messages))

    def _replies(self, grid: Grid, asked: Iterable[str]) -> list[Message]:
        """Return the replies to the messages `asked` that come before the round's timeout."""
        waiting = set(asked)
        deadline = time.monotonic() + self.plan.config.runtime.round_timeout
        replies: list[Message] = []
        while waiting:
            arrived = list(grid.pull_messages(waiting))
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if not waiting or time.monotonic() > deadline:
                break
            if not arrived:
                time.sleep(_POLL_SECONDS)
        return replies

    def _pause(self, deadline: float, problem: str) -> None:
        if self._stop.is_set():
            raise Interrupted("stopped while waiting for nodes")
        if time.monotonic() > deadline:
            raise InputError(problem)
        time.sleep(_POLL_SECONDS)

    def _sums(self, replies: Iterable[Message]) -> dict[int, CohortSum]:
        """Return the sums that arrived, by partition, in the order of partitions."""
        arrived = sorted(dict(map(sum_of, self._answers(replies))).items())
        return {number: summed for number, summed in arrived if self._is_sound(summed)}

    def _is_sound(self, summed: CohortSum) -> bool:
        """Say whether a sum can be one of clipped updates; a node that sends another is lost."""
        if summed.total.shape != (sum(self.plan.sizes),):
            return False
        # Any number that is not finite makes the sum so.
        return math.isfinite(float(summed.total.sum()))

    def _answers(self, replies: Iterable[Message]) -> list[Message]:
        """Return the replies of nodes that did their work; the dead ones are left out.

        Raises:
            InputError: a node of a simulation reported that the user's input is wrong. In a
                deployment the operator is told, and the others go on.
            ClientFault: the client code itself raised: in a simulation on any node, in a
                deployment on all that answered.
        """
        good, crashed = [], []
        for reply in replies:
            if (reason := failure_of(reply)) is not None:
                if not self._deployed:
                    raise InputError(reason)
                self._say(f"node {reply.metadata.src_node_id} takes no part: {reason}")
            elif not reply.has_error():
                good.append(reply)
            elif reply.error.code in _CLIENT_CODE_RAISED:
                crashed.append(reply.error.reason)
        if crashed and (not good or not self._deployed):
            raise ClientFault(crashed[0])
        return good

    def _recorded(
        self,
        round_: int,
        sums: Mapping[int, CohortSum],
        average: Tensor,
        stddevs: Sequence[float],
    ) -> RoundRecord:
        layout, cohort = self.plan.layout, self.plan.sampling.expected_cohort
        spans, self._watch.spans = tuple(self._watch.spans), []
        return RoundRecord(
            round=round_,
            epsilon=self.epsilon(),
            lr=self.server.lr(round_),
            seconds=time.perf_counter() - self._started,
            nodes_lost=self._lost,
            sums=tuple(sums.values()),
            block_norms=tuple(float(block.norm()) for block in layout.split(average).values()),
            block_noise=tuple(
                stddev * math.sqrt(size) / cohort
                # Those of the update come first, and there may be none.
                for stddev, size in zip(stddevs, layout.sizes, strict=False)
            ),
            bound=self.ledger.charges(round_)[-1].bound,
            bounds=self.bounds,
            spans=spans,
            journals=tuple(self._journal(round_, p) for p in sums) if self.memory else (),
            payers=self._payers,
            costs=None if self.plan.delta is None else self._accounts.costs(self.plan.delta),
            noise_only=self._noise_only,
        )

    def _journal(self, round_: int, partition: int) -> Journal:
        assert self.memory is not None
        return Journal(round_, self._drawn, partition, self.memory.session)

    # ---------------------------------------------------------------- not used

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: the model is measured on held-out examples at the server."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing: users are not asked to evaluate."""
        return None

    def summary(self) -> None:
        """Say nothing: the run directory holds the resolved config and the privacy statement."""


def _digest(released: Tensor) -> str:
    """Return the SHA-256 of the SHA-256 of each piece, taken on all processors."""
    pieces = [piece.numpy().data for piece in released.split(_DIGESTED_NUMBERS)]
    with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1)) as threads:
        digests = threads.map(lambda piece: hashlib.sha256(piece).digest(), pieces)
        return hashlib.sha256(b"".join(digests)).hexdigest()


# flwr's ErrorCode: LOAD_CLIENT_APP_EXCEPTION and CLIENT_APP_RAISED_EXCEPTION.
_CLIENT_CODE_RAISED = (1, 2)


#: What to write instead of an argument of Flower's `start`.
_INSTEAD = {
    "num_rounds": "`rounds`",
    "initial_arrays": "`seed_model.path`, or nothing for the model's own start",
    "timeout": "`runtime.round_timeout`",
    "train_config": "`local`",
    "evaluate_config": "`evaluation`",
    "evaluate_fn": "`evaluation`, and read metrics.jsonl",
}


def _refuse_arguments(rounds: int, **given: Any) -> None:
    """Refuse what a caller believes to be obeyed.

    Raises:
        InputError: an argument is given that is not what the config says.
    """
    if given["num_rounds"] == rounds:
        given["num_rounds"] = None
    for name, value in given.items():
        if value is not None:
            raise InputError(
                f"{name}: the config decides it, which the ledger depends on; write "
                f"{_INSTEAD[name]} there"
            )
