"""A config becomes the objects of a round: sampling, mechanism, trainer, randomness."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F

from fedpriv.config import ClippingConfig, ExperimentConfig, LocalConfig
from fedpriv.data.federated import FederatedDataset
from fedpriv.data.registry import build_dataset
from fedpriv.errors import InputError
from fedpriv.models.registry import build_model
from fedpriv.privacy.accounting import RdpAccountant
from fedpriv.privacy.calibration import affordable_rounds, noise_multiplier_for
from fedpriv.privacy.clipping import (
    SPLITS,
    ClippingRule,
    GlobalClipping,
    PerLayerClipping,
    Unclipped,
)
from fedpriv.privacy.mechanisms import GaussianMechanism
from fedpriv.privacy.randomness import Randomness
from fedpriv.privacy.sampling import Sampling, build_sampling
from fedpriv.training.cohort import CohortTrainer
from fedpriv.training.device import resolve_device
from fedpriv.training.local import LocalTraining
from fedpriv.training.parameters import Layout


@dataclass(frozen=True)
class Plan:
    """What a run does in every round. All of it is public.

    Attributes:
        config: the config it was made from.
        sampling: who takes part, and the event that this costs.
        mechanism: the clip bound and the noise.
        layout: names and shapes of the model's blocks.
        randomness: where sampling and noise come from.
    """

    config: ExperimentConfig
    sampling: Sampling
    mechanism: GaussianMechanism
    layout: Layout
    randomness: Randomness

    @property
    def budget(self) -> float | None:
        """The ε that the run may not exceed; None for no budget."""
        return self.config.privacy.budget.epsilon if self.config.privacy else None

    @property
    def delta(self) -> float | None:
        """The δ at which ε is reported; None without privacy."""
        return self.config.privacy.delta if self.config.privacy else None

    def planned_epsilon(self) -> float | None:
        """Return the RDP ε of all planned rounds; None without privacy."""
        if self.delta is None:
            return None
        accountant = RdpAccountant(self.sampling.adjacency)
        accountant.compose(self.sampling.event(self.mechanism), self.config.rounds)
        return accountant.epsilon(self.delta)

    def affordable_rounds(self) -> int:
        """Return how many of the planned rounds the budget allows."""
        if self.budget is None or self.delta is None:
            return self.config.rounds
        event = self.sampling.event(self.mechanism)
        adjacency = self.sampling.adjacency
        return affordable_rounds(event, adjacency, self.budget, self.delta, self.config.rounds)


def build_plan(config: ExperimentConfig, population: int, layout: Layout) -> Plan:
    """Return the plan of `config` for `population` users and a model of `layout`.

    Raises:
        InputError: δ or cohort do not fit the population, or no noise reaches the target ε.
    """
    config.check_population(population)
    randomness = (
        Randomness.operating_system()
        if config.runtime.deployment
        else Randomness.simulation(config.seed)
    )
    if config.privacy is None:
        kind = "all" if config.cohort is None else "poisson"
        sampling = build_sampling(kind, population, config.cohort)
        return Plan(config, sampling, GaussianMechanism(0.0, Unclipped()), layout, randomness)
    wanted = config.privacy.sampling
    sampling = build_sampling(wanted.kind, population, wanted.expected_cohort)
    clipping = build_clipping(config.privacy.clipping, layout)
    mechanism = GaussianMechanism(config.privacy.noise_multiplier or 0.0, clipping)
    plan = Plan(config, sampling, mechanism, layout, randomness)
    if config.privacy.target_epsilon is None:
        return plan
    return replace(plan, mechanism=_calibrated(plan, config.privacy.target_epsilon))


def _calibrated(plan: Plan, target_epsilon: float) -> GaussianMechanism:
    assert plan.delta is not None
    try:
        noise_multiplier = noise_multiplier_for(
            target_epsilon,
            plan.delta,
            plan.config.rounds,
            plan.sampling.adjacency,
            lambda z: plan.sampling.event(replace(plan.mechanism, noise_multiplier=z)),
        )
    except ValueError as error:
        raise InputError(f"privacy.target_epsilon: {error}") from None
    return replace(plan.mechanism, noise_multiplier=noise_multiplier)


def build_clipping(config: ClippingConfig | None, layout: Layout) -> ClippingRule:
    """Return the clipping rule of `config` for blocks of `layout`; None bounds nothing."""
    if config is None:
        return Unclipped()
    if config.kind == "global":
        return GlobalClipping(config.bound)
    bounds = SPLITS[config.split](config.bound, layout.sizes)
    return PerLayerClipping(config.bound, bounds, config.normalize)


def build_trainer(config: ExperimentConfig) -> CohortTrainer:
    """Return what a node needs to train its users: data, model, recipe, clipping rule."""
    dataset = build_dataset(config.data, config.seed)
    device = resolve_device(config.runtime.device)
    model = build_model(config.model, dataset.input_shape, dataset.classes, config.seed).to(device)
    return CohortTrainer(
        dataset=dataset,
        model=model,
        loss=F.cross_entropy,
        recipe=_recipe(config.local),
        clipping=build_clipping(
            config.privacy.clipping if config.privacy else None, Layout.of(model)
        ),
        seed=config.seed,
        device=device,
    )


def _recipe(config: LocalConfig) -> LocalTraining:
    return LocalTraining(**config.model_dump(exclude={"optimizer"}))


def population_of(config: ExperimentConfig, dataset: FederatedDataset) -> int:
    """Return N; in a deployment each node has its own users and `data.users` says how many."""
    if config.runtime.deployment:
        if config.data.users is None:
            raise InputError("data.users is needed with runtime.deployment: the total of all nodes")
        return config.data.users
    return dataset.population
