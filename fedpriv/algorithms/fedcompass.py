"""FedCompass (Li et al. 2024, "FedCompass: efficient cross-silo federated learning ...").

    silo k:  from the model x that it was sent last, Q_k steps;  send Δ_k = x - y
    server:  when all of a group have come:  x ← x - γ · (1/N) Σ_k s(τ_k) Δ_k,  s(τ) = (1 + τ)^-a

τ_k is how many times x has moved since silo k was sent it. A silo that has come is sent x, and
joins the group with which it can arrive after the most steps between Q_min and Q_max; where there
is none it begins a group, timed so that it might meet another next time. Q_max is `local.steps`, γ
the server's learning rate. At first each silo takes Q_max steps, and comes alone.

Time is virtual: `seconds` say how long a step takes in each silo, whatever it takes here. Nobody is
late then, and the paper's buffer for those who are has no use. They are numbers of the config, so
that the schedule is public, and with it who sends when, and after how many steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from fedpriv.algorithms.base import Algorithm
from fedpriv.algorithms.hierarchical import moves_otherwise
from fedpriv.privacy.turns import Turn

if TYPE_CHECKING:
    from fedpriv.optimizers.server import ServerConfig
    from fedpriv.privacy.options import PrivacyConfig
    from fedpriv.training.local import LocalTraining

_SECONDS = Field(gt=0, le=1e9, allow_inf_nan=False)
_LISTED = Field(
    min_length=1,
    max_length=1024,
    description="of a step in each silo, in the order of the data's users",
)


@dataclass(frozen=True)
class Arrival(Turn):
    """A group that has come: a round.

    Attributes:
        stale: τ of each silo, how many rounds there were since the model that it began with.
    """

    stale: tuple[int, ...]


@dataclass
class _Group:
    """Silos on their way: when they are expected, when at the latest, and who."""

    expected: Fraction
    latest: Fraction
    silos: list[int]


@dataclass(frozen=True)
class Compass:
    """The scheduler of the paper, over silos of constant speed.

    Attributes:
        seconds: of a step in each silo.
        fewest: Q_min.
        most: Q_max.
        latest: λ: a group that was expected after t may take λt.
    """

    seconds: tuple[float, ...]
    fewest: int
    most: int
    latest: float

    def arrivals(self, rounds: int) -> tuple[Arrival, ...]:
        """Return the first `rounds` groups that come, in order; of those that come at once, the
        one with the first silo is first.
        """
        seconds = [Fraction(each) for each in self.seconds]
        steps, began = [self.most] * len(seconds), [0] * len(seconds)
        alone = {silo: self.most * each for silo, each in enumerate(seconds)}
        groups: list[_Group] = []
        done = dict(alone)  # when each silo has taken its steps
        found: list[Arrival] = []
        while len(found) < rounds:
            coming = [[silo] for silo in alone] + [group.silos for group in groups]
            now, silos = min((max(done[s] for s in each), sorted(each)) for each in coming)
            taken = tuple(steps[silo] for silo in silos)
            stale = tuple(len(found) - began[silo] for silo in silos)
            found.append(Arrival(tuple(silos), taken, float(now), stale))
            groups = [group for group in groups if group.silos[0] not in silos]
            for silo in sorted(silos, key=lambda silo: (seconds[silo], silo)):
                alone.pop(silo, None)
                began[silo] = len(found)
                steps[silo] = self._assigned(silo, now, seconds, groups)
                done[silo] = now + steps[silo] * seconds[silo]
        return tuple(found)

    def _assigned(
        self, silo: int, now: Fraction, seconds: Sequence[Fraction], groups: list[_Group]
    ) -> int:
        """Put `silo` into the group that it can arrive with after most steps, or into a new one."""
        able = []
        for group in groups:
            steps = math.floor((group.expected - now) / seconds[silo])
            if self.fewest <= steps <= self.most:
                able.append((steps, group))
        if able:
            steps, group = max(reversed(able), key=lambda each: each[0])  # of equals the last
            group.silos.append(silo)
            return steps
        steps = self._steps_alone(silo, now, seconds, groups)
        takes = steps * seconds[silo]
        groups.append(_Group(now + takes, now + Fraction(self.latest) * takes, [silo]))
        return steps

    def _steps_alone(
        self, silo: int, now: Fraction, seconds: Sequence[Fraction], groups: list[_Group]
    ) -> int:
        """Return after how many steps a silo might meet the fastest of another group next time."""
        meets = [
            math.floor(
                (group.latest + self.most * min(seconds[s] for s in group.silos) - now)
                / seconds[silo]
            )
            for group in groups
            if now < group.latest
        ]
        able = [steps for steps in meets if steps <= self.most]
        return max(self.fewest, *able) if able else self.most


@lru_cache(maxsize=16)  # asked for again in every round
def _arrivals(compass: Compass, rounds: int) -> tuple[Arrival, ...]:
    return compass.arrivals(rounds)


@dataclass(frozen=True)
class FedCompass(Algorithm):
    """Silos of different speed that arrive in groups; a round is one arrival.

    What a silo began with is kept as the difference from the model: `shared` has one row a silo.

    Attributes:
        seconds: of a step in each silo.
        min_steps: Q_min.
        latest: λ, from 1 on.
        staleness: a.
    """

    seconds: Annotated[tuple[Annotated[float, _SECONDS], ...], _LISTED]
    min_steps: Annotated[int, Field(ge=1, description="Q_min; Q_max is local.steps")]
    latest: Annotated[float, Field(ge=1, le=100, description="λ: how late a group may be")] = 1.2
    staleness: Annotated[float, Field(ge=0, le=10, description="a: s(τ) = (1 + τ)^-a")] = 0.5
    #: Q_max, and the round with the server's learning rate in it.
    max_steps: int = field(default=0, init=False, repr=False, compare=False)
    now: tuple[int, float] = field(default=(0, 0.0), init=False, repr=False, compare=False)
    cite = "FedCompass (Li et al. 2024)"
    rows = "silos"
    scheduled = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", tuple(self.seconds))
        rows = tuple(f"start of silo {silo}" for silo in range(len(self.seconds)))
        object.__setattr__(self, "shared", rows)

    def made_for(self, recipe: LocalTraining) -> Self:
        """Return the algorithm that knows Q_max."""
        made = super().made_for(recipe)
        object.__setattr__(made, "max_steps", recipe.steps)
        return made

    def of_round(self, round_: int, lr: float) -> Self:
        """Return the algorithm that knows the round and γ."""
        made = copy.copy(self)
        object.__setattr__(made, "now", (round_, lr))
        return made

    def refuses(self, recipe: LocalTraining) -> str | None:
        """Refuse steps below Q_min."""
        if recipe.steps is None or recipe.steps < self.min_steps:
            return (
                f"local.steps: {recipe.steps}, which is the most that a silo takes and below "
                f"algorithm.min_steps: write at least {self.min_steps}"
            )
        return None

    def refuses_beside(self, server: ServerConfig, privacy: PrivacyConfig | None) -> str | None:
        """Refuse users, whose speed is private, and what has no meaning for stale changes."""
        if privacy is None or privacy.unit != "example":
            return (
                "users: how fast one computes is private, and would decide when it sends and what "
                "others begin with; write privacy.unit: example (with noise_multiplier: 0 for no "
                "privacy), or fedavg"
            )
        if privacy.sampling.kind != "all":
            return (
                f"privacy.sampling.kind: {privacy.sampling.kind}: all silos train all the time, "
                "and the schedule says who sends; write kind: all"
            )
        if privacy.clipping.kind == "adaptive":
            return (
                "privacy.clipping.kind: adaptive: the bounds that a silo began with are those of "
                "another round than that in which it sends; write global or per_layer"
            )
        why = "what a silo began with is known by how far the model has moved since"
        return moves_otherwise(server, privacy, why)

    def turns(self, rounds: int, steps: int) -> tuple[Arrival, ...]:
        """Return the first arrivals, with `steps` as Q_max."""
        compass = Compass(self.seconds, self.min_steps, steps, self.latest)
        return _arrivals(compass, 1 << rounds.bit_length())[:rounds]

    def weight(self, round_: int, silo: int) -> float:
        """Return s(τ)."""
        turn = self.turns(round_, self.max_steps)[-1]
        return float((1 + turn.stale[turn.silos.index(silo)]) ** -self.staleness)

    def start(self, model: Tensor, shared: Tensor, slot: int) -> Tensor:
        """Return what the silo began with."""
        return model + shared[slot]

    def server(self, averages: list[Tensor], shared: Tensor, fraction: float) -> Tensor:
        """Return how far each silo's beginning is from the model: `[N, P]`."""
        round_, lr = self.now
        kept = shared + (lr * averages[0]).to(shared)
        kept[torch.tensor(self.turns(round_, self.max_steps)[-1].silos)] = 0.0
        return kept
