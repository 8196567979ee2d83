"""The ClientApp: a node trains the users that it is sent, or its own, and answers with one sum.

In a simulation any node can train any user. In a deployment a node hosts users of its own: its
`--node-config` gives `partition-id`, `num-partitions` and `data-path`, the folder that holds its
users, who never leave it. Without `data-path` it hosts its share of the config's data set.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpriv.config import ExperimentConfig
from fedpriv.data.federated import Share
from fedpriv.errors import InputError
from fedpriv.federation.messages import (
    Work,
    experiment_of,
    failure_reply,
    hosting_reply,
    sum_reply,
    work_of,
)
from fedpriv.federation.parts import (
    build_example_level,
    build_mechanism,
    build_randomness,
    build_shares,
    build_trainer,
)
from fedpriv.privacy.clipping import with_bounds
from fedpriv.privacy.randomness import Purpose
from fedpriv.privacy.user_noise import UserNoise
from fedpriv.training.cohort import CohortSum, CohortTrainer, train_cohort
from fedpriv.training.device import keep_freed_memory
from fedpriv.training.memory_store import Memories, RoundMemories
from fedpriv.training.own_noise import released_alone, with_share, with_users_noise
from fedpriv.training.parameters import Layout

app = ClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Answer which users this node hosts."""

    def answer() -> Message:
        config = experiment_of(message)
        trainer = _trainer(config, context)
        users = trainer.dataset.population if config.runtime.deployment else None
        return hosting_reply(message, _partition(context), _partitions(context), users)

    return _guarded(message, answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the users that the message names and answer with the sum of their clipped updates.

    Silos answer with the sum of their noisy changes; where nodes or users add the noise, it is in
    the sum.
    """

    def answer() -> Message:
        config, work = experiment_of(message), work_of(message)
        trainer = _trainer(config, context)
        partition = _partition(context)
        if config.privacy is not None and config.privacy.unit == "example":
            return sum_reply(message, partition, _trained_silos(config, work, trainer))
        with _memories(config, work) as memories:
            summed = trained(trainer, work, memories)
        if work.own_noise is not None:
            summed = _noisy(config, work, summed, Layout.of(trainer.model), partition)
        return sum_reply(message, partition, summed)

    return _guarded(message, answer)


def trained(trainer: CohortTrainer, work: Work, memories: RoundMemories | None = None) -> CohortSum:
    """Do the `work` of a round: train its users within its bounds and return their sum."""
    if work.bounds:
        trainer = replace(trainer, clipping=with_bounds(trainer.clipping, work.bounds))
    return train_cohort(trainer, work.parameters, work.users, work.round, memories)


def _noisy(
    config: ExperimentConfig, work: Work, summed: CohortSum, layout: Layout, partition: int
) -> CohortSum:
    """Return the node's sum with the noise that it, or its users, add before it leaves.

    The multiplier is the server's: whoever calibrated it again could get other last digits.
    """
    privacy, own = config.privacy, work.own_noise
    assert privacy is not None
    assert own is not None
    mechanism = build_mechanism(privacy, own.noise_multiplier, layout)
    # In a deployment a source of this node's own, made anew for each message.
    secret = build_randomness(config)
    if privacy.noise_by == "users":
        noise, sizes = UserNoise(mechanism), layout.sizes
        noisy = with_users_noise(summed, noise, sizes, work.users, work.round, own.attempt, secret)
    else:
        generator = secret.numpy(Purpose.NOISE_SHARE, work.round, own.attempt, partition)
        noisy = with_share(summed, build_shares(config), mechanism, layout.sizes, generator)
    return released_alone(noisy) if config.runtime.deployment else noisy


def _trained_silos(config: ExperimentConfig, work: Work, trainer: CohortTrainer) -> CohortSum:
    # Imported here: it needs Opacus, which nothing else does.
    from fedpriv.training.example_level import train_silos

    assert config.privacy is not None
    assert config.privacy.example is not None
    assert work.own_noise is not None
    layout = Layout.of(trainer.model)
    return train_silos(
        trainer,
        build_example_level(config, work.own_noise.noise_multiplier, layout).at(work.bounds),
        work.parameters,
        work.users,
        work.round,
        work.own_noise.attempt,
        build_randomness(config),
        config.privacy.delta,
        config.privacy.example.gradients,
    )


def _guarded(message: Message, answer: Callable[[], Message]) -> Message:
    """Send wrong input back as a sentence; anything else is a crash of this node."""
    try:
        return answer()
    except InputError as error:
        return failure_reply(message, str(error))


def _memories(config: ExperimentConfig, work: Work) -> AbstractContextManager[RoundMemories | None]:
    """Return access to what users keep, where they keep anything, for this piece of work."""
    if config.privacy is None or work.memories is None or work.journal is None:
        return nullcontext()
    ram = config.privacy.error_feedback.ram_mib * 2**20 // config.runtime.workers
    return _opened(work.memories, ram).round(work.journal)


# What a worker keeps of memories in RAM stays there between rounds.
@lru_cache(maxsize=1)
def _opened(folder: Path, ram_bytes: int) -> Memories:
    return Memories(folder, ram_bytes)


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _partitions(context: Context) -> int:
    return int(context.node_config["num-partitions"])


def _trainer(config: ExperimentConfig, context: Context) -> CohortTrainer:
    folder = context.node_config.get("data-path")
    if not config.runtime.deployment:
        return _TRAINERS.of(config)
    if folder is None:
        trainer = _TRAINERS.of(config)
        share = Share(trainer.dataset, _partition(context), _partitions(context))
        return replace(trainer, dataset=share)
    data = config.data.model_copy(update={"path": Path(str(folder)), "users": None})
    return _TRAINERS.of(config.model_copy(update={"data": data}))


class _Trainers:
    """Keeps data and model in the worker between rounds. One experiment runs at a time."""

    def __init__(self) -> None:
        self._config: ExperimentConfig | None = None
        self._trainer: CohortTrainer | None = None

    def of(self, config: ExperimentConfig) -> CohortTrainer:
        """Return the trainer of `config`, the same one as long as the config is the same."""
        if self._trainer is None or self._config != config:
            torch.set_num_threads(config.runtime.threads_per_worker)
            keep_freed_memory()
            self._trainer = build_trainer(config)
            self._config = config
        return self._trainer


_TRAINERS = _Trainers()
