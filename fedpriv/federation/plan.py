"""A config becomes the plan of a run: sampling, mechanism and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import cast

import torch
from dp_accounting import DpEvent
from torch import Tensor
from torch.nn import Parameter

from fedpriv.algorithms.base import Algorithm
from fedpriv.config import ExperimentConfig
from fedpriv.errors import InputError
from fedpriv.federation.builders import (
    build_adaptive,
    build_algorithm,
    build_gaussian,
    build_randomness,
    build_shares,
    build_turns,
    example_level_of,
)
from fedpriv.models.parameters import Layout
from fedpriv.optimizers.schedules import factor
from fedpriv.optimizers.server import ServerConfig
from fedpriv.privacy.advice import delta_advice, epsilon_advice
from fedpriv.privacy.allocation import NEEDED
from fedpriv.privacy.calibration import noise_multiplier_for
from fedpriv.privacy.charging import Budget, Cost, charge
from fedpriv.privacy.clipping import AdaptiveBounds, GlobalClipping, Unclipped
from fedpriv.privacy.factorizations import Workload
from fedpriv.privacy.ledger import Release
from fedpriv.privacy.mechanisms.allocated import AllocatedMechanism
from fedpriv.privacy.mechanisms.base import Mechanism, NoiseSource
from fedpriv.privacy.mechanisms.gaussian import CentralMechanism, GaussianMechanism
from fedpriv.privacy.mechanisms.local import LocalMechanism
from fedpriv.privacy.mechanisms.noise_trial import require_noise
from fedpriv.privacy.mechanisms.options import SERVER_NOISE
from fedpriv.privacy.mechanisms.outside import ToldSource, require_recorded, told
from fedpriv.privacy.mechanisms.scheduled import ScheduledSilos
from fedpriv.privacy.mechanisms.shares import SharedMechanism
from fedpriv.privacy.mechanisms.silos import SiloMechanism
from fedpriv.privacy.options import PrivacyConfig
from fedpriv.privacy.randomness import Randomness
from fedpriv.privacy.sampling import Adjacency, RandomAllocation, Sampling, build_sampling
from fedpriv.privacy.sampling_options import SAMPLINGS
from fedpriv.privacy.turns import Turn


@dataclass(frozen=True)
class Plan:
    """What a run does in every round. All of it is public.

    Attributes:
        config: the config it was made from.
        mechanism: who takes part, the clip bound, who adds which noise, and what this costs whom.
        layout: names and shapes of the model's blocks.
        randomness: where sampling and noise come from.
        data: the digest of the users' data, private; "" in a deployment.
    """

    config: ExperimentConfig
    mechanism: Mechanism
    layout: Layout
    randomness: Randomness
    data: str

    @property
    def sampling(self) -> Sampling:
        """Who takes part in a round."""
        return self.mechanism.sampling

    @property
    def fraction(self) -> float:
        """The expected share of users in a round."""
        return self.sampling.expected_cohort / self.sampling.population

    @property
    def algorithm(self) -> Algorithm:
        """What users compute, keep and send, and what the server does with it."""
        return build_algorithm(self.config)

    @property
    def sizes(self) -> list[int]:
        """Numbers of each block of a round's sum: of all payloads, or slots, one after another."""
        return self.layout.sizes * self.algorithm.vectors

    def sum_in(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return the sum of all updates in the `vectors` of a round's sum: `[P]`, of all slots."""
        slots = self.algorithm.slots
        return vectors[0] if slots == 1 else torch.stack(list(vectors[:slots])).sum(0)

    def update_in(self, averages: Sequence[Tensor]) -> Tensor:
        """Return the update that the server makes of a round's released `averages`: `[P]`."""
        algorithm = self.algorithm
        if algorithm.slots == 1:
            return averages[0]
        return algorithm.combined(torch.stack(list(averages[: algorithm.slots])))

    @property
    def fingerprint(self) -> str:
        """What names the run: the digest of its config and of the users' data."""
        return self.config.fingerprint(self.data)

    @property
    def adjacency(self) -> Adjacency:
        """The adjacency under which ε holds."""
        return self.mechanism.adjacency

    @property
    def adaptive(self) -> AdaptiveBounds | None:
        """How the clip bounds follow the norms; None where they are fixed."""
        return build_adaptive(self.config.privacy.clipping) if self.config.privacy else None

    @property
    def budget(self) -> float | None:
        """The ε that the run may not exceed; None for no budget."""
        return self.config.privacy.budget.epsilon if self.config.privacy else None

    @property
    def delta(self) -> float | None:
        """The δ at which ε is reported; None without privacy."""
        return self.config.privacy.delta if self.config.privacy else None

    @property
    def limit(self) -> Budget | None:
        """The budget with all that it is held against; None for no budget."""
        privacy = self.config.privacy
        if privacy is None or privacy.budget.epsilon is None:
            return None
        return Budget(
            privacy.budget.epsilon,
            privacy.delta,
            self.adjacency,
            privacy.accountants,
            self.mechanism.paid(self.config.rounds),
        )

    def planned_cost(self) -> Cost | None:
        """Return what all planned rounds cost; None without privacy.

        Where silos or users pay apart it is that of one that takes part in every round.
        """
        privacy = self.config.privacy
        if privacy is None:
            return None
        with told(self.mechanism):
            event, paid = self.mechanism.charged(self.config.rounds)
        return charge({event: paid}, self.adjacency, [privacy.delta], privacy.accountants).first

    def affordable_rounds(self) -> int:
        """Return how many of the planned rounds the budget allows whoever has to pay most."""
        if self.limit is None:
            return self.config.rounds
        with told(self.mechanism):
            return self.mechanism.affordable(self.limit, self.config.rounds)

    def as_begun(self, releases: Iterable[Release]) -> Plan:
        """Return the plan of a run that goes on after `releases`: see `Mechanism.as_begun`.

        Raises:
            InputError: they do not say enough to go on.
        """
        first = next(iter(releases), None)
        if first is None:
            return self
        with told(self.mechanism):
            return replace(self, mechanism=self.mechanism.as_begun(first))

    def noise(self, attempts: Callable[[int], int]) -> NoiseSource:
        """Return where the server's noise comes from: see `Mechanism.noise`.

        Raises:
            InputError: the code of a mechanism from outside failed.
        """
        with told(self.mechanism):
            source = self.mechanism.noise(self.sizes, self.randomness, attempts)
        return ToldSource(source, self.mechanism)

    def advice(self) -> tuple[str, ...]:
        """Return what to know of a δ, an ε or an accountant that promises less than it could."""
        cost = self.planned_cost()
        if cost is None or cost.delta is None:
            return ()
        of_delta = None
        if (protected := self.mechanism.protected) is not None:
            of_delta = delta_advice(cost.delta, *protected)
        unlisted = self.config.privacy and "pld" not in self.config.privacy.accountants
        missing = None if unlisted else cost.without_pld
        return tuple(filter(None, (of_delta, epsilon_advice(cost.epsilon), missing)))


def build_plan(
    config: ExperimentConfig,
    population: int,
    layout: Layout,
    data: str,
    user_ids: Sequence[str] = (),
) -> Plan:
    """Return the plan of `config` for `population` users and a model of `layout`.

    `data` is the digest of the users' data, "" in a deployment; `user_ids` are those of a
    simulation's users, by place.

    Raises:
        InputError: δ or cohort do not fit the population, or no noise reaches the target ε.
    """
    config.check_population(population)
    randomness = build_randomness(config, data)
    if config.privacy is None:
        kind = "all" if config.cohort is None else "poisson"
        sampling = build_sampling(kind, population, config.cohort)
        silent = CentralMechanism(sampling, GaussianMechanism(0.0, Unclipped()))
        return Plan(config, silent, layout, randomness, data)
    make = _with_gaussian(config, config.privacy, population, user_ids)
    mechanism = _mechanism(config, config.privacy, layout, make)
    return Plan(config, mechanism, layout, randomness, data)


def _mechanism(
    config: ExperimentConfig,
    privacy: PrivacyConfig,
    layout: Layout,
    make: Callable[[GaussianMechanism], Mechanism],
) -> Mechanism:
    """Return the mechanism, with z as it is given or calibrated for whoever has to pay most.

    Which silos, or users with noise of their own, are drawn is not known before the run: it is
    calibrated for one that is in every round.
    """
    z = _noise_multiplier(privacy, config.rounds, make)
    contributions = make(GaussianMechanism(z, GlobalClipping(1.0))).contributions
    mechanism = make(build_gaussian(config, z, layout, contributions))
    if SERVER_NOISE.of(privacy.mechanism).origin is not None:
        sizes = layout.sizes * build_algorithm(config).vectors
        require_noise(mechanism, sizes, config.rounds)
    return mechanism


def _with_gaussian(
    config: ExperimentConfig, privacy: PrivacyConfig, population: int, user_ids: Sequence[str]
) -> Callable[[GaussianMechanism], Mechanism]:
    """Return what makes the mechanism of `config` of its clip bound and noise."""
    wanted = privacy.sampling
    drawn = partial(SAMPLINGS.of(wanted).build, wanted, population=population)
    if privacy.unit == "example":
        if find_spec("opacus") is None:
            raise InputError("privacy.unit: example needs Opacus: pip install 'fedpriv[opacus]'")
        silos, turns = drawn(), _turns(config, population)

        def of_silos(gaussian: GaussianMechanism) -> Mechanism:
            level = example_level_of(config, gaussian)
            # Silos that divide by their own size are checked as they train.
            level.check_delta(privacy.delta, examples=0)
            if turns is None:
                return SiloMechanism.of(silos, level)
            return ScheduledSilos(silos, gaussian, level, turns)

        return of_silos
    if privacy.noise_by == "users":
        return partial(LocalMechanism, drawn())
    sampling = drawn(adjacency=_adjacency(config))
    if privacy.noise_by == "nodes":
        return partial(SharedMechanism, sampling, shares=build_shares(config))
    if isinstance(sampling, RandomAllocation):
        if "pld" in privacy.accountants and find_spec("PLD_accounting") is None:
            raise InputError(
                f"privacy.sampling.kind: random_allocation needs {NEEDED}; or write "
                "privacy.accountants: [rdp], which proves a larger ε"
            )
        return partial(AllocatedMechanism, sampling)
    component = SERVER_NOISE.of(privacy.mechanism)
    fitted = getattr(privacy.mechanism, "factorization", "square_root") != "square_root"
    workload = workload_of(config.server, config.rounds) if fitted else None

    def of_the_server(gaussian: GaussianMechanism) -> Mechanism:
        facts = {
            "sampling": sampling,
            "gaussian": gaussian,
            "user_ids": user_ids,
            "workload": workload,
        }
        try:
            mechanism = component.build(privacy.mechanism, **facts)
        except ValueError as error:
            raise InputError(f"privacy.mechanism: {error}") from None
        if component.origin is not None:
            require_recorded(mechanism, sampling, gaussian)
        return cast(Mechanism, mechanism)

    return of_the_server


def _turns(config: ExperimentConfig, population: int) -> tuple[Turn, ...] | None:
    """Return the schedule of the run's silos; None where they are drawn.

    Raises:
        InputError: it is of another number of silos.
    """
    algorithm = build_algorithm(config)
    if algorithm.scheduled and len(algorithm.shared) != population:
        raise InputError(
            f"algorithm.seconds: {len(algorithm.shared)} numbers, and there are {population} silos "
            "in the data: write one for each"
        )
    return build_turns(config, config.rounds)


def workload_of(server: ServerConfig, rounds: int) -> Workload:
    """Return what `server` makes of the noise of all rounds: A_ts = Σ_{s≤u≤t} η_u β^(u-s).

    Of an optimizer that is not linear it is what its momentum β and rates η alone would make of it.
    Local learning rates are not in it: noise is added to updates that are clipped already.
    """
    from fedpriv.optimizers.registry import server_optimizer  # it takes a second

    rates = tuple(factor(server.schedule, round_, rounds) for round_ in range(1, rounds + 1))
    trial = [Parameter(torch.zeros(1, 1))]
    defaults = server_optimizer(server.optimizer, trial, server.lr, server.options).defaults
    momentum = defaults.get("momentum") or (defaults.get("betas") or (0.0,))[0]
    return Workload(rates, float(momentum))


def _adjacency(config: ExperimentConfig) -> Adjacency | None:
    """Return the adjacency of users that the config names or implies; None: the sampling's own.

    Where the data say how many users there are, their number is no secret: a user may become
    empty, and not be absent.
    """
    assert config.privacy is not None
    if config.privacy.adjacency is not None:
        return Adjacency(config.privacy.adjacency)
    by_the_data = config.data.users is None and config.privacy.sampling.kind != "fixed_size"
    return Adjacency.ZERO_OUT if by_the_data else None


def _noise_multiplier(
    privacy: PrivacyConfig, rounds: int, make: Callable[[GaussianMechanism], Mechanism]
) -> float:
    """Return z, as given or calibrated: the event depends on z alone, not on bounds or counts."""
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.target_epsilon is not None

    def at(z: float) -> Mechanism:
        return make(GaussianMechanism(z, GlobalClipping(1.0)))

    def event(z: float) -> DpEvent:
        mechanism = at(z)
        with told(mechanism):
            return mechanism.event()

    try:
        return noise_multiplier_for(
            privacy.target_epsilon,
            privacy.delta,
            at(1.0).paid(rounds),
            at(1.0).adjacency,
            event,
            privacy.accountants,
        )
    except ValueError as error:
        raise InputError(f"privacy.target_epsilon: {error}") from None
