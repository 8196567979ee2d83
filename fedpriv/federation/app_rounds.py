"""The rounds of somebody's own Flower app, in which each node is one user.

The round is `PrivateFedAvg`'s. Here is what an app has otherwise: nodes are not asked whom they
host, messages are the strategy's own, and the strategy moves the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedpriv.errors import Interrupted
from fedpriv.federation.app_strategy import StrategyServer
from fedpriv.federation.clipping_mod import ASKED, asked_record
from fedpriv.federation.gate import Asked, Expected, Refused, total_in
from fedpriv.federation.hosting import NodeUsers
from fedpriv.federation.nodes import Nodes, RoundLost
from fedpriv.federation.plan import Plan
from fedpriv.federation.round_record import RoundRecord
from fedpriv.federation.simulated import simulates
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.privacy.ledger import Ledger
from fedpriv.training.cohort import CohortSum

_POLL_SECONDS = 0.05


class AppNodes(Nodes):
    """The nodes of an app, each a user with a place in the population while it is there.

    Which place that is says nothing: coins are thrown for all places alike, whoever has them, and
    all users pay for every release.
    """

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        stop: threading.Event,
        say: Callable[[str], None],
        least: int,
    ) -> None:
        super().__init__(plan, ledger, stop, say)
        self._least_nodes = least
        self._simulated = False
        self._places: dict[int, int] = {}

    def split(
        self, grid: Grid, cohort: np.ndarray, at_home: bool
    ) -> list[tuple[NodeUsers, np.ndarray]]:
        """Return the nodes whose places are in the `cohort`, each with its only user.

        Raises:
            RoundLost: fewer nodes are there than make a round; nobody has been asked.
        """
        self._simulated = simulates(grid)
        self._place(self._wait_for_nodes(grid))
        self._there = len(self._places)
        self._require_enough(self._there, "are there")
        node_at = {place: node for node, place in self._places.items()}
        drawn = [place for place in cohort.tolist() if place in node_at]
        self._asked = {node_at[place]: Asked(place, 1) for place in drawn}
        population, only = self._plan.sampling.population, np.zeros(1, dtype=np.int64)
        return [(NodeUsers(node_at[place], place, population, 1), only) for place in drawn]

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        """Return the ids of the nodes that are there: at the first time, of all if they come."""
        population = self._plan.sampling.population
        wanted = self._least_nodes if self._places else population
        began = time.monotonic()
        while len(nodes := list(grid.get_node_ids())) < wanted:
            if self._stop.is_set():
                raise Interrupted("stopped while waiting for nodes")
            if time.monotonic() - began > self._plan.config.runtime.join_timeout:
                if len(nodes) >= self._least_nodes:
                    self._say(f"{len(nodes)} of {population} nodes are there")
                break
            time.sleep(_POLL_SECONDS)
        return sorted(nodes)

    def _place(self, nodes: Iterable[int]) -> None:
        there = list(nodes)
        kept = {node: place for node, place in self._places.items() if node in set(there)}
        free = iter(sorted(set(range(self._plan.sampling.population)) - set(kept.values())))
        new = [node for node in there if node not in kept]
        kept |= dict(zip(new, free, strict=False))
        if len(kept) < len(there):
            self._say(
                f"{len(there)} nodes are there, and population is {len(kept)}: the others are "
                "never drawn; write a public number of at least all of them"
            )
        self._places = kept

    def _sum_in(self, reply: Message, expected: Expected) -> tuple[int, CohortSum]:
        if "sum" not in reply.content:
            raise Refused(
                "its update is not clipped; write ClientApp(mods=[fedpriv.flower.clipping_mod])"
            )
        place, total = total_in(reply, self._asked, expected)
        nothing = [0.0] * expected.blocks
        return place, CohortSum(
            total, 0, 0, 0, 0, 0.0, 0.0, 0.0, nothing, nothing, nothing, nothing
        )

    def _require_enough(self, nodes: int, what: str) -> None:
        if nodes < self._least_nodes:
            raise RoundLost(
                f"{nodes} nodes {what}, and the strategy's min_available_nodes is "
                f"{self._least_nodes}"
            )

    @property
    def _deployed(self) -> bool:
        """Whether a node that fails, or lies, is left out; where they are simulated it is a bug."""
        return not self._simulated


class AppRounds(PrivateFedAvg):
    """The rounds of an app."""

    server: StrategyServer

    def __init__(
        self,
        plan: Plan,
        server: StrategyServer,
        ledger: Ledger,
        on_round: Callable[[RoundRecord], bool | None],
        stop: threading.Event,
        first_round: int,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(plan, server, ledger, on_round, stop, first_round, say=say)
        least = max(1, int(getattr(server.strategy, "min_available_nodes", 1)))
        self._nodes = AppNodes(plan, ledger, stop, say, min(least, plan.sampling.population))
        self._train_config = ConfigRecord()

    def run_left(self, grid: Grid, train_config: ConfigRecord, result: Result) -> None:
        """Run the rounds that are left, and keep in `result` what Flower does.

        Raises: as `RunLoop.start`.
        """
        self._train_config = train_config
        arrays = self.broadcast()
        try:
            for round_ in range(self.next_round, self.plan.config.rounds + 1):
                arrays, metrics = self._finished_round(round_, arrays, grid)
                result.arrays = arrays
                result.train_metrics_clientapp[round_] = metrics
                self._check_end(round_, grid)
        finally:
            self._report()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy say what nodes are sent, draw the cohort, and return the messages."""
        self._sent = self.server.configure(server_round, self._train_config)
        return super().configure_train(server_round, arrays, config, grid)

    def _message(self, node: NodeUsers, users: np.ndarray, arrays: ArrayRecord) -> Message:
        asked = asked_record(self._draw.mechanism.gaussian.clipping, node.partition)
        # In one process the code of a node could change what another one reads.
        content = RecordDict({name: r.copy() for name, r in self._sent.content.items()})
        content[ASKED] = asked
        return Message(
            content,
            node.node_id,
            self._sent.metadata.message_type,
            group_id=str(self._draw.round),
        )

    def broadcast(self) -> ArrayRecord:
        """Return the app's arrays."""
        return self.server.arrays
