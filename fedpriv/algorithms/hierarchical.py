"""HierFAVG (Liu et al. 2020, "Client-Edge-Cloud Hierarchical Federated Learning").

    user k of edge e:  y ← w_e;  local steps;  send w_e - y
    edge e:            w_e ← w_e - λ · (sum of its users' updates) / (qN/E)
    centre:            every κ rounds  w_e ← x = mean of all w_e, for every e

κ is `edge_rounds` and λ the server's learning rate (1 in the paper, whose edges average models).
qN/E is how many users an edge expects: public, where the paper divides by counts of examples. The
server keeps x, which is the model, and w_e - x of each edge.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from fedpriv.algorithms.base import Algorithm
from fedpriv.privacy.randomness import group_of

if TYPE_CHECKING:
    from fedpriv.optimizers.server import ServerConfig
    from fedpriv.privacy.options import PrivacyConfig

_EDGES = Field(ge=2, le=1024, description="E: a public hash of its id says which edge a user is in")
_ROUNDS = Field(ge=1, description="κ: so many rounds edges go on alone before the centre averages")


@dataclass(frozen=True)
class Hierarchical(Algorithm):
    """Edges with models of their own, which the centre averages every few rounds.

    The sums of all edges are one release of E·P numbers, to E·P - P of which a user adds nothing:
    its sensitivity is that of one sum.

    Attributes:
        edges: E.
        edge_rounds: κ.
    """

    edges: Annotated[int, _EDGES]
    edge_rounds: Annotated[int, _ROUNDS] = 1
    #: The round, and the server's learning rate in it.
    now: tuple[int, float] = field(default=(0, 0.0), init=False, repr=False, compare=False)
    cite = "HierFAVG (Liu et al. 2020)"
    rows = "edges"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared", tuple(f"edge {e}" for e in range(self.edges)))

    def of_round(self, round_: int, lr: float) -> Self:
        """Return the algorithm that knows the round and λ."""
        made = copy.copy(self)
        object.__setattr__(made, "now", (round_, lr))
        return made

    def refuses_beside(self, server: ServerConfig, privacy: PrivacyConfig | None) -> str | None:
        """Refuse what would move a mean of models elsewhere than the mean of moved models."""
        why = "each edge's model moves by its own average"
        if (reason := moves_otherwise(server, privacy, why)) is not None:
            return reason
        return None if privacy is None else noise_within(privacy, "edge")

    @property
    def slots(self) -> int:
        """Return E."""
        return self.edges

    def slot(self, user_id: str) -> int:
        """Return the edge of a user."""
        return group_of(user_id, self.edges, "edge")

    def start(self, model: Tensor, shared: Tensor, slot: int) -> Tensor:
        """Return w_e."""
        return model + shared[slot]

    def server(self, averages: list[Tensor], shared: Tensor, fraction: float) -> Tensor:
        """Return w_e - x of each edge: `[E, P]`.

        An edge's own average is E times its part of `averages`, and x moves by their mean.
        """
        round_, lr = self.now
        if round_ % self.edge_rounds == 0:
            return torch.zeros_like(shared)
        sums = torch.stack(averages)
        return shared - (lr * (self.edges * sums - sums.sum(0))).to(shared)


def noise_within(privacy: PrivacyConfig, slot: str) -> str | None:
    """Return what would add noise before the sums of each `slot`, an edge say, are taken."""
    if privacy.unit == "example":
        return (
            f"privacy.unit: example: silos add noise to one sum, and to one for each {slot} is "
            "not built; write unit: user"
        )
    if privacy.noise_by == "users":
        return (
            "privacy.noise_by: users: each user would have to add noise to the sums of all "
            f"{slot}s, each of which would have that of all users; write noise_by: server or nodes"
        )
    return None


def moves_otherwise(server: ServerConfig, privacy: PrivacyConfig | None, why: str) -> str | None:
    """Return what would move the model by something else than its rate times the average."""
    if server.optimizer != "sgd" or any(server.options.values()):
        return (
            f"server.optimizer other than sgd without options: {why}, and an optimizer has state "
            "for one model; write optimizer: sgd"
        )
    if server.normalize is not None:
        return (
            f"server.normalize: {why}, and the mean of normalised averages is not the normalised "
            "mean; write normalize: null"
        )
    if privacy is not None and privacy.clipping.undoes:
        return (
            "privacy.clipping.undo: what users divide by, the server multiplies again in the "
            f"model alone, and {why}; write undo: false"
        )
    return None
