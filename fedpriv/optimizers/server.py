"""The global model and the optimizer that moves it: state that a checkpoint holds whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedpriv.optimizers.normalize import NORMALIZERS
from fedpriv.optimizers.registry import server_optimizer
from fedpriv.optimizers.schedules import ScheduleConfig, factor
from fedpriv.training.parameters import Layout, parameters_of

_PARAMETER = "parameter/"
_OPTIMIZER = "optimizer/"


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
        normalize: str | None,
        rounds: int,
    ) -> None:
        self.model = model
        self.layout = Layout.of(model)
        self._lr = lr
        self._schedule = schedule
        self._rounds = rounds
        self._normalize = NORMALIZERS[normalize] if normalize else None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = server_optimizer(optimizer, self._parameters, lr, options)

    def parameters(self) -> Tensor:
        """Return a copy of the global parameters as one vector `[total]`."""
        return self.layout.join(parameters_of(self.model))

    def lr(self, round_: int) -> float:
        """Return the learning rate of a round: base rate times schedule."""
        return self._lr * factor(self._schedule, round_, self._rounds)

    def step(self, average: Tensor, round_: int, seed: int) -> None:
        """Move the model by the averaged update `[total]`.

        Args:
            average: released sum divided by the expected cohort.
            round_: the round, for the schedule.
            seed: for optimizers that draw random projections, so that a repeated round repeats.
        """
        blocks = self.layout.split(average)
        if self._normalize is not None:
            blocks = self._normalize(blocks)
        for parameter, name in zip(self._parameters, self.layout.names, strict=True):
            parameter.grad = blocks[name].to(parameter)
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr(round_)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> tuple[dict[str, Tensor], str]:
        """Return everything needed to continue: tensors by name, and the rest as JSON."""
        tensors = {_PARAMETER + name: t for name, t in parameters_of(self.model).items()}
        whole = self._optimizer.state_dict()
        plain: dict[str, dict[str, Any]] = {}
        for index, entries in whole["state"].items():
            plain[str(index)] = {}
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}{index}/{key}"] = value
                else:
                    plain[str(index)][key] = value
        return tensors, json.dumps({"state": plain, "param_groups": whole["param_groups"]})

    def load_state(self, tensors: Mapping[str, Tensor], rest: str) -> None:
        """Continue from what `state` returned.

        Raises:
            KeyError, ValueError, RuntimeError: the state is that of another model or optimizer.
        """
        own = parameters_of(self.model)
        saved = {k.removeprefix(_PARAMETER) for k in tensors if k.startswith(_PARAMETER)}
        if saved != own.keys():
            raise KeyError("parameters")
        for name, parameter in own.items():
            if parameter.shape != tensors[_PARAMETER + name].shape:
                raise ValueError(f"{name} has another shape")
            parameter.copy_(tensors[_PARAMETER + name])
        whole = json.loads(rest)
        state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in whole["state"].items()}
        for name, tensor in tensors.items():
            if name.startswith(_OPTIMIZER):
                index, key = name.removeprefix(_OPTIMIZER).split("/", 1)
                state[int(index)][key] = tensor
        self._optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
