"""What our grids have in common, and the two private parts of Flower that its public grid needs.

Whoever makes a message needs the identity of a task in its process, and whoever keeps messages
gives them their ids. Flower's runtime does both for its own grids, and this file does for ours.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

#: The node of partition p has the id FIRST_NODE + p.
FIRST_NODE = 1000

#: What answers a node's messages.
Node = Callable[[Message], Message]
#: Makes the node of a partition out of so many: `node(partition, partitions)`.
NodeFactory = Callable[[int, int], Node]


class OwnGrid(Grid):
    """A grid that needs nothing of Flower's runtime.

    A node has one message at a time: when it is asked anew, what it still owes is dropped.
    """

    #: Whether a node that died comes back. Those of Flower's own grids do not.
    replaces_nodes = True
    #: Whether the nodes are simulated: see `fedpriv.federation.simulated`.
    simulated = True

    def __init__(self) -> None:
        self._run: Any = None
        identify()

    def set_run(self, run: Any) -> None:
        """Keep what Flower knows of the run, for whoever asks."""
        self._run = run

    @property
    def run(self) -> Any:
        """What `set_run` was given."""
        if self._run is None:
            raise RuntimeError("this grid belongs to no run of Flower's runtime")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return the replies that come before the timeout."""
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            arrived = self.pull_messages(waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies

    @abstractmethod
    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes that can be asked."""

    @abstractmethod
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, at most one a node, and return their ids."""

    @abstractmethod
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Wait for a moment for replies, and return those that are there.

        Raises:
            ClientFault: a node's code raised, with what it said.
        """


def identify() -> None:
    """Let this process make messages, where Flower's runtime has not done so already."""
    try:
        TaskIdentity.run_id  # noqa: B018 - raises where nobody has set it
    except RuntimeError:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def give_id(message: Message) -> str:
    """Give `message` an id of its own, by which its reply will name it, and return that."""
    name = str(uuid4())
    message.metadata.__dict__["_message_id"] = name
    return name


def told(error: BaseException) -> str:
    """Return what an exception of a node's code says."""
    return f"a node's code raised {type(error).__name__}: {error}"
