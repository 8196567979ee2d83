"""The seed model: a central training on public data, without privacy."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedpriv.data.speech import FederatedSpeech
from fedpriv.data.utterances import Utterances
from fedpriv.draws import drawing_from
from fedpriv.errors import InputError, Interrupted
from fedpriv.optimizers.server import Server
from fedpriv.privacy.randomness import Purpose, Randomness
from fedpriv.tasks.recognition import Recognition
from fedpriv.training.checkpoint import (
    Checkpoint,
    checkpoint_files,
    load_checkpoint,
    save_checkpoint,
)
from fedpriv.training.user_cache import UserCache


class Listener(Protocol):
    """An observer of a pre-training."""

    def begin(self, steps: int, done: int, what: str) -> None:
        """It starts, or resumes after `done` steps."""

    def step(self, step: int, loss: float) -> None:
        """A step is done."""

    def measured(self, step: int, measures: dict[str, float]) -> None:
        """The model was measured on public held-out recordings."""


@dataclass(frozen=True)
class Pretraining:
    """A central training, whole.

    Attributes:
        dataset: its public recordings.
        model: the model, which is trained in place.
        task: what is learnt, with this training's own augmentation.
        server: the optimizer, over all steps.
        steps: optimizer steps.
        batch_size: utterances a step.
        max_grad_norm: L2 norm to which each gradient is clipped; None for none.
        every: steps between measurements, each with a checkpoint.
        evaluation_batch: utterances a batch when measuring.
        seed: derives order, dropout and augmentation.
        device: where it runs.
        cache: prepared recordings.
    """

    dataset: FederatedSpeech
    model: nn.Module
    task: Recognition
    server: Server
    steps: int
    batch_size: int
    max_grad_norm: float | None
    every: int
    evaluation_batch: int
    seed: int
    device: torch.device
    cache: UserCache

    def batch(self, indices: Tensor) -> Utterances | None:
        """Return the prepared recordings at `indices`; None where none of them can be used."""
        parts = [self._prepared(index) for index in indices.tolist()]
        usable = [part for part in parts if len(part)]
        return Utterances.join(usable) if usable else None

    def _prepared(self, index: int) -> Utterances:
        cached = self.cache.get(index)
        if cached is None:
            read = self.task.prepare(self.model, self.dataset.pretraining(index))
            cached = self.cache.put(index, read)
        return cached

    def held_out(self, parts: Iterable[Utterances]) -> list[Utterances]:
        """Return held-out recordings as they are measured on.

        Raises:
            InputError: none of them can be used.
        """
        prepared = [self.task.prepare(self.model, part).to(self.device) for part in parts]
        if not any(len(part) for part in prepared):
            raise InputError("data: none of the held-out recordings can be used")
        return prepared

    def measure(self, held_out: Sequence[Utterances]) -> dict[str, float]:
        """Return the error rates of the model on recordings from `held_out`."""
        return self.task.measure(self.model, held_out, self.evaluation_batch)


def pretrain(
    training: Pretraining,
    folder: Path,
    fingerprint: str,
    listener: Listener,
    stop: threading.Event,
) -> dict[str, float]:
    """Train to the last step and return the measures on the public held-out recordings.

    A checkpoint is kept in `folder`, so that an interrupted training resumes where it stopped, with
    the same result.

    Raises:
        InputError: the data set has no public part or none that can be used, the checkpoint is
            another training's, or the loss is no longer a number.
        Interrupted: `stop` was set; call again to resume.
    """
    if not training.dataset.public or not training.dataset.public_held_out:
        raise InputError(
            "seed_model.pretrain needs public recordings, of which this data set has none; write "
            "seed_model.path, or data.speech.public_subsets where the data set has parts"
        )
    recordings = torch.arange(len(training.dataset.public))
    if all(training.batch(one) is None for one in recordings.split(1)):
        raise InputError("data: none of the public recordings can be used")
    held_out = training.held_out(training.dataset.pretraining_evaluation())
    done = _restore(training, folder, fingerprint)
    listener.begin(training.steps, done, f"{len(recordings):,} public recordings")
    measures = training.measure(held_out) if done else {}
    for step, indices in _steps(training, done):
        listener.step(step, _train_step(training, indices, step))
        if step % training.every == 0 or step == training.steps or stop.is_set():
            save_checkpoint(folder, Checkpoint(step, fingerprint, training.server.state()), keep=1)
            if stop.is_set() and step < training.steps:
                raise Interrupted(f"pre-training stopped after step {step}")
            measures = training.measure(held_out)
            listener.measured(step, measures)
    return measures


def _restore(training: Pretraining, folder: Path, fingerprint: str) -> int:
    files = checkpoint_files(folder)
    if not files:
        return 0
    checkpoint = load_checkpoint(files[-1], fingerprint)
    training.server.load_state(checkpoint.tensors)
    return checkpoint.round


def _steps(training: Pretraining, done: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the steps after `done` with the recordings of each, pass after pass over all."""
    count = len(training.dataset.public)
    randomness = Randomness.simulation(training.seed)
    per_pass = -(-count // training.batch_size)
    for step in range(1, training.steps + 1):
        number, place = divmod(step - 1, per_pass)
        if place == 0:
            generator = randomness.torch(Purpose.PRETRAINING, number)
            order = torch.randperm(count, generator=generator).split(training.batch_size)
        if step > done:
            yield step, order[place]


def _train_step(training: Pretraining, indices: Tensor, step: int) -> float:
    """Take one step on the mean loss of the recordings and return it; nan where there are none."""
    batch = training.batch(indices)
    if batch is None:
        return math.nan
    randomness = Randomness.simulation(training.seed)
    own = randomness.torch_seed(Purpose.PRETRAINING, step, 1)
    augmentation = randomness.torch(Purpose.PRETRAINING, step, 2)
    training.model.train()
    batch = training.task.augment(batch, step, augmentation).to(training.device)
    with drawing_from(own, training.device):
        loss = training.task.losses(training.model, batch).mean()
    if not math.isfinite(value := float(loss.detach())):
        raise InputError(
            f"seed_model.pretrain.lr: the loss of step {step} is {value}; write a smaller rate"
        )
    parameters = [p for p in training.model.parameters() if p.requires_grad]
    layout = training.server.layout
    # Zeros where a loss does not depend on a parameter, as on a mask that this step has none of.
    taken = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    gradients = zip(layout.names, taken, strict=True)
    gradient = layout.join(dict(gradients))
    if training.max_grad_norm is not None:
        gradient *= min(1.0, training.max_grad_norm / (float(gradient.norm()) + 1e-6))
    seed = randomness.torch_seed(Purpose.PRETRAINING, step, 3)
    training.server.step(gradient, step, seed)
    return value


def measures_of(training: Pretraining) -> dict[str, Any]:
    """Return what a finished model reaches on public held-out recordings and on held-out ones."""
    parts = {
        "public_held_out": training.dataset.pretraining_evaluation(),
        "held_out": training.dataset.evaluation(),
    }
    return {name: training.measure(training.held_out(part)) for name, part in parts.items()}
