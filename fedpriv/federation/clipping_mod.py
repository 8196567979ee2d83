"""A mod for the client of somebody's own Flower app: nothing leaves but its clipped update.

It is imported by every client process, for each message: nothing of it needs a model or a config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedpriv.errors import InputError
from fedpriv.privacy.clipping import ClippingRule, GlobalClipping, PerLayerClipping, clip_and_add

#: The record of a message that says how an update is bounded.
ASKED = "fedpriv"


def asked_record(rule: ClippingRule, place: int) -> ConfigRecord:
    """Return what a node is told: by which rule it clips, and the place by which it answers."""
    asked = ConfigRecord({"place": place, "bound": rule.bound})
    if isinstance(rule, PerLayerClipping):
        asked["block_bounds"] = list(rule.block_bounds)
        asked["normalize"] = rule.normalize
    return asked


def clipping_mod(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Answer with the clipped update of what the app's own train function returns.

        app = ClientApp(mods=[clipping_mod])

    The update is start minus end, all arrays as one or each to its share of the bound, in exact
    terms; one with a NaN or infinity counts as zero. Metrics and numbers of examples stay on the
    node: they are private, and no noise covers them. So it comes first of all mods.

    Raises:
        InputError: the message is not from a `PrivateStrategy`, or the answer is not the arrays
            that came, each with its shape.
    """
    asked = message.content.get(ASKED)
    if not isinstance(asked, ConfigRecord):
        raise InputError(
            f"clipping_mod: a {message.metadata.message_type} message that is not of "
            "fedpriv.flower.PrivateStrategy is not answered, since nothing would protect what "
            "leaves this node; wrap the server's strategy in it, or remove the mod"
        )
    content = {name: record for name, record in message.content.items() if name != ASKED}
    message.content = RecordDict(content)
    start = _arrays(message.content, "the message")
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    total = _clipped(start, _arrays(reply.content, "the answer"), _rule(asked))
    answer = RecordDict({"sum": ArrayRecord({"flat": Array(total.numpy())})})
    answer["seen"] = ConfigRecord({"partition": asked["place"]})
    return Message(answer, reply_to=message)


def _rule(asked: ConfigRecord) -> ClippingRule:
    bound = cast(float, asked["bound"])
    if "block_bounds" not in asked:
        return GlobalClipping(bound)
    bounds = tuple(cast(list[float], asked["block_bounds"]))
    return PerLayerClipping(bound, bounds, cast(bool, asked["normalize"]))


def _arrays(content: RecordDict, whose: str) -> ArrayRecord:
    records = list(content.array_records.values())
    if len(records) != 1:
        raise InputError(f"clipping_mod: {whose} has {len(records)} ArrayRecords, and must have 1")
    return records[0]


def _clipped(start: ArrayRecord, end: ArrayRecord, rule: ClippingRule) -> torch.Tensor:
    """Return start minus end within the bound: float64 `[numbers]`, array after array."""
    if start.keys() != end.keys():
        raise InputError("clipping_mod: the answer has other arrays than the message")
    blocks = []
    for name, array in start.items():
        before, after = (torch.from_numpy(each.numpy().copy()) for each in (array, end[name]))
        if before.shape != after.shape or not after.is_floating_point():
            raise InputError(
                f"clipping_mod: {name} came as {before.dtype} {list(before.shape)} and goes back "
                f"as {after.dtype} {list(after.shape)}"
            )
        update = before - after
        blocks.append(update.to(max(update.dtype, torch.float32, key=lambda d: d.itemsize)))
    total = torch.zeros(sum(block.numel() for block in blocks), dtype=torch.float64)
    clip_and_add([block.reshape(1, block.numel()) for block in blocks], rule, total)
    return total
