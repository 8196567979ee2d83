"""What travels between server and nodes: one message a node and round, one reply.

Parameters and sums travel as one flat array; names and shapes are known on both sides.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedpriv import __version__
from fedpriv.components import LookUp
from fedpriv.config import ExperimentConfig
from fedpriv.config_files import parse_config
from fedpriv.errors import InputError
from fedpriv.training.cohort import CohortSum
from fedpriv.training.memory_store import Journal
from fedpriv.training.spans import Span

_FLAT = "flat"
# What two ends may have in different versions: sums then round differently, or messages differ.
_LIBRARIES = ("torch", "numpy", "flwr")
_OWN = "version of fedpriv"
# Letters of what one end says to the other's operator.
_LONGEST_SENTENCE = 500
# Fields of a cohort's sum that do not travel under their own name.
_APART = ("total", "spans")


class FlatArray(Array):
    """An array of Flower's that stays an array, and becomes bytes where Flower's own grids send it.

    In one process it is handed on as it is, and Ray moves it through memory that is shared.
    """

    def __init__(self, flat: NDArray[Any]) -> None:
        self.flat = flat
        self.dtype, self.shape, self.stype = str(flat.dtype), flat.shape, "numpy.ndarray"

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array as Flower writes one."""
        return Array(self.flat).data

    def numpy(self) -> NDArray[Any]:
        """Return the array; nobody writes to it."""
        return self.flat

    def deflate(self) -> bytes:
        """Return what Flower sends, under the name of its own class."""
        return Array(self.flat).deflate()


def flat_record(flat: Tensor, dtype: torch.dtype | None = None) -> ArrayRecord:
    """Return the vector as a record with one array, in `dtype` where that is given."""
    sent = flat.detach().cpu().to(dtype)
    if dtype == torch.bfloat16:  # which NumPy does not know
        sent = sent.view(torch.int16)
    return ArrayRecord({_FLAT: FlatArray(sent.numpy())})


def flat_tensor(record: ArrayRecord) -> Tensor:
    """Return the vector of a record made by `flat_record`; bfloat16 comes back as float32.

    It may lie in memory that others read: nobody writes to it.
    """
    received = read_only(record[_FLAT].numpy())
    return received.view(torch.bfloat16).float() if received.dtype == torch.int16 else received


def read_only(numbers: NDArray[Any]) -> Tensor:
    """Return the numbers as a tensor that nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(numbers)


def one_line(text: str) -> str:
    """Return what the other end had a part in as one short line, which moves no cursor in a log."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST_SENTENCE])


def query_message(node_id: int, config: ExperimentConfig, data: str = "") -> Message:
    """Return the message that asks a node which users it hosts; for `data` see `Work`."""
    asked = ConfigRecord({"experiment": _for_nodes(config), "data": data, **_versions()})
    return Message(RecordDict({"config": asked}), node_id, MessageType.QUERY)


def _for_nodes(config: ExperimentConfig) -> str:
    """Return what nodes are told of the config: the tracker is the server's own."""
    return config.model_dump_json(exclude={"tracker"})


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    return {f"version of {name}": version(name) for name in _LIBRARIES} | {_OWN: __version__}


def other_versions(message: Message) -> dict[str, tuple[str, str]]:
    """Return what the sender of a query has in another version: the one here, and the sender's.

    Raises:
        InputError: that is fedpriv itself, whose messages other versions may understand otherwise.
    """
    said = _config(message)
    found = {
        key.removeprefix("version of "): (here, f"{said[key]!s:.30}")
        for key, here in _versions().items()
        if key in said and said[key] != here
    }
    if "fedpriv" in found:
        here, there = found["fedpriv"]
        raise InputError(f"fedpriv is {here} at this node and {there} at the server; install one")
    return found


@dataclass(frozen=True)
class Work:
    """What a node is asked to do in a round.

    Attributes:
        round: the round.
        users: user numbers, in the node's own numbering.
        bounds: the clip bounds of the round where they adapt; empty where the config fixes them.
        parameters: the flat parameters `[total]` to start from.
        memories: the folder of the users' memories; None where they keep none.
        journal: where the node writes what its users will keep.
        own_noise: what silos, nodes or users need to add noise of their own; None where the
            server adds it.
        data: the digest of the users' data, from which noise of a simulation derives; "" in a
            deployment.
    """

    round: int
    users: list[int]
    bounds: list[float]
    parameters: Tensor
    memories: Path | None
    journal: Journal | None
    own_noise: OwnNoise | None
    data: str = ""


class OwnNoise(NamedTuple):
    """What is needed besides the config to add noise where users are trained.

    Attributes:
        attempt: which draw of samples and noise the round uses.
        noise_multiplier: z, of silos that of each step, as the server accounts for it.
    """

    attempt: int
    noise_multiplier: float


def train_message(
    node_id: int,
    config: ExperimentConfig,
    arrays: ArrayRecord,
    round_: int,
    users: np.ndarray,
    bounds: Sequence[float],
    memories: tuple[Path, Journal] | None = None,
    own_noise: OwnNoise | None = None,
    data: str = "",
) -> Message:
    """Return the message that carries a node's `Work`."""
    work: dict[str, Any] = {
        "experiment": _for_nodes(config),
        "round": round_,
        "users": users.tolist(),
        "bounds": list(bounds),
        "data": data,
    }
    if memories is not None:
        work |= {"memories": str(memories[0]), "journal": list(memories[1])}
    if own_noise is not None:
        work |= own_noise._asdict()
    return Message(
        RecordDict({"arrays": arrays, "config": ConfigRecord(work)}),
        node_id,
        MessageType.TRAIN,
        group_id=str(round_),
    )


def experiment_of(message: Message, allowed: frozenset[str]) -> ExperimentConfig:
    """Return the experiment that a message belongs to.

    Of the components that it names, none from outside is imported that is not `allowed` here.

    Raises:
        InputError: one that is not, a config that this version does not know, or no config at all.
    """
    return _parsed(_text(message, "experiment"), allowed)


def data_of(message: Message) -> str:
    """Return the digest of the users' data that a message is about: see `Work`."""
    return _text(message, "data")


# The same in every message of a run.
@lru_cache(maxsize=1)
def _parsed(experiment: str, allowed: frozenset[str]) -> ExperimentConfig:
    try:
        document = json.loads(experiment)
        at_home = any(text.startswith("~") for text in _texts(document))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise InputError("the message's experiment is no config")
    if at_home:  # whoever expanded it would say whether this machine has such a user
        raise InputError("the message's experiment has a path that begins with ~; write it in full")
    return parse_config(document, LookUp(allowed=allowed))


def _texts(document: Any) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict | list):
        for inner in document.values() if isinstance(document, dict) else document:
            yield from _texts(inner)


def work_of(message: Message) -> Work:
    """Return what a train message asks for."""
    config: Any = _config(message)
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    return Work(
        round=config["round"],
        users=config["users"],
        bounds=config["bounds"],
        parameters=flat_tensor(arrays),
        memories=Path(config["memories"]) if "memories" in config else None,
        journal=Journal(*config["journal"]) if "journal" in config else None,
        own_noise=OwnNoise(config["attempt"], config["noise_multiplier"])
        if "attempt" in config
        else None,
        data=data_of(message),
    )


def hosting_reply(
    message: Message, partition: int, partitions: int, users: int | None, ids: str = ""
) -> Message:
    """Return a node's answer to a query: its number of how many, and whom it hosts.

    That is how many users, -1 for any, and a digest of their ids, which themselves stay there.
    """
    hosted = -1 if users is None else users
    answer = ConfigRecord(
        {"partition": partition, "partitions": partitions, "users": hosted, "ids": ids}
    )
    return Message(RecordDict({"hosting": answer}), reply_to=message)


def sum_reply(message: Message, partition: int, summed: CohortSum) -> Message:
    """Return a node's answer to a train message."""
    seen = {f.name: getattr(summed, f.name) for f in fields(summed) if f.name not in _APART}
    for field in fields(Span):
        seen[f"span_{field.name}s"] = [getattr(span, field.name) for span in summed.spans]
    content = RecordDict(
        {
            "sum": flat_record(summed.total),
            "seen": ConfigRecord({"partition": partition, **seen}),
        }
    )
    return Message(content, reply_to=message)


def failure_reply(message: Message, reason: str) -> Message:
    """Return a node's answer when the user's input is at fault, not the node."""
    return Message(RecordDict({"failure": ConfigRecord({"reason": reason})}), reply_to=message)


def _text(message: Message, key: str) -> str:
    found = _config(message).get(key)
    if not isinstance(found, str):
        raise InputError(f"the message holds no {key}")
    return found


def _config(message: Message) -> ConfigRecord:
    config = message.content.get("config")
    if not isinstance(config, ConfigRecord):
        raise InputError("the message holds no config")
    return config
