"""An algorithm from outside: users who are trained together stay apart whatever it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedpriv.algorithms.base import Algorithm, Trained
from fedpriv.errors import InputError
from fedpriv.failures import told_as

if TYPE_CHECKING:
    from torch import Tensor

    from fedpriv.optimizers.server import ServerConfig
    from fedpriv.privacy.options import PrivacyConfig
    from fedpriv.training.local import LocalTraining


@dataclass(frozen=True)
class OutsideAlgorithm(Algorithm):
    """An algorithm from outside, which is made anew for each user and shown that user alone.

    What it makes of one user's vectors cannot depend on another's, as sensitivity takes for
    granted: a mean, or a norm, over all users of a stack would be one, and no bound would hold.
    Code that goes out of its way, through files or globals, is not stopped.

    Attributes:
        name: how configs name it.
        make: makes the algorithm.
    """

    name: str
    make: Callable[[], Algorithm]

    def __post_init__(self) -> None:
        made = self.make()
        if not isinstance(made, Algorithm):
            raise InputError(
                f"algorithm.name: {self.name} makes a {type(made).__name__}, and must make an "
                "Algorithm (fedpriv.algorithms.base)"
            )
        if made.slots != 1 or made.scheduled:
            what = "has a schedule" if made.scheduled else f"sums its users in {made.slots} slots"
            raise InputError(
                f"algorithm.name: {self.name} {what}: only fedpriv's own algorithms have a "
                "schedule, or more than one slot"
            )
        for name in ("cite", "payloads", "shared", "keeps", "sends_as_is", "signs"):
            object.__setattr__(self, name, getattr(made, name))

    def refuses(self, recipe: LocalTraining) -> str | None:
        """Return what it refuses."""
        return self.make().refuses(recipe)

    def refuses_beside(self, server: ServerConfig, privacy: PrivacyConfig | None) -> str | None:
        """Return what it refuses in other sections."""
        return self.make().refuses_beside(server, privacy)

    @property
    def proximal_mu(self) -> float:
        """Its μ."""
        return self.make().proximal_mu

    @property
    def gradient_weight(self) -> float:
        """By what it multiplies the local learning rate."""
        return self.make().gradient_weight

    @property
    def perturbation(self) -> tuple[float, float, bool]:
        """Its ρ and α."""
        return self.make().perturbation

    def made_for(self, recipe: LocalTraining) -> OutsideAlgorithm:
        """Return the algorithm that knows how far users travel by the local `recipe`."""
        return OutsideAlgorithm(self.name, lambda: self.make().made_for(recipe))

    def of_round(self, round_: int, lr: float) -> OutsideAlgorithm:
        """Return the algorithm that knows the round and the server's learning rate."""
        return OutsideAlgorithm(self.name, lambda: self.make().of_round(round_, lr))

    def start(self, model: Tensor, shared: Tensor, slot: int) -> Tensor:
        """Return where users start."""
        return _of_one(self.make().start(model, shared, slot), model, self.name)

    def pull(self, shared: Tensor, kept: Tensor | None) -> Tensor | None:
        """Return what users add to their gradients: `[U, P]`, `[P]` where they keep nothing."""
        if kept is None:
            return self.make().pull(shared, None)
        pulls = [self.make().pull(shared, one) for one in _apart(kept)]
        added = [_of_one(pull, one, self.name) for pull, one in zip(pulls, kept, strict=True)]
        return None if all(pull is None for pull in pulls) else _together(added)

    def begun(self, block: Tensor) -> Tensor:
        """Return what it makes of a block of the first model.

        Raises:
            InputError: it fails, or that is no block of the same shape with finite numbers.
        """
        with told_as(f"algorithm.name: {self.name} fails to begin"):
            made = self.make().begun(block.clone())
            whole = made.shape == block.shape and bool(made.isfinite().all())
        if not whole:
            raise InputError(
                f"algorithm.name: {self.name} makes {list(made.shape)} of a block "
                f"{list(block.shape)} of the first model; it must keep its shape, and be finite"
            )
        return made

    def update(self, trained: Trained) -> Tensor:
        """Return the first payload, before clipping: `[U, P]`."""
        made = [
            _of_one(self.make().update(one), one.updates[0], self.name) for one in _users(trained)
        ]
        return _together(made)

    def sent(self, trained: Trained) -> list[Tensor]:
        """Return every payload but the update, before clipping: `[U, P]` each."""
        found = []
        for one in _users(trained):
            payloads = self.make().sent(one)
            if len(payloads) != len(self.payloads) - 1:
                raise InputError(
                    f"algorithm.name: {self.name} sends {len(payloads)} payloads beside the "
                    f"update, and says that it sends {', '.join(self.payloads[1:]) or 'none'}"
                )
            found.append([_of_one(each, one.updates[0], self.name) for each in payloads])
        return [_together(each) for each in zip(*found, strict=True)]

    def kept(self, trained: Trained, sent: list[Tensor]) -> Tensor:
        """Return what users keep: `[U, P]`."""
        own = []
        for user, one in enumerate(_users(trained)):
            kept = self.make().kept(one, [each[user : user + 1].clone() for each in sent])
            own.append(_of_one(kept, one.updates[0], self.name))
        return _together(own)

    def server(self, averages: list[Tensor], shared: Tensor, fraction: float) -> Tensor:
        """Return what the server keeps after a round."""
        return self.make().server(averages, shared, fraction)


def _users(trained: Trained) -> Iterator[Trained]:
    """Yield what the steps of each user alone have come to."""
    for user in range(len(trained.updates)):
        own = slice(user, user + 1)
        yield replace(
            trained,
            updates=trained.updates[own].clone(),
            steps=trained.steps[own].clone(),
            kept=None if trained.kept is None else trained.kept[own].clone(),
        )


def _apart(vectors: Tensor) -> Iterator[Tensor]:
    """Yield the vector of each user, `[1, P]`, in memory of its own."""
    for user in range(len(vectors)):
        yield vectors[user : user + 1].clone()


def _of_one(vector: Tensor | None, like: Tensor, name: str) -> Tensor:
    """Return one user's vector: `[P]`; zeros for none.

    Raises:
        InputError: it has not one number for each parameter.
    """
    if vector is None:
        return like.new_zeros(like.shape)
    if vector.numel() != like.numel():
        raise InputError(
            f"algorithm.name: {name} makes {list(vector.shape)} of one user's vector; it must "
            f"have {like.numel()} numbers, one a parameter"
        )
    return vector.reshape(like.shape).to(like)


def _together(vectors: Sequence[Tensor]) -> Tensor:
    import torch  # configs are checked where it is not imported

    return torch.stack(list(vectors))
