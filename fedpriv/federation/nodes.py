"""The nodes of a run: who is there and hosts whom, what they are asked, and which replies count."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedpriv.errors import ClientFault, InputError, Interrupted, WorkerLost
from fedpriv.federation.gate import (
    CLIENT_CODE_RAISED,
    Asked,
    Expected,
    Refused,
    hosting_in,
    reason_in,
    sum_in,
    unreached,
)
from fedpriv.federation.hosting import Hosting, NodeUsers
from fedpriv.federation.inbox import fetched
from fedpriv.federation.messages import query_message
from fedpriv.federation.payment import Draw
from fedpriv.federation.plan import Plan
from fedpriv.privacy.ledger import Ledger
from fedpriv.training.cohort import CohortSum

# Between two looks for what nobody announces: nodes that come, and replies on Flower's own grids,
# which are a call of the SuperLink in a deployment, whose rounds take seconds.
_POLL_SECONDS, _POLL_SECONDS_DEPLOYED = 0.005, 0.05
# Before one says for how many nodes one waits. Those of a federation that is up are there at once.
_PATIENCE = 3.0


class RoundLost(Exception):  # noqa: N818 - not an error: the round is tried again
    """Too few nodes of a deployment took part in a round, with the reason in a few words."""


class Nodes:
    """Speaks with the nodes of a run over a grid.

    Attributes:
        lost: how many were asked in the last round and sent no sum that counts.
        absent: how many nodes of a deployment were not there to be asked.
    """

    def __init__(
        self, plan: Plan, ledger: Ledger, stop: threading.Event, say: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._ledger = ledger
        self._stop = stop
        self._say = say
        self._hosting: Hosting | None = None
        self._asked: dict[int, Asked] = {}
        self._refused: set[int] = set()
        self._told = ""
        self._there = self.lost = self.absent = 0

    def split(
        self, grid: Grid, cohort: np.ndarray, at_home: bool
    ) -> list[tuple[NodeUsers, np.ndarray]]:
        """Return the nodes that are asked in a round, each with its share of the `cohort`.

        Nodes come and go, and are then asked anew whom they host. Those that add a share of the
        noise are asked though they have none of the users. For `at_home` see `Hosting.split`.

        Raises:
            RoundLost: too few nodes of a deployment are there; nobody has been asked.
        """
        known = self._hosting
        if known is None or known.node_ids != set(grid.get_node_ids()):
            self._hosting = known = self._ask_whom_they_host(grid, first=known is None)
        everybody = self._plan.mechanism.asks_all_nodes
        shares = [each for each in known.split(cohort, at_home) if len(each[1]) or everybody]
        self._there = len(known.nodes)
        self.absent = max(0, self._workers - self._there) if self._deployed else 0
        self._require_enough(self._there, "are there")
        self._asked = {node.node_id: Asked(node.partition, len(users)) for node, users in shares}
        return shares

    def ask(self, grid: Grid, messages: Iterable[Message]) -> dict[str, int]:
        """Send messages, and return by the id of each the node that owes a reply.

        A node that has gone since it was looked for owes none, and its message has no id.
        """
        sent = list(messages)
        ids = grid.push_messages(sent)
        self._refused = set()
        return {id_: one.metadata.dst_node_id for id_, one in zip(ids, sent, strict=False) if id_}

    def replies(self, grid: Grid, asked: dict[str, int]) -> list[Message]:
        """Return the replies to what was `asked` that come before the round's timeout."""
        waiting = dict(asked)
        deadline = time.monotonic() + self._plan.config.runtime.round_timeout
        replies: list[Message] = []
        while waiting:
            arrived = self._arrived(grid, waiting)
            replies += arrived
            if not waiting or time.monotonic() > deadline:
                break
            if not arrived:
                self._wait()
        return replies

    def _arrived(self, grid: Grid, waiting: dict[str, int]) -> list[Message]:
        """Return the replies that are there, and take those who sent them off the `waiting`."""
        if not self._deployed:
            replies = list(grid.pull_messages(waiting))
            for reply in replies:
                waiting.pop(reply.metadata.reply_to_message_id, None)
            return replies
        replies, size = [], 8 * sum(self._plan.sizes)
        for message, node in list(waiting.items()):
            try:
                found = fetched(grid, message, node, size)
            except Refused as refused:
                self._refused.add(node)
                self._say(f"node {node} takes no part: {refused}")
            else:
                if not found:
                    continue
                replies += found
            del waiting[message]
        return replies

    def _wait(self) -> None:
        time.sleep(_POLL_SECONDS_DEPLOYED if self._deployed else _POLL_SECONDS)

    def sums(self, replies: Iterable[Message], draw: Draw) -> dict[int, CohortSum]:
        """Return the sums that count, by partition, in the order of partitions.

        Raises:
            InputError, ClientFault: as `_answers`; and in a simulation, whose nodes do not lie,
                where a sum does not count.
            RoundLost: too few sums of a deployment count.
        """
        sizes, mechanism = self._plan.sizes, draw.mechanism
        expected = Expected(
            numbers=sum(sizes),
            blocks=len(self._plan.layout.sizes),
            moves=draw.bounds if mechanism.payer == "silo" else 0,
            largest=lambda users: mechanism.largest_sums(users, sizes),
            seen=not self._deployed,
        )
        found: dict[int, CohortSum] = {}
        arrived = list(replies)
        self._tell_who_is_silent(arrived)
        for reply in self._answers(arrived):
            try:
                partition, summed = self._sum_in(reply, expected)
            except Refused as refused:
                self._leave_out(reply, refused)
                if not self._deployed and reply.metadata.src_node_id in self._asked:
                    raise ClientFault(f"a node sent what no users can make: {refused}") from None
            else:
                found[partition] = summed
                del self._asked[reply.metadata.src_node_id]
        self.lost = len(self._asked)
        self._require_enough(self._there - self.lost, "took part")
        return dict(sorted(found.items()))

    def _sum_in(self, reply: Message, expected: Expected) -> tuple[int, CohortSum]:
        """Return partition and sum of a reply; raises Refused where it does not count."""
        return sum_in(reply, self._asked, expected)

    def _tell_who_is_silent(self, arrived: Sequence[Message]) -> None:
        answered = {reply.metadata.src_node_id for reply in arrived if not unreached(reply)}
        answered |= self._refused
        for node in self._asked:
            if self._deployed and node not in answered:
                self._say(f"node {node} takes no part: nothing of it arrived in time")

    def _require_enough(self, nodes: int, what: str) -> None:
        if self._deployed and nodes < self._least:
            raise RoundLost(
                f"{nodes} of {self._workers} nodes {what}, and by runtime.node_share "
                f"{self._least} make a round"
            )

    @property
    def _least(self) -> int:
        """How many nodes of a deployment make a round."""
        return math.ceil(self._plan.config.runtime.node_share * self._workers)

    @property
    def _workers(self) -> int:
        return self._plan.config.runtime.workers

    def _leave_out(self, reply: Message, why: Refused | str) -> None:
        self._say(f"node {reply.metadata.src_node_id} takes no part: {why}")

    def _ask_whom_they_host(self, grid: Grid, first: bool) -> Hosting:
        """Wait for nodes (at the first time for all of them) and ask each whom it hosts.

        Those of a simulation that add shares of the noise are waited for: too few, and the round
        would cost what it costs for noise alone.

        Raises:
            InputError: they do not come, or those who come host others than this run began with.
            RoundLost: too few of them come again.
        """
        config, data = self._plan.config, self._plan.data
        needed = 0 if self._deployed else self._plan.mechanism.needed
        nodes = self._awaited(grid, first, needed)
        asked = self.ask(grid, [query_message(node, config, data) for node in nodes])
        found = self._hosts(self._answers(self.replies(grid, asked)), nodes)
        if self._deployed and not found:
            raise RoundLost(f"none of {len(nodes)} nodes says whom it hosts")
        if len(found) < max(1, needed):
            if not getattr(grid, "replaces_nodes", False):
                raise WorkerLost("no worker answered")
            return self._ask_whom_they_host(grid, first)
        places = self._plan.sampling.population
        hosting = Hosting.of(found).placed(self._ledger, places, self._say)
        if not hosting.nodes:
            raise InputError("no node is left that hosts the users that this run began with")
        self._tell_who_is_missing(len(hosting.nodes))
        return hosting

    def _tell_who_is_missing(self, there: int) -> None:
        if not self._deployed or there == self._workers:
            self._told = ""
            return
        sentence = (
            f"{there} of {self._workers} nodes take part; the users of the others contribute "
            "nothing until they do"
        )
        if sentence != self._told:
            self._told = sentence
            self._say(sentence)

    def _hosts(self, replies: Iterable[Message], asked: list[int]) -> list[NodeUsers]:
        """Return what nodes say of themselves, without those who contradict what is known.

        A partition belongs to the node that had it first, or that comes with the users whom the
        ledger has for it. Where that is nobody, and two come with one at once, neither takes part;
        nor does who counts the nodes otherwise than the config or, where none counts as that does,
        than most of them.
        """
        found: list[NodeUsers] = []
        waiting = set(asked)
        for reply in replies:
            try:
                found.append(hosting_in(reply, waiting))
            except Refused as refused:
                self._leave_out(reply, refused)
            waiting.discard(reply.metadata.src_node_id)
        if not self._deployed:
            return found
        counts = Counter(node.partitions for node in found)
        # Who says what the config does is believed first: one node alone could tie with another.
        wanted = self._workers
        total = min(counts, key=lambda count: (count != wanted, -counts[count], count), default=0)
        claims: dict[int, list[NodeUsers]] = {}
        for node in found:
            if node.users is None:
                why = "it says that it hosts anybody, and each node has users of its own"
            elif node.partitions != total:
                why = f"it says that there are {node.partitions} nodes, and there are {total}"
            else:
                claims.setdefault(node.partition, []).append(node)
                continue
            self._say(f"node {node.node_id} takes no part: {why}")
        kept = []
        for partition, nodes in claims.items():
            owner = self._owner(partition, nodes)
            kept += [owner] if owner else []
            for node in nodes:
                if node is not owner:
                    why = f"another node has its partition-id {partition} too"
                    self._say(f"node {node.node_id} takes no part: {why}")
        return kept

    def _owner(self, partition: int, claimants: list[NodeUsers]) -> NodeUsers | None:
        """Return whose a partition is, of those who claim it; None where nobody can say."""
        before = self._hosting.nodes if self._hosting else ()
        known = {node.partition: node.node_id for node in before}.get(partition)
        place = self._ledger.places.get(partition)
        by_id = [node for node in claimants if node.node_id == known]
        by_users = [node for node in claimants if place and node.ids == place.ids]
        for found in (claimants, by_id, by_users):
            if len(found) == 1:
                return found[0]
        return None

    def _awaited(self, grid: Grid, first: bool, needed: int) -> list[int]:
        """Return the ids of the nodes, once enough of them are there.

        A run begins with all of them. One that goes on waits for all, and takes what makes a round.
        """
        runtime, begun = self._plan.config.runtime, bool(self._ledger.places)
        if self._deployed:
            wanted = runtime.workers if first else max(1, self._least)
            seconds, least = runtime.join_timeout, max(1, self._least) if begun else wanted
        else:
            least = wanted = runtime.workers if first or needed else 1
            seconds = runtime.round_timeout
        began, told = time.monotonic(), -1
        while len(nodes := list(grid.get_node_ids())) < wanted:
            waited = time.monotonic() - began
            if self._stop.is_set():
                raise Interrupted("stopped while waiting for nodes")
            if waited > seconds:
                if len(nodes) >= least:
                    break
                if self._deployed and begun:
                    raise RoundLost(f"{len(nodes)} of {runtime.workers} nodes are there")
                raise InputError(
                    f"only {len(nodes)} of {wanted} nodes (runtime.workers) came within "
                    f"{seconds:g} s; start the others, or write how many there are"
                )
            if waited > _PATIENCE and len(nodes) != told:
                told = len(nodes)
                self._say(self._waiting(told, wanted, least, seconds - waited))
            self._wait()
        return nodes

    def _waiting(self, there: int, wanted: int, least: int, seconds: float) -> str:
        """Say for how many nodes one waits, for how long, and what then."""
        key = "join_timeout" if self._deployed else "round_timeout"
        then = f"; after that {least} make a round" if least < wanted else ""
        return (
            f"waiting for nodes: {there} of {wanted} are there; start the others within "
            f"{seconds:.0f} s (runtime.{key}){then}"
        )

    def _answers(self, replies: Iterable[Message]) -> list[Message]:
        """Return the replies of nodes that did their work; the dead ones are left out.

        Raises:
            InputError: a node of a simulation reported that the user's input is wrong. In a
                deployment the operator is told, and the others go on.
            ClientFault: the client code of a simulation itself raised. In a deployment that node
                is lost.
        """
        good, crashed = [], []
        for reply in replies:
            if (reason := reason_in(reply)) is not None:
                if not self._deployed:
                    raise InputError(reason)
                self._leave_out(reply, reason)
            elif not reply.has_error():
                good.append(reply)
            elif reply.error.code in CLIENT_CODE_RAISED:
                crashed.append(reply)
        if crashed and not self._deployed:
            raise ClientFault(crashed[0].error.reason)
        for reply in crashed:
            self._leave_out(reply, "its code raised; its own log says why")
        return good

    @property
    def _deployed(self) -> bool:
        return self._plan.config.runtime.deployment
