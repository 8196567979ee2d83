"""A node that lies: another lie in each round, told over the network with a node's own key.

It stands where an honest node has fedpriv's app. LIES names them in the order of rounds.
"""

import json
import os
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpriv.federation.client_app import app as honest

app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Say the truth: whom it hosts decides who is asked."""
    return honest(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Tell this round's lie."""
    round_ = message.content["config"]["round"]
    told = os.environ["LIES"].split()
    lie = told[round_ - 1] if round_ <= len(told) else "none"
    reply = honest(message, context)
    if lie == "none":
        return reply
    return globals()[f"lie_{lie}"](message, reply)


def replied(message: Message, reply: Message, numbers: np.ndarray, **seen: object) -> Message:
    told = ConfigRecord({**dict(reply.content["seen"].items()), **seen})
    arrays = ArrayRecord({"flat": Array(numbers)})
    return Message(RecordDict({"sum": arrays, "seen": told}), reply_to=message)


def numbers_of(reply: Message) -> np.ndarray:
    return reply.content["sum"]["flat"].numpy()


def lie_huge(message: Message, reply: Message) -> Message:
    """A sum of a million times the norm that its users can have."""
    return replied(message, reply, numbers_of(reply) * 1e6 + 1.0)


def lie_nan(message: Message, reply: Message) -> Message:
    """A sum that is not finite."""
    numbers = numbers_of(reply).copy()
    numbers[0] = np.nan
    return replied(message, reply, numbers)


def lie_shape(message: Message, reply: Message) -> Message:
    """One number too many."""
    return replied(message, reply, np.append(numbers_of(reply), 0.0))


def lie_type(message: Message, reply: Message) -> Message:
    """The right numbers in float32."""
    return replied(message, reply, numbers_of(reply).astype(np.float32))


def lie_partition(message: Message, reply: Message) -> Message:
    """The sum of somebody else."""
    return replied(message, reply, numbers_of(reply), partition=0)


def lie_object(message: Message, reply: Message) -> Message:
    """Bytes that a careless reader would unpickle."""
    pickled = b"cos\nsystem\n(S'touch /tmp/lied'\ntR."
    array = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=pickled)
    content = {"sum": ArrayRecord({"flat": array}), "seen": reply.content["seen"]}
    return Message(RecordDict(content), reply_to=message)


class Forged(Array):
    """An array whose own account of itself is another one; its name among objects stays Array's."""

    account: dict[str, object]

    def deflate(self) -> bytes:
        """Return what Flower sends of an array, with another account."""
        head, body = super().deflate().split(b"\0", 1)
        said = json.dumps({**json.loads(body), **self.account}).encode()
        return b"Array " + head.split(b" ")[1] + b" %d\0" % len(said) + said


def forged(message: Message, reply: Message, **account: object) -> Message:
    array = Forged(numbers_of(reply))
    array.account = account
    content = RecordDict({"sum": ArrayRecord(), "seen": reply.content["seen"]})
    content["sum"]["flat"] = array
    return Message(content, reply_to=message)


def lie_garbled(message: Message, reply: Message) -> Message:
    """Bytes that Flower cannot make an object of."""
    return forged(message, reply, arraychunk_ids="none")


def lie_endless(message: Message, reply: Message) -> Message:
    """A piece of which it says, in few bytes, that it comes two million times."""
    return forged(message, reply, arraychunk_ids=[0] * 2_000_000)


def lie_users(message: Message, reply: Message) -> Message:
    """More users than were asked, and so a larger bound."""
    return replied(message, reply, numbers_of(reply) * 3, users=10_000)


def lie_flood(message: Message, reply: Message) -> Message:
    """500 MB of random numbers."""
    return replied(message, reply, np.random.default_rng().normal(size=62_500_000))


def lie_crash(message: Message, reply: Message) -> Message:
    """A failure with a text that would fill the operator's screen."""
    raise RuntimeError("look at me\n" * 10_000)


def lie_late(message: Message, reply: Message) -> Message:
    """An answer that comes when the round is over."""
    time.sleep(90)
    return reply
