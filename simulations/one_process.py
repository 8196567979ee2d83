"""A private run in one process, for studies of many small runs.

It draws, trains, clips, adds noise and steps as `fedpriv run` does, of the same parts, without
Flower, Ray, a ledger or checkpoints. So that a study may share what all its runs need, prepared
users and held-out recordings are kept between runs that read the same data.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpriv.config import ExperimentConfig
from fedpriv.config_files import load_config
from fedpriv.experiment import Experiment, prepare
from fedpriv.privacy.randomness import Purpose
from fedpriv.seed_model import with_seed_model
from fedpriv.training.cohort import train_cohort
from fedpriv.training.user_cache import UserCache

CONFIGS = Path(__file__).parents[1] / "configs"
CACHE_BYTES = 3 * 2**30
_CACHES: dict[str, UserCache] = {}


@dataclass(frozen=True)
class Outcome:
    """What a run came to: the last measures, and means over all rounds of what users sent.

    `memory_norm` is the mean norm of what the users of the last round keep.
    """

    measures: dict[str, float]
    epsilon: float | None
    norm: float
    parameters: int
    memory_norm: float


@dataclass(frozen=True)
class MemoriesInRam:
    """What users keep, in place of the store of a run: `[N, P]`."""

    numbers: Tensor

    def read(self, users: Sequence[int]) -> Tensor:
        return self.numbers[users]

    def write(self, users: Sequence[int], memories: Tensor) -> None:
        self.numbers[users] = memories


class Silent:
    """Listens to a pre-training and says nothing."""

    def begin(self, steps: int, done: int, what: str) -> None:
        pass

    def step(self, step: int, loss: float) -> None:
        pass

    def measured(self, step: int, measures: dict[str, float]) -> None:
        pass


def resolved(config: str, overrides: Sequence[str]) -> ExperimentConfig:
    """Read a config of `configs/`, with its seed model pre-trained where it is missing."""
    loaded = load_config(CONFIGS / config, overrides)
    return with_seed_model(loaded, Silent(), threading.Event())


def prepared(config: ExperimentConfig) -> Experiment:
    """Prepare a run whose users are cached together with those of earlier runs on the same data.

    Users are trained in a copy of the model: training overwrites it, and the server keeps its own.
    """
    experiment = prepare(config)
    key = f"{config.data.model_dump_json()} {getattr(config.model, 'mels', '')}"
    cache = _CACHES.setdefault(key, UserCache(CACHE_BYTES))
    model = copy.deepcopy(experiment.trainer.model)
    experiment.trainer = replace(experiment.trainer, model=model, cache=cache)
    return experiment


def train(
    config: ExperimentConfig, experiment: Experiment | None = None, every: int = 1
) -> Outcome:
    """Train all rounds on one thread and measure the model on the held-out examples.

    `experiment`, the prepared config, is for a caller who wants what it holds afterwards. Of the
    parts in which held-out examples come, one in `every` is measured on.
    """
    torch.set_num_threads(1)
    experiment = experiment or prepared(config)
    trainer, plan, server = experiment.trainer, experiment.plan, experiment.server
    keeping = trainer.feedback is not None
    rows = plan.sampling.population if keeping else 0
    memories = MemoriesInRam(torch.zeros(rows, plan.layout.total))
    norms = users = 0.0
    for round_ in range(1, config.rounds + 1):
        cohort = plan.sampling.draw(plan.randomness.numpy(Purpose.SAMPLING, round_, 0)).tolist()
        summed = train_cohort(trainer, server.parameters(), cohort, round_, memories)
        noise = plan.randomness.numpy(Purpose.NOISE, round_, 0)
        released = plan.mechanism.gaussian.release(summed.total, plan.layout.sizes, noise)
        seed = plan.randomness.torch_seed(Purpose.SERVER, round_)
        server.step(released / plan.sampling.expected_cohort, round_, seed)
        norms += summed.norm
        users += summed.users
    measures: dict[str, Any] = trainer.task.measure(
        server.model, experiment.held_out[::every], config.evaluation.batch_size
    )
    kept = summed.memory_norm / max(1, summed.users)
    return Outcome(
        measures,
        cost.epsilon if (cost := plan.planned_cost()) else None,
        norms / users,
        plan.layout.total,
        kept,
    )
