"""An accountant for who stays with Flower's own wrappers: a ledger, RDP and PLD, and a true claim.

Flower's fixed-clipping wrappers draw a fixed number of nodes, by a generator that nobody seeds in
secret, and accept accountants without amplification alone: none is claimed here either. What they
call add-or-remove-one holds for a node whose update becomes zero. A node that is gone is replaced
by another in a cohort of fixed size, and one that is exchanged moves the sum just as far: by 2C.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    PrivacySpent,
    SamplingMethod,
)

from fedpriv.errors import InputError
from fedpriv.privacy.charging import Cost, charge
from fedpriv.privacy.clipping import GlobalClipping
from fedpriv.privacy.composition import Account
from fedpriv.privacy.ledger import Header, Release
from fedpriv.privacy.loop_ledger import loop_ledger, require_small
from fedpriv.privacy.mechanisms.gaussian import CentralMechanism, GaussianMechanism
from fedpriv.privacy.sampling import Adjacency, FullParticipation


class PrivacyAccountant:
    """What Flower's wrappers take as their `accountant`: a `flwr.serverapp.PrivacyAccountant`.

        accountant = PrivacyAccountant(
            population=100, delta=1e-3, clipping_norm=0.1, ledger="runs/mine.jsonl"
        )
        DifferentialPrivacyServerSideFixedClipping(
            FedAvg(...), noise_multiplier, 0.1, num_sampled_clients, accountant=accountant
        )

    A release is on the disk before the wrapper hands it on. An app that is started again goes on
    with the same ledger, whose releases all count.
    """

    def __init__(
        self,
        *,
        population: int,
        delta: float,
        clipping_norm: float,
        ledger: str | Path,
        max_epsilon: float | None = None,
        adjacency: Literal["replace_one", "zero_out"] = "replace_one",
    ) -> None:
        """Begin a ledger, or go on with it.

        Args:
            population: N, public.
            delta: δ.
            clipping_norm: C, the wrapper's own.
            ledger: the ledger's file.
            max_epsilon: the budget; the wrapper does not run the round that would exceed it.
            adjacency: replace_one covers a node that is exchanged, added or removed; zero_out a
                node whose update becomes zero, which is what Flower's own figure comes to.

        Raises:
            InputError: the numbers are impossible, or the file is another ledger.
        """
        if adjacency not in ("replace_one", "zero_out"):
            raise InputError(
                f"adjacency: {adjacency} is not earned: a wrapper's cohort has a fixed size, so "
                "that another node takes the place of one that is gone; write replace_one, which "
                "covers it, or zero_out"
            )
        try:
            self._config = PrivacyConfig(
                target_delta=delta,
                population_size=population,
                neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
                sampling_method=SamplingMethod.NO_AMPLIFICATION,
                max_epsilon=max_epsilon,
            )
        except ValueError as error:
            raise InputError(f"PrivacyAccountant: {error}") from None
        require_small(delta, population, "population")
        self._sampling = FullParticipation(population, Adjacency(adjacency))
        self._bound, path = clipping_norm, Path(ledger)
        header = Header("", population, delta, adjacency, mode="deployment")
        self._ledger = loop_ledger(path, header)

    @property
    def config(self) -> PrivacyConfig:
        """What Flower's wrapper looks at."""
        return self._config

    @property
    def num_releases(self) -> int:
        """How many releases the ledger charges."""
        return len(self._ledger)

    def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
        """Charge the ledger, durably, for `count` releases."""
        for _ in range(count):
            self._ledger.append(self._release(event, len(self._ledger) + 1))

    def get_epsilon(self, delta: float) -> float:
        """Return the smallest ε that RDP or PLD proves for all releases."""
        return self._cost(delta).epsilon

    def get_delta(self, epsilon: float) -> float:
        """Return δ at `epsilon`, by bisection over `get_epsilon`, never below the truth."""
        low, high = -300.0, 0.0
        for _ in range(60):
            middle = (low + high) / 2
            fits = self._cost(10**middle).epsilon <= epsilon
            low, high = (low, middle) if fits else (middle, high)
        return float(10**high)

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """Return what all releases cost, and which accountant proves it."""
        delta = self._config.target_delta if delta is None else delta
        cost = self._cost(delta)
        by_rdp = cost.accountant == "rdp"
        order = cost.best_order if by_rdp else None
        return PrivacySpent(cost.epsilon, delta, self.num_releases, cost.accountant, order)

    def would_exceed(
        self, event: GaussianPrivacyEvent, max_epsilon: float | None = None, count: int = 1
    ) -> bool:
        """Return whether `count` more releases would cost more than the budget."""
        budget = self._config.max_epsilon if max_epsilon is None else max_epsilon
        if budget is None:
            raise ValueError("write max_epsilon, here or for the accountant")
        more = [self._release(event, len(self._ledger) + 1 + i) for i in range(count)]
        return self._cost(self._config.target_delta, more).epsilon > budget

    def state_dict(self) -> dict[str, object]:
        """Return where the ledger is, which holds all there is."""
        return {"ledger": str(self._ledger.path), "releases": len(self._ledger)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Check that the ledger has at least the releases of a state.

        Raises:
            ValueError: it has fewer: it is another one.
        """
        if not isinstance(known := state.get("releases"), int) or known > len(self._ledger):
            raise ValueError(f"{self._ledger.path} lacks releases of that state")

    def _release(self, event: GaussianPrivacyEvent, number: int) -> Release:
        if event.population_size != self._sampling.population:
            raise ValueError(
                f"population_size is {event.population_size}, and the ledger's is "
                f"{self._sampling.population}"
            )
        gaussian = GaussianMechanism(event.noise_multiplier, GlobalClipping(self._bound))
        return Release.of(number, 0, CentralMechanism(self._sampling, gaussian), "")

    def _cost(self, delta: float, more: list[Release] | None = None) -> Cost:
        if not len(self._ledger) and not more:
            return Cost(delta, 0.0, "rdp", 0.0)
        account = Account("", self._ledger.header, (*self._ledger, *(more or ())))
        return charge(account.events(), account.adjacency, [delta]).first
