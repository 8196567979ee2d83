"""Nodes in this process: for debugging, notebooks, tests, audits and small studies."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message

from fedpriv.errors import ClientFault, FedprivError
from fedpriv.federation.client_app import client_node
from fedpriv.federation.grids.base import FIRST_NODE, NodeFactory, OwnGrid, give_id, told
from fedpriv.threads import threads_of_torch


class LocalGrid(OwnGrid):
    """Nodes answer one after another, when somebody pulls their answers."""

    def __init__(
        self, nodes: int, node: NodeFactory = client_node, threads: int | None = None
    ) -> None:
        """Make the nodes; Torch has `threads` threads while they answer, None for those it has."""
        super().__init__()
        self._nodes = {FIRST_NODE + number: node(number, nodes) for number in range(nodes)}
        self._threads = threads
        self._asked: dict[int, Message] = {}

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep the messages until their answers are pulled, and return their ids."""
        messages = list(messages)
        self._asked |= {message.metadata.dst_node_id: message for message in messages}
        return [give_id(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the nodes answer and return the answers.

        Raises:
            ClientFault: a node's code raised; the exception is its cause.
        """
        wanted = set(message_ids)
        asked = [one for one in self._asked.values() if one.metadata.message_id in wanted]
        for message in asked:
            del self._asked[message.metadata.dst_node_id]
        with threads_of_torch(self._threads):
            return [self.answer(message) for message in asked]

    def answer(self, message: Message) -> Message:
        """Return a node's answer."""
        try:
            return self._nodes[message.metadata.dst_node_id](message)
        except FedprivError:
            raise
        except Exception as error:
            raise ClientFault(told(error)) from error
