"""Somebody's own strategy of Flower as the server of a run: it sees one reply, the noisy mean.

Whatever a strategy makes of that is post-processing. What it is not asked for, or would not get, is
refused with the reason, so that nobody believes a setting to be obeyed that is not.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Strategy,
)
from torch import Tensor

from fedpriv.errors import InputError
from fedpriv.models.parameters import Layout

# Those whose `aggregate_train` is a function of the weighted mean of replies alone.
_OF_THE_MEAN = {each.aggregate_train for each in (FedAvg, FedAvgM, FedProx)} | {
    each.aggregate_train for each in (FedAdagrad, FedAdam, FedYogi)
}
_ROBUST = "compares the replies of single clients, and none is seen: their noisy mean is"
_NOISY = "clips and adds noise itself, which PrivateStrategy does; hand over what it wraps"
_TREES = "puts clients' trees together, of which there is no mean"
_REFUSED = {
    "Bulyan": _ROBUST,
    "DifferentialPrivacyClientSideAdaptiveClipping": _NOISY,
    "DifferentialPrivacyClientSideFixedClipping": _NOISY,
    "DifferentialPrivacyServerSideAdaptiveClipping": _NOISY,
    "DifferentialPrivacyServerSideFixedClipping": _NOISY,
    "FedMedian": _ROBUST,
    "FedTrimmedAvg": _ROBUST,
    "FedXgbBagging": _TREES,
    "FedXgbCyclic": _TREES,
    "Krum": _ROBUST,
    "MultiKrum": _ROBUST,
    "QFedAvg": "weights clients by their losses, which are private and have no bound",
}
# What Flower's strategies say of their own sampling, by default.
_OWN_SAMPLING = {"min_train_nodes": 2, "weighted_by_key": "num-examples"}
_METRICS = ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn")
_PARAMETER, _STATE = "parameter/", "strategy"
_PLAIN = int | float | str | bool | bytes | None


def check_strategy(strategy: Strategy, fraction: float, mean_only: bool) -> None:
    """Check that `strategy` can do its part with the noisy mean of all replies.

    `fraction` is the expected share of users in a round; `mean_only` that whoever wrote it says so.

    Raises:
        InputError: it cannot, or says otherwise of who is asked and how much each counts.
    """
    kind = type(strategy)
    for each in kind.__mro__:
        if (reason := _REFUSED.get(each.__name__)) is not None:
            raise InputError(f"strategy: {kind.__name__} {reason}; write FedAvg or FedAdam, say")
    if kind.start is not Strategy.start:
        raise InputError(
            f"strategy: {kind.__name__} has a start of its own, which is not run: PrivateStrategy "
            "runs the rounds; override configure_train or aggregate_train instead"
        )
    if kind.aggregate_train not in _OF_THE_MEAN and not mean_only:
        raise InputError(
            f"strategy: what {kind.__name__} makes of replies is not known, and it gets one, the "
            "noisy mean with a weight of 1, whoever was drawn; write mean_only=True if that will do"
        )
    _check_settings(strategy, fraction)


def _check_settings(strategy: Strategy, fraction: float) -> None:
    share = getattr(strategy, "fraction_train", 1.0)
    if share != 1.0 and not math.isclose(share, fraction):
        raise InputError(
            f"strategy: fraction_train={share:g} is not what is drawn, which is expected_cohort / "
            f"population = {fraction:g} of the nodes; leave it out"
        )
    for name, default in _OWN_SAMPLING.items():
        if (found := getattr(strategy, name, default)) != default:
            why = {
                "min_train_nodes": "how many nodes a round has is decided by the coins that "
                "amplify privacy",
                "weighted_by_key": "every user counts alike, since a weight that is private, such "
                "as a number of examples, has no bound",
            }[name]
            raise InputError(f"strategy: {name}={found!r} is not obeyed: {why}; leave it out")
    if not isinstance(strategy, FedAvg):
        return
    plain = FedAvg()
    for name in _METRICS:
        if getattr(strategy, name) is not getattr(plain, name):
            raise InputError(
                f"strategy: {name} would put together what clients measure, which is private and "
                "stays on their nodes; leave it out, and measure on public data by evaluate_fn"
            )


def settings_of(strategy: Strategy) -> dict[str, Any]:
    """Return the plain settings of a strategy, which are a part of a run's identity."""
    return {
        name: value
        for name, value in vars(strategy).items()
        if isinstance(value, int | float | str | bool | None) and not name.startswith("_")
    }


class StrategyServer:
    """The global model of an app, moved by the app's own strategy: a `GlobalModel`."""

    def __init__(self, strategy: Strategy, start: ArrayRecord) -> None:
        """Begin with the arrays `start`.

        Raises:
            InputError: one of them is not made of floating-point numbers.
        """
        for name, array in start.items():
            if not np.issubdtype(array.numpy().dtype, np.floating):
                raise InputError(
                    f"initial_arrays: {name} is {array.dtype}, of which no mean with noise can be "
                    "made; leave it out, and write GroupNorm in the place of BatchNorm"
                )
        self.strategy = strategy
        self.layout = _layout(start)
        self.shared = torch.zeros(0, self.layout.total)
        self.arrays = ArrayRecord(dict(start))
        self._begun_with = dict(vars(strategy))
        self._asked: Message | None = None

    @property
    def digest_parts(self) -> Iterable[bytes]:
        """What tells its numbers from others."""
        for name, array in self.arrays.items():
            yield name.encode()
            yield np.ascontiguousarray(array.numpy()).tobytes()

    def configure(self, round_: int, config: ConfigRecord) -> Message:
        """Return what the strategy would send to each of the nodes in a round.

        Raises:
            InputError: that is nothing, differs between nodes, or is not the model.
        """
        messages = list(
            self.strategy.configure_train(round_, self.arrays, config, _AnyNodes(self.strategy))
        )
        name = type(self.strategy).__name__
        if not messages:
            raise InputError(f"strategy: {name} asks no node to train in round {round_}")
        first = messages[0]
        if any(m.content is not first.content and m.content != first.content for m in messages):
            raise InputError(f"strategy: {name} sends different things to different nodes")
        records = list(first.content.array_records.values())
        if len(records) != 1 or _layout(records[0]) != self.layout:
            raise InputError(f"strategy: {name} sends other arrays than initial_arrays")
        self._asked = first
        return first

    def parameters(self) -> Tensor:
        """Return the global model as one vector `[total]`."""
        arrays = (torch.from_numpy(array.numpy().copy()) for array in self.arrays.values())
        return torch.cat([array.flatten() for array in arrays])

    def lr(self, round_: int) -> float:
        """Return the strategy's learning rate, where it has one."""
        of_its_own = getattr(self.strategy, "server_learning_rate", 1.0)
        return float(getattr(self.strategy, "eta", of_its_own))

    def step(self, average: Tensor, round_: int, seed: int, noise: Sequence[float] = ()) -> None:
        """Hand the strategy the one reply: what nodes were sent, less the noisy mean `[total]`.

        Raises:
            InputError: it makes no model of that.
        """
        assert self._asked is not None
        key, sent = next(iter(self._asked.content.array_records.items()))
        moves = self.layout.split(average)
        moved = {
            name: Array(array.numpy() - moves[name].numpy().astype(array.numpy().dtype))
            for name, array in sent.items()
        }
        weight = getattr(self.strategy, "weighted_by_key", "num-examples")
        mean = RecordDict({key: ArrayRecord(moved)})
        mean["metrics"] = MetricRecord({weight: 1.0})
        reply = Message(mean, reply_to=self._asked)
        arrays, _ = self.strategy.aggregate_train(round_, [reply])
        if arrays is None or _layout(arrays) != self.layout:
            name = type(self.strategy).__name__
            raise InputError(f"strategy: {name} made no model of the noisy mean")
        self.arrays = arrays

    def require_finite(self, round_: int) -> None:
        """Check what the step of a round has left.

        Raises:
            InputError: the model has numbers that are not finite.
        """
        name = type(self.strategy).__name__
        if not all(np.isfinite(array.numpy()).all() for array in self.arrays.values()):
            raise InputError(
                f"strategy: {name} left numbers in the model that are not finite in round "
                f"{round_}; start another run with smaller steps"
            )

    def state(self) -> dict[str, Tensor]:
        """Return the model, and what the strategy keeps, as tensors by name.

        Raises:
            InputError: it keeps something that cannot be written to a file.
        """
        kept = {
            name: _written(name, value)
            for name, value in vars(self.strategy).items()
            if value is not self._begun_with.get(name) or _is_data(value)
        }
        buffer = io.BytesIO()
        torch.save(kept, buffer)
        packed = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        parameters = {
            _PARAMETER + name: torch.from_numpy(array.numpy().copy())
            for name, array in self.arrays.items()
        }
        return {**parameters, _STATE: packed}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned.

        Raises:
            InputError: the state is that of another model.
        """
        try:
            packed = io.BytesIO(tensors[_STATE].numpy().tobytes())
            kept = torch.load(packed, weights_only=True)
            arrays = {name: Array(tensors[_PARAMETER + name].numpy()) for name in self.layout.names}
        except (KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(f"the checkpoint does not fit the app ({error})") from None
        if _layout(restored := ArrayRecord(arrays)) != self.layout:
            raise InputError("the checkpoint does not fit the app's arrays")
        self.arrays = restored
        for name, value in kept.items():
            setattr(self.strategy, name, _read(value))


def _layout(record: ArrayRecord) -> Layout:
    return Layout(tuple(record), tuple(torch.Size(array.shape) for array in record.values()))


def _is_data(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic | ArrayRecord | _PLAIN):
        return True
    if isinstance(value, dict | list | tuple):
        return all(map(_is_data, value.values() if isinstance(value, dict) else value))
    return False


def _written(name: str, value: Any) -> Any:
    """Return data that `torch.load` reads without running anything."""
    if isinstance(value, ArrayRecord):
        inner = {key: torch.from_numpy(array.numpy().copy()) for key, array in value.items()}
        return ("record", inner)
    if isinstance(value, np.ndarray | np.generic):
        return ("array", torch.from_numpy(np.array(value)))
    if isinstance(value, dict):
        return ("dict", {key: _written(name, inner) for key, inner in value.items()})
    if isinstance(value, list | tuple):
        return (type(value).__name__, [_written(name, inner) for inner in value])
    if isinstance(value, _PLAIN):
        return ("plain", value)
    raise InputError(
        f"strategy: it keeps a {type(value).__name__} in {name}, which no file can hold for a run "
        "that goes on; keep numbers, arrays, or lists and dicts of them"
    )


def _read(written: Any) -> Any:
    kind, value = written
    if kind == "record":
        return ArrayRecord({key: Array(inner.numpy()) for key, inner in value.items()})
    if kind == "array":
        return value.numpy()
    if kind == "dict":
        return {key: _read(inner) for key, inner in value.items()}
    if kind == "plain":
        return value
    items = [_read(inner) for inner in value]
    return tuple(items) if kind == "tuple" else items


class _AnyNodes(Grid):
    """What a strategy is shown in the place of the nodes, whom it neither chooses nor reaches."""

    def __init__(self, strategy: Strategy) -> None:
        wanted = ("min_train_nodes", "min_available_nodes")
        self._count = max(1, *(int(getattr(strategy, name, 1)) for name in wanted))

    def get_node_ids(self) -> Iterable[int]:
        """Return as many ids as it waits for, and more each time that it asks."""
        count, self._count = self._count, 2 * self._count
        return range(1, count + 1)

    def set_run(self, run: Any) -> None:
        """Do nothing."""

    @property
    def run(self) -> Any:
        """Nothing."""
        raise self._refusal

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Refuse."""
        raise self._refusal

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refuse."""
        raise self._refusal

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refuse."""
        raise self._refusal

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Refuse."""
        raise self._refusal

    @property
    def _refusal(self) -> InputError:
        return InputError("strategy: it speaks with nodes itself, and nothing would protect them")
