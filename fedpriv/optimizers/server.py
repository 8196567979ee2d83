"""The global model and the optimizer that moves it: state that a checkpoint holds whole."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from fedpriv.components import Named, Slot
from fedpriv.draws import drawing_from
from fedpriv.errors import Diverged, InputError
from fedpriv.failures import told_as
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.optimizers.kinds import OPTIMIZERS
from fedpriv.optimizers.normalize import NORMALIZERS, Normalization, NormalizerOptions
from fedpriv.optimizers.registry import server_optimizer, state_types
from fedpriv.optimizers.schedules import ScheduleConfig, factor, scale_learning_rates
from fedpriv.sections import Rate, Section

_PARAMETER = "parameter/"
_OPTIMIZER = "optimizer"
_SHARED = "algorithm/shared"
_NORMALIZER = "normalizer"
_VOTES = "votes/"


class ServerConfig(Section):
    """How the server applies the averaged update."""

    optimizer: Annotated[str, Named(OPTIMIZERS)] = Field(
        default="lamb",
        description="Any optimizer of torch.optim or pytorch_optimizer, by name, or "
        "package.module:object for your own.",
    )
    lr: Rate = Field(default=0.01, description="Server learning rate, before the schedule.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the optimizer, e.g. betas."
    )
    schedule: ScheduleConfig = Field(
        default_factory=ScheduleConfig, description="Learning rate by round."
    )
    broadcast: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Numbers in which parameters travel to the nodes; bfloat16 halves what is "
        "sent, and users start from parameters rounded to 8 bits.",
    )
    normalize: Annotated[NormalizerOptions | None, Slot(NORMALIZERS, optional=True)] = Field(
        default=None,
        description="Layer-wise normalisation of the averaged update before the optimizer.",
    )


class GlobalModel(Protocol):
    """The model that all users share, and what moves it by what was released: see `Server`."""

    #: What an algorithm's server keeps and sends beside the model.
    shared: Tensor

    def parameters(self) -> Tensor:
        """Return a copy of the global parameters as one vector `[total]`."""
        ...

    def lr(self, round_: int) -> float:
        """Return the learning rate of a round."""
        ...

    def step(self, average: Tensor, round_: int, seed: int, noise: Sequence[float] = ()) -> None:
        """Move the model by the averaged update `[total]`: see `Server.step`."""
        ...

    def require_finite(self, round_: int) -> None:
        """Check what the step of a round has left: see `Server.require_finite`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to continue, as tensors by name."""
        ...


class Server:
    """Applies averaged updates to the global model.

    An averaged update is a pseudo-gradient (start minus end of local training): it is normalised
    layer by layer where asked, and handed to the optimizer as the gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: str,
        lr: float,
        options: Mapping[str, Any],
        schedule: ScheduleConfig,
        normalize: NormalizerOptions | None,
        rounds: int,
        shared: int = 0,
        undone: Sequence[float] = (),
        signs: bool = False,
    ) -> None:
        """Make ready to move `model`; for what is `undone` see `UndoneClipping`.

        Where `signs` alone are trained, the optimizer moves votes on them, which begin at the
        weights, and no weight's magnitude changes.
        """
        self.model = model
        self.layout = Layout.of(model)
        self._name = optimizer
        self._lr = lr
        self._schedule = schedule
        self._rounds = rounds
        self._normalize = Normalization(normalize)
        self._undone = undone or (1.0,) * len(self.layout.names)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._votes = [p.detach().clone() for p in self._parameters] if signs else []
        #: What an algorithm's server keeps and sends beside the model: `[shared, total]`.
        self.shared = torch.zeros(shared, self.layout.total)
        self._optimizer = server_optimizer(optimizer, self._parameters, lr, options)

    def parameters(self) -> Tensor:
        """Return a copy of the global parameters as one vector `[total]`."""
        return self.layout.join(parameters_of(self.model))

    def lr(self, round_: int) -> float:
        """Return the learning rate of a round: base rate times schedule."""
        return self._lr * factor(self._schedule, round_, self._rounds)

    def step(self, average: Tensor, round_: int, seed: int, noise: Sequence[float] = ()) -> None:
        """Move the model by the averaged update `[total]`.

        Args:
            average: released sum divided by the expected cohort.
            round_: the round, for the schedule.
            seed: for optimizers that draw random projections, so that a repeated round repeats.
            noise: the standard deviation of the noise on each block; empty for none.

        Raises:
            Diverged: the normaliser or the optimizer failed.
        """
        names = self.layout.names
        parts = zip(self.layout.split(average).items(), self._undone, strict=True)
        deviations = (m * n for m, n in zip(self._undone, noise or [0.0] * len(names), strict=True))
        blocks = self._normalize(
            {name: m * block for (name, block), m in parts},
            dict(zip(names, deviations, strict=True)),
        )
        for parameter, name in zip(self._parameters, self.layout.names, strict=True):
            # Some optimizers overwrite their gradients, so each gets memory of its own.
            parameter.grad = blocks[name].to(parameter, copy=True)
        scale_learning_rates(self._optimizer, factor(self._schedule, round_, self._rounds))
        drawn = drawing_from(seed, self._parameters[0].device)
        with drawn, told_as(f"server.optimizer: {self._name} fails", Diverged):
            self._move()
        self._optimizer.zero_grad()

    def _move(self) -> None:
        """Let the optimizer move the parameters, or votes on their signs."""
        parameters = [p.detach() for p in self._parameters] if self._votes else []
        magnitudes = [p.clone() for p in parameters]
        for parameter, vote in zip(parameters, self._votes, strict=True):
            parameter.copy_(vote)
        self._optimizer.step()
        for parameter, vote, size in zip(parameters, self._votes, magnitudes, strict=True):
            vote.copy_(parameter)
            torch.copysign(size, vote, out=parameter)

    def require_finite(self, round_: int) -> None:
        """Check what the step of a round has left.

        Raises:
            Diverged: the model has numbers that are not finite. No later round could teach it
                anything, and each would be paid for.
        """
        moved = [*self._parameters, *self._votes]
        if not torch.stack([each.isfinite().all() for each in moved]).all():
            raise Diverged(
                f"server: round {round_} left numbers in the model that are not finite; start "
                "another run with a lower server.lr, another server.optimizer or server.normalize"
            )

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to continue, as tensors by name.

        The optimizer's state is any nesting of tensors, numbers and small objects, so it travels
        as the bytes of a `torch.save`: uint8 `[bytes]`.
        """
        buffer = io.BytesIO()
        torch.save(self._optimizer.state_dict(), buffer)
        packed = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        kept = {_SHARED: self.shared} if len(self.shared) else {}
        if (normalizers := self._normalize.state()) is not None:
            kept[_NORMALIZER] = normalizers
        return {**self._moved(), _OPTIMIZER: packed, **kept}

    def _moved(self) -> dict[str, Tensor]:
        """Return the parameters, and the votes on their signs where they have any, by name."""
        votes = zip(self.layout.names, self._votes, strict=False)
        parameters = {_PARAMETER + name: p for name, p in parameters_of(self.model).items()}
        return parameters | {_VOTES + name: vote for name, vote in votes}

    def kept(self) -> int:
        """Return how many numbers it keeps beside the parameters; scalars do not count."""
        state = self._optimizer.state_dict()["state"]
        return _numbers([state, self._normalize.keeps, self.shared, self._votes])

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned.

        Raises:
            InputError: the state is that of another model, optimizer or normaliser.
        """
        try:
            with torch.serialization.safe_globals(state_types()):
                buffer = io.BytesIO(tensors[_OPTIMIZER].numpy().tobytes())
                state = torch.load(buffer, map_location=self._place, weights_only=True)
            self._optimizer.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(f"the checkpoint does not fit the optimizer ({error})") from None
        for name, own in self._moved().items():
            value = tensors.get(name)
            if value is None or value.shape != own.shape:
                block = name.partition("/")[2]
                raise InputError(f"the checkpoint does not fit the model (block {block})")
            own.copy_(value)
        self.shared = tensors.get(_SHARED, self.shared)
        self._normalize.load_state(tensors.get(_NORMALIZER), self._place)

    def _place(self, storage: Any, saved_on: str) -> Any:
        """Return a storage of a checkpoint where this model is, whichever GPU it was saved on.

        What was saved on the CPU, such as an optimizer's count of steps, stays there.
        """
        device = "cpu" if saved_on == "cpu" else str(self._parameters[0].device)
        return torch.serialization.default_restore_location(storage, device)


def _numbers(state: object) -> int:
    """Return how many numbers there are in the tensors of a nested state; scalars do not count."""
    if isinstance(state, Tensor):
        return state.numel() if state.dim() else 0
    if isinstance(state, dict):
        return sum(_numbers(each) for each in state.values())
    if isinstance(state, list | tuple):
        return sum(_numbers(each) for each in state)
    return _numbers(vars(state)) if hasattr(state, "__dict__") else 0
