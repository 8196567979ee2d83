"""Local differential privacy: every user adds noise of full strength before anything leaves it.

Nobody is trusted (Kasiviswanathan et al. 2011). What is accounted is a user's message alone, so
neither the other users' noise nor the sampling of users makes it cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fedpriv.privacy.mechanisms.base import (
    Facts,
    Mechanism,
    PaidByTheDrawn,
    Sentences,
    drawn_anew,
    own_seeds,
    worst_and_median,
)
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.privacy.randomness import Purpose, Randomness, id_words
from fedpriv.privacy.sampling import Adjacency, FullParticipation, Sampling

if TYPE_CHECKING:
    import dp_accounting

    from fedpriv.privacy.ledger import Release


@dataclass(frozen=True)
class UsersNoise:
    """The noise of each of a node's users, of the full strength of `gaussian`.

    Every user adds noise, whatever became of its update: one that contributes zero, since it has
    no usable data or its update is not finite, must not be recognised by its message.
    """

    gaussian: GaussianMechanism

    def draws(
        self,
        sizes: Sequence[int],
        secret: Randomness,
        draw: tuple[int, int],
        node: int,
        user_ids: Sequence[str],
    ) -> Iterator[Tensor]:
        """Yield the noise of one user after another."""
        for user_id in user_ids:
            generator = secret.numpy(Purpose.USER_NOISE, *draw, *id_words(user_id))
            yield self.gaussian.noise(sizes, generator)


@dataclass(frozen=True)
class LocalMechanism(PaidByTheDrawn):
    """A user's message: its contribution of norm at most C, plus N(0, (zC)² I).

    The guarantee is about a user's data alone: any data exchanged for any other move the
    message by up to 2C. That a user takes part is public, so who was drawn pays.
    """

    kind = "users"
    header: ClassVar = {**Mechanism.header, "noise_by": "users"}
    label = "noise by users"
    in_sums = True
    payer: ClassVar[str] = "user"
    trust: ClassVar[str] = (
        "Trust model: local. Nobody is trusted: each user adds noise of full strength to its own "
        "contribution before it leaves the user."
    )
    for_whom = " for a user that takes part in each"
    whose = "each user pays for the rounds in which it was drawn; the worst has spent:"
    seen = "message of a user"

    @property
    def adjacency(self) -> Adjacency:
        """The data of one user exchanged for any other data."""
        return Adjacency.REPLACE_ONE

    @property
    def contributions(self) -> float:
        """A message has one."""
        return 1.0

    def largest_sums(self, users: int, sizes: Sequence[int]) -> tuple[float, ...]:
        """Return users·C and what the noise of so many of them may come to."""
        noise = math.sqrt(users) * self.gaussian.largest_noise(sizes)
        return tuple(most + noise for most in super().largest_sums(users, sizes))

    def event(self) -> dp_accounting.DpEvent:
        """Return the event of one message for the one user who sends it: multiplier z/2.

        It is not sampled: whoever receives the message knows that it was sent.
        """
        return _message(self.gaussian)

    def record(self, payers: tuple[int, ...] | None) -> dict[str, Any]:
        """Return the record of a message by each of `payers`."""
        return super().record(payers) | {"users": payers}

    @classmethod
    def event_of(cls, release: Release, gaussian: GaussianMechanism) -> dp_accounting.DpEvent:
        """Return the event for one of those who took part."""
        return _message(gaussian)

    @classmethod
    def headline(cls, private: str) -> str:
        """Return the claim for one user."""
        return (
            f"All that any one user sent is together {private} for that user, whoever received it "
            "(local differential privacy), as the assumptions below say."
        )

    @classmethod
    def unknown(cls, sampling: Sampling) -> str:
        """Return nothing: whoever receives a message knows who sent it."""
        return ""

    @classmethod
    def drawn(cls, release: Release) -> str:
        """Return whose messages they are."""
        return f"messages of the users drawn, of {release.population:,}"

    @classmethod
    def sentences(cls, facts: Facts) -> Sentences:
        """Return what is said of users with noise of their own."""
        assert facts.costs is not None
        return {
            "unit": (
                f"One user: all its data, out of a population of {facts.population:,}. Each user "
                "spends an ε of its own, for the rounds in which it was drawn.",
                worst_and_median(facts.costs, "user"),
                f"{facts.who} That a user takes part, and when, is public.",
            ),
            "adjacency": (
                "Replace one: the data of one user exchanged for any other data, or for none.",
                "Its message then moves by up to 2C, twice the clip bound, and the noise is "
                "accounted against that. The noise of other users counts for nothing.",
            ),
            "trust": cls._who_sees_what(facts),
            "mechanism": _mechanism(facts),
            "sampling": (
                f"{drawn_anew(facts.sampling, 'user')} Whoever receives a message knows who sent "
                "it, so no amplification by sampling is claimed; a user that was drawn pays, "
                "whether or not its node answered.",
            ),
            "randomness": own_seeds(facts, "user"),
        }

    @classmethod
    def _who_sees_what(cls, facts: Facts) -> tuple[str, ...]:
        # A deployment pays before it asks; a simulation when the sums are there.
        sent = (
            "a user ever sent"
            if facts.deployed
            else "a user sent in rounds that were finished, here or after a resume"
        )
        where = (
            "A node trains its users and adds their noise, so it must be the user's own device, or "
            "trusted by it. Clip bound, noise multiplier and the ledger come from the server: a "
            "user that does not take its word must check what it is sent, and count its rounds "
            "itself."
            if facts.deployed
            else "In this simulation the users of a node run in one process and their noisy "
            "messages are added up there, which is post-processing."
        )
        return (
            cls.trust,
            f"The guarantee covers every message that {sent}, and every model made from it. "
            "An ε by noise that others add trusts them: it is another quantity and must not be "
            "compared with this one.",
            where,
        )


def _message(gaussian: GaussianMechanism) -> dp_accounting.DpEvent:
    return FullParticipation(1, Adjacency.REPLACE_ONE).event(gaussian)


def _mechanism(facts: Facts) -> tuple[str, ...]:
    return (
        f"Local noise: {facts.update} so that a user's contribution to a round has an L2 norm of "
        "at most C; a NaN or infinite update, or a user without usable data, contributes zero.",
        f"Gaussian noise N(0, σ²), σ = {facts.release.stddev:.4g}, is added to each coordinate "
        "of every contribution, zero or not, before it leaves the user. The server adds none.",
        "The sum is divided by the expected cohort size, which is public. The server optimizer "
        f"({facts.optimizer}) and everything after it are post-processing.",
    )
