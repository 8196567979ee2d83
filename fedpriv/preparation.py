"""What a run does and what its nodes train with, built and checked before anything starts.

Neither Flower and Ray nor the optimizers are imported here, which takes as long as all of it.
What nodes train with is there first, in a moment; the plan takes seconds, in which Ray can start.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedpriv.algorithms.registry import ALGORITHMS
from fedpriv.config import ExperimentConfig
from fedpriv.errors import InputError
from fedpriv.federation.builders import build_trainer, population_of
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.registry import MODELS
from fedpriv.models.trained_part import frozen_of, start_of
from fedpriv.selection import require_public
from fedpriv.training.checkpoint import digest_of
from fedpriv.training.cohort import CohortTrainer
from fedpriv.training.stack_size import Room, fitting_stack, measured_stack

if TYPE_CHECKING:
    from torch import nn

    from fedpriv.data.federated import FederatedDataset
    from fedpriv.federation.plan import Plan


def ready_trainer(
    config: ExperimentConfig, seeded: bool = True
) -> tuple[ExperimentConfig, CohortTrainer]:
    """Build and check data, model and local training; writes nothing.

    Returns the config, with what the machine decides of it, and the trainer.

    Args:
        config: the config; where it has a seed model, one from `with_seed_model`.
        seeded: False leaves the seed model unread, where a checkpoint will take its place.

    Raises:
        InputError: data, model, settings of the machine, or a δ or cohort for so many users are
            impossible.
    """
    if config.app is not None:
        raise InputError(
            "app: this run is of a Flower app with code of its own; start that app again, and it "
            "goes on"
        )
    trainer = build_trainer(config, _without_users(config))
    # The plan asks it too, when Ray may be starting already.
    config.check_population(population_of(config, trainer.dataset))
    require_public(config, trainer.dataset.facts)
    if config.runtime.stack == "measure" or (
        config.runtime.stack is None and trainer.device.type == "cuda"
    ):
        stack = _stack(config, trainer) if trainer.stacked else 1
        runtime = config.runtime.model_copy(update={"stack": stack})
        config = config.model_copy(update={"runtime": runtime})
        trainer = replace(trainer, stack=stack)
    # Where not all is trained every process has begun with it.
    if seeded and config.seed_model is not None and config.model.train == "all":
        from fedpriv.seed_model import load_seed_model

        load_seed_model(config, trainer.model)
    if seeded and config.model.reads_data:
        from fedpriv.training.eva import begin_with_public

        begin_with_public(trainer, config.evaluation.batch_size, config.seed)
    if seeded:
        _begin(trainer)
    return _with_digests(config, trainer.model, seeded), trainer


def _begin(trainer: CohortTrainer) -> None:
    """Make of the model what the algorithm begins with.

    Raises:
        InputError: signs are trained, and a matrix has none.
    """
    for name, block in parameters_of(trainer.model).items():
        if (begun := trainer.algorithm.begun(block)) is not block:
            block.copy_(begun)
        if trainer.algorithm.signs and block.dim() > 1 and not block.any():
            raise InputError(
                f"algorithm.name: signs alone are trained, and {name} begins with zeros, which "
                "would stay: write model.train other than lora, model.initialise: fedpriv, or "
                "another algorithm"
            )


def _with_digests(config: ExperimentConfig, model: nn.Module, seeded: bool) -> ExperimentConfig:
    """Return the config with the digests of what is not trained and of what all begins with.

    Two simulations from other numbers must not share noise. What our own models begin with follows
    from the seed or the seed model, unless it follows from examples; a builder from outside may
    read it from anywhere, and an algorithm from outside make anything of it.

    Raises:
        InputError: the config is of a run that began with other numbers.
    """
    frozen, said = frozen_of(model), config.model
    start = said.start_sha256
    # Where a checkpoint takes its place nobody needs what the run began with.
    made = (MODELS.of(said), ALGORITHMS.of(config.algorithm))
    if seeded and (said.reads_data or any(each.origin is not None for each in made)):
        start = digest_of(start_of(model))
        if said.start_sha256 not in (None, start):
            same = "it the same examples" if said.reads_data else "what makes it the same weights"
            raise InputError(
                f"model.start_sha256: {said.name} begins with other numbers now than this config "
                f"says; give {same}, or, for a new run, leave start_sha256 out"
            )
    return config.begun_with(digest_of(frozen) if frozen else said.frozen_sha256, start)


def _without_users(config: ExperimentConfig) -> FederatedDataset | None:
    """Return what the server of a deployment knows of the data, where a file holds all of it."""
    if config.evaluation.held_out is None:
        return None
    from fedpriv.held_out import read_held_out

    return read_held_out(config.evaluation.held_out, config.data.name)


def plan_for(config: ExperimentConfig, trainer: CohortTrainer) -> Plan:
    """Return the plan of what `ready_trainer` has built; writes nothing.

    Raises:
        InputError: the privacy settings are impossible.
    """
    # Imported here: it takes a second.
    from fedpriv.federation.plan import build_plan

    population, layout = population_of(config, trainer.dataset), Layout.of(trainer.model)
    data = "" if config.runtime.deployment else trainer.dataset.digest()
    return build_plan(config, population, layout, data, trainer.dataset.user_ids)


def _stack(config: ExperimentConfig, trainer: CohortTrainer) -> int:
    """Return how many users to stack, where that depends on the machine."""
    runtime = config.runtime
    if trainer.device.type != "cuda":
        return measured_stack(trainer, runtime.stack_mib * 2**20)
    room = Room.on_gpu(trainer, runtime.gpus_per_worker or 1 / runtime.workers)
    most = fitting_stack(trainer, room)
    if runtime.stack == "measure":
        return measured_stack(trainer, most * room.each, most)
    return most
