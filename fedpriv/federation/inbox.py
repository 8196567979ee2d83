"""What comes back from the nodes of a deployment, before anything of it is looked at.

A node chooses each byte of its reply, and Flower makes objects of them before anybody here sees
one: that may raise anything, and take any memory, since few bytes can say that a piece comes a
million times. A reply's own account of who sent it, and what it answers, comes out of these bytes
too. So replies are fetched one by one, in as much memory as an honest one takes, and each is held
against whom was asked.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid

from fedpriv.federation.gate import Refused, unreached

# While a reply is made of its pieces there are several copies of it, beside the threads that fetch.
_COPIES, _BESIDE = 8, 512 * 2**20
_MEMORY = Path("/proc/self/statm")


def fetched(grid: Grid, message: str, node: int, size: int) -> list[Message]:
    """Return the reply of a node to the message with this id, where it is there.

    `size` is that of an honest reply in bytes.

    Raises:
        Refused: it cannot be read, or is not what was asked of that node.
    """
    try:
        with _at_most(_COPIES * size + _BESIDE):
            arrived = list(grid.pull_messages([message]))
        meant = [_answers(reply, message, node) for reply in arrived]
    except Exception as error:
        grid.get_node_ids()  # raises, too, where not the reply but the link is at fault
        raise Refused(f"what it sent cannot be read ({type(error).__name__})") from None
    if not all(meant):
        raise Refused("it answers in another's name, or what it was not asked")
    return arrived


def _answers(reply: Message, message: str, node: int) -> bool:
    """Say whether a reply is that of the node; Flower's word that there is none is its own."""
    if unreached(reply):
        return True
    about = reply.metadata
    return about.src_node_id == node and about.reply_to_message_id == message


@contextmanager
def _at_most(size: int) -> Iterator[None]:
    """Let this process take so many bytes of memory more than it has, where Linux counts them.

    Whoever asks for more gets a MemoryError, and not the machine's end of all processes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        there = int(_MEMORY.read_text().split()[5]) * resource.getpagesize()
    except OSError:
        yield
        return
    limits = [there + size, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
