"""The nodes of a run: who is there and hosts whom, what they are asked, and which replies count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedpriv.errors import ClientFault, InputError, Interrupted, WorkerLost
from fedpriv.federation.gate import Gate
from fedpriv.federation.hosting import Hosting, NodeUsers
from fedpriv.federation.messages import failure_of, hosting_of, query_message
from fedpriv.federation.plan import Plan
from fedpriv.privacy.clipping import bounds_of
from fedpriv.privacy.ledger import Ledger
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.training.cohort import CohortSum

# Between two looks for what nobody announces: nodes that come, and replies on Flower's own grids.
_POLL_SECONDS = 0.005
# flwr's ErrorCode: LOAD_CLIENT_APP_EXCEPTION and CLIENT_APP_RAISED_EXCEPTION.
_CLIENT_CODE_RAISED = (1, 2)


class Nodes:
    """Speaks with the nodes of a run over a grid."""

    def __init__(
        self, plan: Plan, ledger: Ledger, stop: threading.Event, say: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._ledger = ledger
        self._stop = stop
        self._say = say
        self._hosting: Hosting | None = None
        self._asked: dict[int, tuple[int, int]] = {}

    def shares(
        self, grid: Grid, cohort: np.ndarray, at_home: bool
    ) -> list[tuple[NodeUsers, np.ndarray]]:
        """Return the nodes that are asked in a round, each with its share of the `cohort`.

        Nodes come and go, and are then asked anew whom they host. Those that add a share of the
        noise are asked though they have none of the users. For `at_home` see `Hosting.shares`.
        """
        known = self._hosting
        if known is None or known.node_ids != set(grid.get_node_ids()):
            self._hosting = known = self._ask_whom_they_host(grid, first=known is None)
        everybody = self._plan.mechanism.asks_all_nodes
        shares = [each for each in known.shares(cohort, at_home) if len(each[1]) or everybody]
        self._asked = {node.node_id: (node.partition, len(users)) for node, users in shares}
        return shares

    def replies(self, grid: Grid, asked: Iterable[str]) -> list[Message]:
        """Return the replies to the messages `asked` that come before the round's timeout."""
        waiting = set(asked)
        deadline = time.monotonic() + self._plan.config.runtime.round_timeout
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

    def sums(self, replies: Iterable[Message], mechanism: Mechanism) -> dict[int, CohortSum]:
        """Return the sums that count, by partition, in the order of partitions.

        `mechanism` is that of the round, with its bounds.

        Raises:
            InputError, ClientFault: as `_answers`.
        """
        plan = self._plan
        bounds = len(bounds_of(mechanism.gaussian.clipping)) if plan.adaptive else 0
        gate = Gate(self._asked, mechanism, plan.sizes, len(plan.layout.sizes), bounds, self._say)
        return gate.taken(self._answers(replies))

    def _ask_whom_they_host(self, grid: Grid, first: bool) -> Hosting:
        """Wait for nodes (at the first time for all of them) and ask each whom it hosts.

        Those of a simulation that add shares of the noise are waited for: too few, and the round
        would cost what it costs for noise alone.
        """
        config, data = self._plan.config, self._plan.data
        needed = 0 if self._deployed else self._plan.mechanism.needed
        nodes = self._awaited(grid, config.runtime.workers if first or needed else 1)
        asked = grid.push_messages([query_message(node, config, data) for node in nodes])
        found = [hosting_of(reply) for reply in self._answers(self.replies(grid, asked))]
        if len(found) < max(1, needed):
            if not getattr(grid, "replaces_nodes", False):
                raise WorkerLost("no worker answered")
            return self._ask_whom_they_host(grid, first)
        hosting, places = Hosting.of(found), self._plan.sampling.population
        if first and hosting.population is not None and hosting.population > places:
            raise InputError(
                f"data.users is {places}, but the nodes host {hosting.population} users: write "
                "their number, which the accounting depends on"
            )
        hosting = hosting.placed(self._ledger, places, self._say)
        if not hosting.nodes:
            raise InputError("no node is left that hosts the users that this run began with")
        return hosting

    def _awaited(self, grid: Grid, expected: int) -> list[int]:
        """Return the ids of the nodes, once `expected` of them are there."""
        deadline = time.monotonic() + self._plan.config.runtime.round_timeout
        while len(nodes := list(grid.get_node_ids())) < expected:
            if self._stop.is_set():
                raise Interrupted("stopped while waiting for nodes")
            if time.monotonic() > deadline:
                raise InputError(f"only {len(nodes)} of {expected} nodes (runtime.workers) came")
            time.sleep(_POLL_SECONDS)
        return nodes

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

    @property
    def _deployed(self) -> bool:
        return self._plan.config.runtime.deployment
