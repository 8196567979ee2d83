"""How learning rates move: the server's over the rounds, a user's over its steps of a round."""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator

from fedpriv.sections import Section

Kind = Literal["constant", "step", "exponential", "linear"]

# The settings that each kind reads, besides `warmup_rounds`.
_READS: dict[Kind, set[str]] = {
    "constant": set(),
    "step": {"start_round", "factor", "every"},
    "exponential": {"start_round", "factor"},
    "linear": {"start_round", "final_factor"},
}


class ScheduleConfig(Section):
    """A factor on every learning rate of the server, as a function of the round: see `factor`."""

    kind: Kind = Field(
        default="constant",
        description="constant; step: times factor every so many rounds; exponential: times factor "
        "each round; linear: down to final_factor at the last round",
    )
    warmup_rounds: int = Field(
        default=0, ge=0, description="rounds over which the rate rises in equal steps; 0: none"
    )
    start_round: int = Field(
        default=1,
        ge=1,
        description="step, exponential, linear: the last round at the full rate (rounds count "
        "from 1)",
    )
    factor: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="step, exponential: what one decay multiplies the rate by; above 0, at most 1",
    )
    every: int | None = Field(
        default=None, ge=1, description="step only: rounds from one decay to the next"
    )
    final_factor: float = Field(
        default=0.0, ge=0, le=1, description="linear only: factor at the last round; 0 to 1"
    )

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> "ScheduleConfig":
        reads = _READS[self.kind]
        for name in ("factor", "every"):
            if name in reads and getattr(self, name) is None:
                raise ValueError(f"{name} must be set for kind {self.kind}")
        for name in ("start_round", "factor", "every", "final_factor"):
            if name not in reads and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning for kind {self.kind}: leave it out")
        return self


def factor(schedule: ScheduleConfig, round_: int, rounds: int) -> float:
    """Return what multiplies the learning rate in round t = `round_` of T = `rounds`.

    warmup(t) · decay(t), with w = `warmup_rounds`, s = `start_round`, f = `factor`:

    - warmup(t) = t/w for t ≤ w, else 1;
    - constant: 1;
    - step: f^⌊(t - s)/every⌋ for t > s, else 1;
    - exponential: f^(t - s) for t > s, else 1;
    - linear: 1 - (1 - `final_factor`) · (t - b)/(T - b) for t > b = max(s, w), else 1.

    Raises ValueError unless 1 ≤ t ≤ T.

    >>> [factor(ScheduleConfig(kind="linear"), t, 5) for t in range(1, 6)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if not 1 <= round_ <= rounds:
        raise ValueError(f"round {round_} is not one of 1 to {rounds}")
    return _warmup(schedule, round_) * _decay(schedule, round_, rounds)


def _warmup(schedule: ScheduleConfig, round_: int) -> float:
    if round_ > schedule.warmup_rounds:
        return 1.0
    return round_ / schedule.warmup_rounds


def _decay(schedule: ScheduleConfig, round_: int, rounds: int) -> float:
    past = max(0, round_ - schedule.start_round)
    if schedule.kind == "step":
        assert schedule.factor is not None
        assert schedule.every is not None
        return schedule.factor ** (past // schedule.every)
    if schedule.kind == "exponential":
        assert schedule.factor is not None
        return schedule.factor**past
    if schedule.kind == "linear":
        begin = max(schedule.start_round, schedule.warmup_rounds)
        if round_ <= begin:
            return 1.0
        return 1.0 - (1.0 - schedule.final_factor) * (round_ - begin) / (rounds - begin)
    return 1.0


class LocalScheduleConfig(Section):
    """A factor on the local learning rate, as a function of the step: see `local_factor`."""

    kind: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="constant; linear or cosine: falls over a user's steps of a round",
    )
    final_factor: float = Field(
        default=0.0, ge=0, le=1, description="linear, cosine: the factor after the last step"
    )

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> "LocalScheduleConfig":
        if self.kind == "constant" and self.final_factor:
            raise ValueError("final_factor has no meaning for kind constant: leave it out")
        return self


def local_factor(schedule: LocalScheduleConfig, step: int, steps: int) -> float:
    """Return what multiplies the local learning rate in step k = `step` of a user's K = `steps`.

    With f = `final_factor`, which would be that of a step K + 1, and x = (k - 1)/K:

    - constant: 1;
    - linear: 1 - (1 - f) · x;
    - cosine: f + (1 - f) · (1 + cos πx)/2.

    Raises ValueError unless 1 ≤ k ≤ K.

    >>> [local_factor(LocalScheduleConfig(kind="linear"), k, 4) for k in range(1, 5)]
    [1.0, 0.75, 0.5, 0.25]
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step {step} is not one of 1 to {steps}")
    past, last = (step - 1) / steps, schedule.final_factor
    if schedule.kind == "linear":
        return 1.0 - (1.0 - last) * past
    if schedule.kind == "cosine":
        return last + (1.0 - last) * (1.0 + math.cos(math.pi * past)) / 2
    return 1.0


def scale_learning_rates(optimizer: torch.optim.Optimizer, by: float) -> None:
    """Set every group's learning rate to `by` times the one that it was built with.

    `server_optimizer` keeps the latter as `initial_lr`, which the state dict carries; groups may
    have different ones, so writing one rate into all of them would be wrong.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * by
