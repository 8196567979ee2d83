"""A config becomes the plan of a run: sampling, mechanism and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import dp_accounting

from fedpriv.config import ExperimentConfig, PrivacyConfig
from fedpriv.data.federated import FederatedDataset
from fedpriv.errors import InputError
from fedpriv.federation.parts import (
    build_adaptive,
    build_example_level,
    build_mechanism,
    build_randomness,
    build_shares,
)
from fedpriv.privacy.advice import delta_advice, epsilon_advice
from fedpriv.privacy.calibration import noise_multiplier_for
from fedpriv.privacy.charging import Budget, Cost, affordable, charge
from fedpriv.privacy.clipping import AdaptiveBounds, GlobalClipping, Unclipped
from fedpriv.privacy.example_level import ExampleLevel, steps_event
from fedpriv.privacy.mechanisms import GaussianMechanism
from fedpriv.privacy.noise_shares import NoiseShares
from fedpriv.privacy.randomness import Randomness
from fedpriv.privacy.sampling import Adjacency, Sampling, build_sampling
from fedpriv.privacy.user_noise import UserNoise
from fedpriv.training.parameters import Layout


@dataclass(frozen=True)
class Plan:
    """What a run does in every round. All of it is public.

    Attributes:
        config: the config it was made from.
        sampling: who takes part, and the event that this costs users.
        mechanism: the clip bound and the noise.
        layout: names and shapes of the model's blocks.
        randomness: where sampling and noise come from.
        data: the digest of the users' data, private; "" in a deployment.
        level: where those whom `sampling` draws add the noise of `mechanism` themselves and each
            pays alone: what silos do with their examples, or users with their contribution, and
            the event that this costs one of them. None where all users pay.
        shares: how nodes add the noise of `mechanism`; None where they do not.
    """

    config: ExperimentConfig
    sampling: Sampling
    mechanism: GaussianMechanism
    layout: Layout
    randomness: Randomness
    data: str
    level: ExampleLevel | UserNoise | None = None
    shares: NoiseShares | None = None

    @property
    def fingerprint(self) -> str:
        """What names the run: the digest of its config and of the users' data."""
        return self.config.fingerprint(self.data)

    @property
    def adjacency(self) -> Adjacency:
        """The adjacency under which ε holds."""
        return self.level.adjacency if self.level else self.sampling.adjacency

    def event(self) -> dp_accounting.DpEvent:
        """Return the event of one round for a user, or for one of `level` that takes part."""
        return self.level.event() if self.level else self.sampling.event(self.mechanism)

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
            self.config.rounds,
        )

    def planned_cost(self) -> Cost | None:
        """Return what all planned rounds cost; None without privacy.

        With a `level` it is that of a silo, or user, that takes part in every round.
        """
        privacy = self.config.privacy
        if privacy is None:
            return None
        events = {self.event(): self.config.rounds}
        return charge(events, self.adjacency, [privacy.delta], privacy.accountants).first

    def affordable_rounds(self) -> int:
        """Return how many of the planned rounds the budget allows; of a level, one in them all."""
        if self.limit is None:
            return self.config.rounds
        return affordable(self.event(), self.limit, self.config.rounds)

    def advice(self) -> tuple[str, ...]:
        """Return what to know of a δ, an ε or an accountant that promises less than it could."""
        cost = self.planned_cost()
        if cost is None or cost.delta is None:
            return ()
        of_delta = None
        if not isinstance(self.level, ExampleLevel):
            of_delta = delta_advice(cost.delta, self.sampling.population)
        elif self.level.silo_size is not None:
            of_delta = delta_advice(cost.delta, self.level.silo_size, "silo_size")
        unlisted = self.config.privacy and "pld" not in self.config.privacy.accountants
        missing = None if unlisted else cost.without_pld
        return tuple(filter(None, (of_delta, epsilon_advice(cost.epsilon), missing)))


def build_plan(config: ExperimentConfig, population: int, layout: Layout, data: str) -> Plan:
    """Return the plan of `config` for `population` users and a model of `layout`.

    `data` is the digest of the users' data; "" in a deployment.

    Raises:
        InputError: δ or cohort do not fit the population, or no noise reaches the target ε.
    """
    config.check_population(population)
    randomness = build_randomness(config, data)
    if config.privacy is None:
        kind = "all" if config.cohort is None else "poisson"
        sampling = build_sampling(kind, population, config.cohort)
        mechanism = GaussianMechanism(0.0, Unclipped())
        return Plan(config, sampling, mechanism, layout, randomness, data)
    wanted = config.privacy.sampling
    if config.privacy.unit == "example":
        if find_spec("opacus") is None:
            raise InputError("privacy.unit: example needs Opacus: pip install 'fedpriv[opacus]'")
        silos = build_sampling(wanted.kind, population, wanted.expected_cohort)
        level = build_example_level(config, _noise_in_silos(config), layout)
        # Silos that divide by their own size are checked as they train.
        level.check_delta(config.privacy.delta, examples=0)
        return Plan(config, silos, level.mechanism, layout, randomness, data, level)
    if config.privacy.noise_by == "users":
        users = build_sampling(wanted.kind, population, wanted.expected_cohort)
        noise = _noise_of_users(config, layout)
        return Plan(config, users, noise.mechanism, layout, randomness, data, noise)
    sampling = build_sampling(wanted.kind, population, wanted.expected_cohort, _adjacency(config))
    noise_multiplier = _noise_multiplier(
        config.privacy,
        config.rounds,
        sampling.adjacency,
        lambda z: sampling.event(GaussianMechanism(z, GlobalClipping(1.0))),
    )
    mechanism = build_mechanism(config.privacy, noise_multiplier, layout, sampling.expected_cohort)
    shares = build_shares(config) if config.privacy.noise_by == "nodes" else None
    return Plan(config, sampling, mechanism, layout, randomness, data, shares=shares)


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


def _noise_in_silos(config: ExperimentConfig) -> float:
    """Return z of each step, as given, or calibrated for a silo that is in every round.

    Which silos are drawn is not known before the run, and must not make one of them pay more.
    """
    privacy, steps = config.privacy, config.local.steps
    assert privacy is not None
    assert privacy.example is not None
    assert steps is not None
    rate = privacy.example.sampling_rate
    return _noise_multiplier(
        privacy,
        config.rounds,
        Adjacency(privacy.adjacency or "add_or_remove_one"),
        lambda z: steps_event(z, rate, steps),
    )


def _noise_of_users(config: ExperimentConfig, layout: Layout) -> UserNoise:
    """Return the noise of a user, as given, or calibrated for one that is in every round."""
    assert config.privacy is not None
    noise_multiplier = _noise_multiplier(
        config.privacy,
        config.rounds,
        UserNoise.adjacency,
        lambda z: UserNoise(GaussianMechanism(z, GlobalClipping(1.0))).event(),
    )
    return UserNoise(build_mechanism(config.privacy, noise_multiplier, layout))


def _noise_multiplier(
    privacy: PrivacyConfig,
    rounds: int,
    adjacency: Adjacency,
    event_at: Callable[[float], dp_accounting.DpEvent],
) -> float:
    """Return z, as given or calibrated: the event depends on z alone, not on bounds or counts."""
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.target_epsilon is not None
    try:
        return noise_multiplier_for(
            privacy.target_epsilon,
            privacy.delta,
            rounds,
            adjacency,
            event_at,
            privacy.accountants,
        )
    except ValueError as error:
        raise InputError(f"privacy.target_epsilon: {error}") from None


def population_of(config: ExperimentConfig, dataset: FederatedDataset) -> int:
    """Return N: what `data.users` says, else how many users the data set has.

    In a deployment each node has its own users, and only `data.users` can say how many in all.
    Places beyond the users that are there are empty: whoever is drawn for one contributes zero.
    """
    if config.runtime.deployment and config.data.users is None:
        raise InputError("data.users is needed with runtime.deployment: the total of all nodes")
    return config.data.users or dataset.population
