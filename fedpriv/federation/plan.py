"""A config becomes the objects of a round: sampling, mechanism, trainer, randomness."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import dp_accounting
from torch import nn

from fedpriv.config import (
    ClippingConfig,
    ExperimentConfig,
    LocalConfig,
    PrivacyConfig,
    RuntimeConfig,
    SpecAugmentConfig,
)
from fedpriv.data.federated import FederatedDataset
from fedpriv.data.registry import build_dataset
from fedpriv.data.speech import FederatedSpeech
from fedpriv.errors import InputError
from fedpriv.models.products import route_products
from fedpriv.models.registry import build_model
from fedpriv.models.speech import HOP_SECONDS
from fedpriv.privacy.accounting import RdpAccountant
from fedpriv.privacy.calibration import affordable_rounds, noise_multiplier_for
from fedpriv.privacy.clipping import (
    SPLITS,
    AdaptiveBounds,
    ClippingRule,
    GlobalClipping,
    PerLayerClipping,
    Unclipped,
    bounds_of,
)
from fedpriv.privacy.error_feedback import Dice, ErrorFeedback, Remainder
from fedpriv.privacy.example_level import ExampleLevel, steps_event
from fedpriv.privacy.mechanisms import CountNoise, GaussianMechanism
from fedpriv.privacy.noise_shares import NoiseShares
from fedpriv.privacy.randomness import Randomness
from fedpriv.privacy.sampling import Adjacency, Sampling, build_sampling
from fedpriv.privacy.user_noise import UserNoise
from fedpriv.training.cohort import CohortTrainer
from fedpriv.training.decoding import decoder
from fedpriv.training.device import resolve_device, set_tf32
from fedpriv.training.local import LocalTraining
from fedpriv.training.parameters import Layout
from fedpriv.training.spec_augment import SpecAugment
from fedpriv.training.stack_size import planned_stack
from fedpriv.training.tasks import Classification, Recognition, Task
from fedpriv.training.user_cache import UserCache


@dataclass(frozen=True)
class Plan:
    """What a run does in every round. All of it is public.

    Attributes:
        config: the config it was made from.
        sampling: who takes part, and the event that this costs users.
        mechanism: the clip bound and the noise.
        layout: names and shapes of the model's blocks.
        randomness: where sampling and noise come from.
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
    level: ExampleLevel | UserNoise | None = None
    shares: NoiseShares | None = None

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

    def planned_epsilon(self) -> float | None:
        """Return the RDP ε of all planned rounds; None without privacy.

        With a `level` it is that of a silo, or user, that takes part in every round.
        """
        if self.delta is None:
            return None
        accountant = RdpAccountant(self.adjacency)
        accountant.compose(self.event(), self.config.rounds)
        return accountant.epsilon(self.delta)

    def affordable_rounds(self) -> int:
        """Return how many of the planned rounds the budget allows; of a level, one in them all."""
        if self.budget is None or self.delta is None:
            return self.config.rounds
        return affordable_rounds(
            self.event(), self.adjacency, self.budget, self.delta, self.config.rounds
        )


def build_plan(config: ExperimentConfig, population: int, layout: Layout) -> Plan:
    """Return the plan of `config` for `population` users and a model of `layout`.

    Raises:
        InputError: δ or cohort do not fit the population, or no noise reaches the target ε.
    """
    config.check_population(population)
    randomness = build_randomness(config)
    if config.privacy is None:
        kind = "all" if config.cohort is None else "poisson"
        sampling = build_sampling(kind, population, config.cohort)
        return Plan(config, sampling, GaussianMechanism(0.0, Unclipped()), layout, randomness)
    wanted = config.privacy.sampling
    if config.privacy.unit == "example":
        if find_spec("opacus") is None:
            raise InputError("privacy.unit: example needs Opacus: pip install 'fedpriv[opacus]'")
        silos = build_sampling(wanted.kind, population, wanted.expected_cohort)
        level = build_example_level(config, _noise_in_silos(config), layout)
        # Silos that divide by their own size are checked as they train.
        level.check_delta(config.privacy.delta, examples=0)
        return Plan(config, silos, level.mechanism, layout, randomness, level)
    if config.privacy.noise_by == "users":
        users = build_sampling(wanted.kind, population, wanted.expected_cohort)
        noise = _noise_of_users(config, layout)
        return Plan(config, users, noise.mechanism, layout, randomness, noise)
    adjacency = Adjacency(config.privacy.adjacency) if config.privacy.adjacency else None
    sampling = build_sampling(wanted.kind, population, wanted.expected_cohort, adjacency)
    noise_multiplier = _noise_multiplier(
        config.privacy,
        config.rounds,
        sampling.adjacency,
        lambda z: sampling.event(GaussianMechanism(z, GlobalClipping(1.0))),
    )
    mechanism = build_mechanism(config.privacy, noise_multiplier, layout, sampling.expected_cohort)
    shares = build_shares(config) if config.privacy.noise_by == "nodes" else None
    return Plan(config, sampling, mechanism, layout, randomness, shares=shares)


def build_randomness(config: ExperimentConfig) -> Randomness:
    """Return where sampling and noise come from."""
    if config.runtime.deployment:
        return Randomness.operating_system()
    return Randomness.simulation(config.seed, config.fingerprint())


def build_example_level(
    config: ExperimentConfig, noise_multiplier: float, layout: Layout
) -> ExampleLevel:
    """Return what happens inside a silo of `config`, whose unit is an example.

    The multiplier is the server's: whoever calibrated it again could get other last digits.

    Raises:
        InputError: the noise on the counts of adaptive clipping costs more than there is.
    """
    privacy, steps = config.privacy, config.local.steps
    assert privacy is not None
    assert privacy.example is not None
    assert steps is not None
    rate, size = privacy.example.sampling_rate, privacy.example.silo_size
    return ExampleLevel(
        mechanism=build_mechanism(privacy, noise_multiplier, layout, size and rate * size),
        sampling_rate=rate,
        steps=steps,
        adjacency=Adjacency(privacy.adjacency or "add_or_remove_one"),
        silo_size=size,
        adaptive=build_adaptive(privacy.clipping),
    )


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


def build_shares(config: ExperimentConfig) -> NoiseShares:
    """Return the shares of noise that the nodes of `config` add."""
    assert config.privacy is not None
    return NoiseShares(config.runtime.workers, config.privacy.lost_nodes)


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
            privacy.target_epsilon, privacy.delta, rounds, adjacency, event_at
        )
    except ValueError as error:
        raise InputError(f"privacy.target_epsilon: {error}") from None


def build_mechanism(
    privacy: PrivacyConfig,
    noise_multiplier: float,
    layout: Layout,
    contributions: float | None = None,
) -> GaussianMechanism:
    """Return the clip bound and the noise of `privacy`.

    `contributions` are how many are expected in a sum; adaptive clipping needs it unless its
    `count_noise` is given.

    Raises:
        InputError: the noise on the counts of adaptive clipping costs more than there is.
    """
    clipping = build_clipping(privacy.clipping, layout)
    if (feedback := build_error_feedback(privacy, layout)) is not None:
        clipping = feedback.contribution(clipping)
    counts = None
    if privacy.clipping.kind == "adaptive":
        number = len(bounds_of(clipping))
        stddev = privacy.clipping.count_noise
        if stddev is None:
            assert contributions is not None
            # A twentieth of the cohort is Andrew et al.'s choice; z keeps the price of the counts
            # in a small cohort to 15% more noise on the updates.
            stddev = max(contributions / 20, noise_multiplier) * math.sqrt(number)
        counts = CountNoise(number, stddev)
    try:
        return GaussianMechanism(
            noise_multiplier, clipping, counts, per_block=privacy.noise == "per_block"
        )
    except ValueError as error:
        raise InputError(f"privacy.clipping: {error}") from None


def build_adaptive(config: ClippingConfig) -> AdaptiveBounds | None:
    """Return how the clip bounds follow the norms; None where they are fixed."""
    if config.kind != "adaptive":
        return None
    return AdaptiveBounds(config.quantile, config.adapt_lr)


def build_clipping(config: ClippingConfig | None, layout: Layout) -> ClippingRule:
    """Return the clipping rule of `config` for blocks of `layout`; None bounds nothing."""
    if config is None:
        return Unclipped()
    if (config.adapts if config.kind == "adaptive" else config.kind) == "global":
        return GlobalClipping(config.bound)
    bounds = SPLITS[config.split](config.bound, layout.sizes)
    return PerLayerClipping(config.bound, bounds, config.normalize)


def build_error_feedback(privacy: PrivacyConfig | None, layout: Layout) -> ErrorFeedback | None:
    """Return how users' memories enter their contributions; None where they keep none."""
    if privacy is None or privacy.error_feedback.kind == "none":
        return None
    feedback = privacy.error_feedback
    if feedback.variant == "remainder":
        return Remainder(feedback.decay, feedback.norm_cap)
    bound = feedback.memory_bound or privacy.clipping.bound
    second = privacy.clipping.model_copy(update={"bound": bound})
    return Dice(build_clipping(second, layout), feedback.decay, feedback.norm_cap)


def build_trainer(config: ExperimentConfig) -> CohortTrainer:
    """Return what a node needs to train its users: data, model, recipe, clipping rule."""
    dataset = build_dataset(config.data, config.seed)
    device = resolve_device(config.runtime.device)
    set_tf32(config.local.precision == "tf32", device)
    if device.type == "cpu" and config.runtime.fast_products:
        route_products()
    model = build_model(config.model, dataset.input_shape, dataset.classes, config.seed).to(device)
    # A running mean (BatchNorm) would carry one user's data into the next user's contribution.
    # A constant, such as a window function, is no part of the model's state.
    if len(model.state_dict()) > len(list(model.parameters())):
        raise InputError(f"model.name: {config.model.name} has buffers that users would share")
    layout = Layout.of(model)
    return CohortTrainer(
        dataset=dataset,
        model=model,
        task=build_task(config, dataset),
        recipe=_recipe(config.local),
        clipping=build_clipping(config.privacy.clipping if config.privacy else None, layout),
        feedback=build_error_feedback(config.privacy, layout),
        seed=config.seed,
        device=device,
        # In a stack the rounding of one user's numbers depends on who else is in it, which local
        # training can amplify: the others' contributions then move with one user's presence.
        engine="sequential" if config.runtime.deployment else config.runtime.engine,
        stack=_stack(config.runtime, model, dataset),
        tolerant=config.runtime.deployment,
        cache=UserCache(config.runtime.cache_mib * 2**20),
        # How long a user takes says something of its data.
        timed=config.runtime.profile and not config.runtime.deployment,
    )


def _stack(runtime: RuntimeConfig, model: nn.Module, dataset: FederatedDataset) -> int:
    """Return the number of users to stack; where it is to be measured, one to begin with."""
    if isinstance(runtime.stack, int):
        return runtime.stack
    memory, long_examples = runtime.stack_mib * 2**20, isinstance(dataset, FederatedSpeech)
    return planned_stack(Layout.of(model).total, memory, long_examples)


def build_task(config: ExperimentConfig, dataset: FederatedDataset) -> Task[Any]:
    """Return what is learnt: recognition of speech, classification of all else."""
    if not isinstance(dataset, FederatedSpeech):
        return Classification()
    return Recognition(
        alphabet=dataset.alphabet,
        decode=decoder(config.evaluation.decoder, config.evaluation.beam),
        spec_augment=build_spec_augment(config.local.spec_augment),
    )


def build_spec_augment(config: SpecAugmentConfig | None) -> SpecAugment | None:
    """Return how features are masked; None for not at all."""
    return None if config is None else SpecAugment(**config.model_dump())


def _recipe(config: LocalConfig) -> LocalTraining:
    shared = config.model_dump(exclude={"optimizer", "batch_seconds", "spec_augment"})
    if config.batch_seconds is None:
        return LocalTraining(**shared)
    return LocalTraining(**shared, batch_sizes=round(config.batch_seconds / HOP_SECONDS))


def population_of(config: ExperimentConfig, dataset: FederatedDataset) -> int:
    """Return N; in a deployment each node has its own users and `data.users` says how many."""
    if config.runtime.deployment:
        if config.data.users is None:
            raise InputError("data.users is needed with runtime.deployment: the total of all nodes")
        return config.data.users
    return dataset.population
