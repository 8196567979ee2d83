"""What an algorithm is, as functions of vectors: nothing here knows of a model's layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:  # configs are checked where torch is not imported
    from torch import Tensor

    from fedpriv.optimizers.server import ServerConfig
    from fedpriv.privacy.options import PrivacyConfig
    from fedpriv.privacy.turns import Turn
    from fedpriv.training.local import LocalTraining


@dataclass(frozen=True)
class Trained:
    """What the local steps of some users have come to.

    Attributes:
        updates: `[U, P]`, start minus end of each: the direction that a server *subtracts*.
        steps: how many local steps each took: `[U]`.
        shared: `[len(algorithm.shared), P]`, what the server sent beside the model.
        kept: `[U, P]`, what the users had kept; None where they keep nothing.
        lr: the rate of the steps, before a schedule: η times the algorithm's `gradient_weight`.
    """

    updates: Tensor
    steps: Tensor
    shared: Tensor
    kept: Tensor | None
    lr: float


@dataclass(frozen=True)
class Algorithm:
    """Federated optimisation over users who each send a few vectors of the model's size P.

    A local step follows ∇loss + μ(θ - θ_start) + pull, where μ and the pull are the algorithm's, at
    η times its `gradient_weight`.
    Each payload is clipped to a bound of its own (`algorithm.bounds` in the config; the update's is
    `privacy.clipping.bound`); together they are one Gaussian release. The defaults are those of
    users who send only an update and keep nothing.
    """

    #: What statements call it, with its source.
    cite: ClassVar[str] = ""
    #: What a user sends, `model` first: the update.
    payloads: ClassVar[tuple[str, ...]] = ("model",)
    #: What the server keeps and sends beside the model: functions of releases, so free.
    shared: ClassVar[tuple[str, ...]] = ()
    #: What it keeps a vector for each of, where options say how many there are.
    rows: ClassVar[str] = ""
    #: Whether each user keeps a vector between rounds, which never leaves it.
    keeps: ClassVar[bool] = False
    #: Whether the first payload is the update as local training has made it.
    sends_as_is: ClassVar[bool] = True
    #: Whether a schedule says which silos send in which round: see `turns`.
    scheduled: ClassVar[bool] = False
    #: Whether `combined` is a sum: of another nobody knows how much of it is noise.
    adds_slots: ClassVar[bool] = True
    #: Whether only the signs of weights are trained, at users and at the server; see `HideNseek`.
    signs: ClassVar[bool] = False
    #: How far users who take `local.steps` steps along one vector move for each unit of its length.
    travel: float = field(default=1.0, init=False, repr=False, compare=False)

    def made_for(self, recipe: LocalTraining) -> Self:
        """Return the algorithm that knows how far users travel by the local `recipe`."""
        made = copy.copy(self)
        object.__setattr__(made, "travel", recipe.lr * (recipe.steps or 1))
        return made

    def of_round(self, round_: int, lr: float) -> Self:
        """Return the algorithm as it is in a round, in which the server's learning rate is `lr`."""
        return self

    def refuses(self, recipe: LocalTraining) -> str | None:
        """Return what in the local `recipe` has no meaning here, and why; None for nothing."""
        return None

    def refuses_beside(self, server: ServerConfig, privacy: PrivacyConfig | None) -> str | None:
        """Return what in other sections has no meaning or no proof here, and why; None: nothing."""
        return None

    @property
    def slots(self) -> int:
        """In how many vectors a round sums updates; a user adds to one of them: see `slot`.

        The server's optimizer gets them `combined`. Users then send nothing beside the update.
        """
        return 1

    @property
    def vectors(self) -> int:
        """How many vectors of P numbers a round sums and releases."""
        return self.slots * len(self.payloads)

    def slot(self, user_id: str) -> int:
        """Return which of the `slots` a user adds to: a public function of its id alone."""
        return 0

    @property
    def sends_update_alone(self) -> bool:
        """Whether users send the update as local training has made it, and keep nothing."""
        return len(self.payloads) == 1 and not self.keeps and self.sends_as_is

    def turns(self, rounds: int, steps: int) -> Sequence[Turn]:
        """Return who takes part in each of the first `rounds` of an algorithm that is `scheduled`.

        A function of public numbers alone, for silos of a simulation; `steps` is `local.steps`.
        """
        return ()

    def weight(self, round_: int, silo: int) -> float:
        """Return by what the change of a silo is multiplied before it is sent: public."""
        return 1.0

    @property
    def proximal_mu(self) -> float:
        """μ, where the algorithm has one of its own."""
        return 0.0

    @property
    def gradient_weight(self) -> float:
        """By what the local learning rate is multiplied."""
        return 1.0

    @property
    def perturbation(self) -> tuple[float, float, bool]:
        """ρ, α and whether ρ is a distance: a step follows (1-α)∇(θ) + α∇(θ + ρ∇(θ)).

        Where it is, ∇(θ) in the second term is divided by its norm. Users then train one by one.
        """
        return (0.0, 0.0, False)

    def begun(self, block: Tensor) -> Tensor:
        """Return what a block of the first model becomes, before anything is trained."""
        return block

    def start(self, model: Tensor, shared: Tensor, slot: int) -> Tensor:
        """Return where the users of a slot start: `[P]`.

        Args:
            model: the model that the server sent: `[P]`.
            shared: `[len(self.shared), P]`, what it sent beside the model.
            slot: which; of silos, whose start one by one, which silo.
        """
        return model

    def pull(self, shared: Tensor, kept: Tensor | None) -> Tensor | None:
        """Return what users add to each gradient: `[U, P]`, or `[P]` for all; None for nothing.

        Args:
            shared: `[len(self.shared), P]`, what the server sent beside the model.
            kept: `[U, P]`, what the users keep; None where they keep nothing.
        """
        return None

    def update(self, trained: Trained) -> Tensor:
        """Return the first payload, before clipping: `[U, P]`; where not `sends_as_is`."""
        return trained.updates

    def sent(self, trained: Trained) -> list[Tensor]:
        """Return every payload but the update, before clipping: `[U, P]` each."""
        return []

    def kept(self, trained: Trained, sent: list[Tensor]) -> Tensor:
        """Return what users keep: `[U, P]`. `sent` are the payloads beside the update, clipped."""
        raise NotImplementedError

    def combined(self, averages: Tensor) -> Tensor:
        """Return the update that the server's optimizer gets of several slots: `[P]`.

        Args:
            averages: of each slot, released, divided by the whole expected cohort: `[slots, P]`.
        """
        return averages.sum(0)

    def server(self, averages: list[Tensor], shared: Tensor, fraction: float) -> Tensor:
        """Return what the server keeps after a round: `[len(shared), P]`.

        Args:
            averages: of every payload, the update first, released: `[P]` each. Of slots they are
                those of all, and each is divided by the whole expected cohort.
            shared: what it kept before.
            fraction: the expected share of users in a round.
        """
        return shared
