"""Flower's runtime looks for messages when they are sent, not only every tenth of a second."""

import threading
from queue import Queue

from flwr.server.superlink.fleet.vce import vce_api

from fedpriv.federation.simulation import (
    _announced,
    _announcing,
    _delivered_at_once,
    _Until,
)


class State:
    """One message for node 7, once it has been sent."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def get_message_ins(self, node_id: int, limit: int) -> list[str]:
        assert (node_id, limit) == (7, 1)
        found, self.messages = self.messages[:1], self.messages[1:]
        return found


class Grid:
    def __init__(self, state: State) -> None:
        self.state = state

    def push_messages(self, messages):
        self.state.messages += messages
        return [f"id of {message}" for message in messages]


def test_a_wait_ends_with_a_message_and_not_only_with_the_stop():
    sent, stop = threading.Event(), threading.Event()
    until = _Until(sent, stop)
    sent.set()
    assert until.wait(1e9) is False  # at once, and the stop has not been asked for
    assert not sent.is_set()
    assert until.wait(0.0) is False
    stop.set()
    assert until.is_set()
    assert until.wait(0.0) is True


def test_flowers_own_loop_delivers_what_was_announced():
    sent, stop, state, queue = threading.Event(), threading.Event(), State(), Queue()
    original = vce_api.add_messages_to_queue
    with _delivered_at_once(sent):
        assert vce_api.add_messages_to_queue is not original
        loop = threading.Thread(
            target=vce_api.add_messages_to_queue, args=(state, queue, {7: 0}, stop)
        )
        loop.start()
        grid = _announcing(Grid(state), sent)
        for message in ("one", "two"):
            assert list(grid.push_messages([message])) == [f"id of {message}"]
            assert queue.get(timeout=20) == message
        stop.set()
        loop.join(timeout=20)
        assert not loop.is_alive()
    assert vce_api.add_messages_to_queue is original


def test_a_stored_reply_is_announced():
    arrived, stop, queue, stored = threading.Event(), threading.Event(), Queue(), []

    class Store:
        def store_message_res(self, message):
            assert not arrived.is_set()  # else it would be looked for before it is there
            stored.append(message)

    original = vce_api.put_message_into_state
    with _announced(arrived):
        loop = threading.Thread(target=vce_api.put_message_into_state, args=(Store(), queue, stop))
        loop.start()
        queue.put("reply")
        assert arrived.wait(timeout=20)
        assert stored == ["reply"]
        stop.set()
        loop.join(timeout=20)
        assert not loop.is_alive()
    assert vce_api.put_message_into_state is original
