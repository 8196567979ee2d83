"""DP-SGD inside a silo: from start parameters and a silo's examples to a change that is private.

The steps are those of Abadi et al. 2016, algorithm 1, with exact q·N denominators: each example
of the silo is in a step by a coin of its own, its gradient is clipped alone, and the noise is
added before the sum is used for anything. The optimizer and FedProx follow the noisy gradient, and
bounds that adapt follow noisy counts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from fedpriv.algorithms.base import Algorithm
from fedpriv.data.federated import Batch
from fedpriv.draws import drawing_from
from fedpriv.models.parameters import Layout, load_parameters, unchanged_buffers
from fedpriv.privacy.clipping import ClippedUsers, clip_and_add
from fedpriv.privacy.example_level import ExampleLevel
from fedpriv.privacy.outer_products import OuterProducts
from fedpriv.privacy.randomness import Purpose, Randomness, id_words
from fedpriv.tasks.base import Task
from fedpriv.training.cohort import OF_THE_MACHINE, CohortSum, CohortTrainer, shares_of
from fedpriv.training.example_gradients import GRADIENTS, example_gradients
from fedpriv.training.local import LocalTraining, correct
from fedpriv.training.spans import Stopwatch


@dataclass(frozen=True)
class Silo:
    """What one silo trains on in one round.

    Attributes:
        examples: its prepared examples; `skipped` ones add nothing and count for its size.
        sampling: decides which examples are in which step.
        noise: the owner of the noise.
        augmentation: decides what is masked.
        round: the round.
    """

    examples: Batch
    sampling: np.random.Generator
    noise: np.random.Generator
    augmentation: torch.Generator
    round: int

    @property
    def size(self) -> int:
        """How many examples it has."""
        return len(self.examples) + self.examples.skipped


class GradientStatistics:
    """What clipping saw of a silo's examples (private: simulation only)."""

    def __init__(self, blocks: int) -> None:
        self.gradients = 0
        self.loss = self.norm = self.clipped = 0.0
        self.block_norms = torch.zeros(blocks, dtype=torch.float64)
        self.block_clipped = torch.zeros(blocks, dtype=torch.float64)
        self.block_shares = torch.zeros(blocks, dtype=torch.float64)

    def add(self, clipped: ClippedUsers, losses: Tensor) -> None:
        """Count the gradients that are finite."""
        finite = clipped.finite
        norms, shrunk = clipped.norms[finite].cpu(), (clipped.scales[finite] < 1).cpu()
        self.gradients += len(norms)
        self.loss += float(losses[finite].double().sum())
        whole = torch.linalg.vector_norm(norms, dim=1)
        self.norm += float(whole.sum())
        self.block_shares += shares_of(norms, whole)
        self.clipped += int(shrunk.any(dim=1).sum())
        self.block_norms += norms.sum(0)
        self.block_clipped += shrunk.sum(0)

    @property
    def weight(self) -> float:
        """What makes a mean of a sum over gradients; 0 where there were none."""
        return 1 / self.gradients if self.gradients else 0.0


class TrainedSilo(NamedTuple):
    """What became of a silo in one round.

    Attributes:
        change: start minus end, float64 `[parameters]`: private, and sent.
        moves: the logarithm of each bound's factor where bounds adapt: private, and sent.
        seen: what clipping saw.
    """

    change: Tensor
    moves: tuple[float, ...]
    seen: GradientStatistics


def train_silo(
    model: GradSampleModule,
    start: Tensor,
    silo: Silo,
    level: ExampleLevel,
    recipe: LocalTraining,
    task: Task[Any],
) -> TrainedSilo:
    """Take `level.steps` steps of DP-SGD from `start`.

    Args:
        model: one of `GRADIENTS`, with `loss_reduction="sum"`; its parameters are overwritten.
        start: the flat parameters that every silo of the round starts from, on its device.
        silo: examples and generators.
        level: sampling, clipping and noise: what is accounted.
        recipe: optimizer, learning rate, FedProx; `batch_size` examples are worked on at once.
        task: what is learnt.

    A silo without examples sends noise of full strength: that it has none is not to be seen.
    """
    plain = model._module
    assert isinstance(plain, nn.Module)
    layout = Layout.of(plain)
    blocks = layout.split(start)
    load_parameters(plain, blocks)
    model.train()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    take = recipe.optimizer.begin(parameters, recipe.lr, recipe.multipliers)
    seen, first = GradientStatistics(len(blocks)), level.bounds
    numbers = layout.total + level.counts
    for number in range(1, level.steps + 1):
        drawn = torch.from_numpy(level.draw(len(silo.examples), silo.sampling))
        total = torch.zeros(numbers, dtype=torch.float64, device=start.device)
        for index in drawn.split(recipe.batch_size) if len(drawn) else ():
            _add_clipped(model, parameters, silo, index, level, task, total, seen)
        released = level.release(total, layout.sizes, silo.noise)
        noisy = released[: layout.total] / level.denominator(silo.size)
        level = level.after(released[layout.total :], silo.size)
        for parameter, part in zip(parameters, noisy.split(layout.sizes), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        correct(parameters, list(blocks.values()), recipe)
        take(recipe.rate(number, level.steps))
    end = torch.cat([p.detach().reshape(-1) for p in parameters])
    moves = [math.log(now / before) for now, before in zip(level.bounds, first, strict=True)]
    return TrainedSilo((start.double() - end.double()).cpu(), tuple(moves), seen)


def _add_clipped(
    model: GradSampleModule,
    parameters: Sequence[nn.Parameter],
    silo: Silo,
    index: Tensor,
    level: ExampleLevel,
    task: Task[Any],
    total: Tensor,
    seen: GradientStatistics,
) -> None:
    """Add the clipped gradients of the examples at `index`, and counts, to `total`, in place."""
    rows = task.augment(silo.examples.take(index), silo.round, silo.augmentation)
    batch = rows.to(total.device)
    losses = example_gradients(model, task, batch)
    blocks = [_block(p.grad_sample) for p in parameters]  # type: ignore[attr-defined]
    gradients, counts = total.split([len(total) - level.counts, level.counts])
    clipped = clip_and_add(blocks, level.mechanism.clipping, gradients)
    if level.counts:
        counts += clipped.within(level.counts)
    seen.add(clipped, losses)
    for p in parameters:
        p.grad_sample = p.grad = None  # type: ignore[attr-defined]


def _block(gradients: Tensor | OuterProducts) -> Tensor | OuterProducts:
    """Return `[n, ...]` as `[n, d]`, which factors stand for as they are."""
    return gradients.flatten(1) if isinstance(gradients, Tensor) else gradients


def train_silos(
    trainer: CohortTrainer,
    level: ExampleLevel,
    parameters: Tensor,
    silos: Sequence[int],
    round_: int,
    attempt: int,
    secret: Randomness,
    delta: float,
    gradients: Literal["instantiated", "ghost"] = "instantiated",
) -> CohortSum:
    """Train each of `silos` from the flat `parameters` and return the sum of their noisy changes.

    `parameters` `[P·(1 + shared)]` are the model, then what the algorithm's server shares. Where
    the algorithm is `scheduled` each silo takes the steps of its turn, and `level` has the most.

    `secret` gives each silo its sampling, noise, masks and dropout in this round and attempt. The
    examples of a sample draw masks and dropout from one stream, so that who else was drawn moves
    an example's place in it: whoever knew the stream could see more of one example than C. A
    change that is not finite contributes zero and is counted: it is private, whatever becomes of
    it. Where the trainer is tolerant, an example that the model cannot take is left out alone.

    Raises:
        InputError: a silo's data cannot be used, or δ is too large for a silo of its size.
    """
    layout, watch = Layout.of(trainer.model), Stopwatch(trainer.timed, device=trainer.device)
    received = parameters.to(trainer.device).view(-1, layout.total)
    algorithm, steps = trainer.algorithm, _steps_in(trainer.algorithm, round_, level.steps)
    summed = _Summed(layout, len(level.bounds))
    with _per_example(trainer.model, GRADIENTS[gradients]) as model:
        for number in silos:
            with watch.measure("data"):
                own = id_words(trainer.dataset.user_ids[number])
                silo = _silo(trainer, number, own, (round_, attempt), secret)
                level.check_delta(delta, silo.size)
                own_level = replace(level, steps=steps.get(number, level.steps))
                start = algorithm.start(received[0], received[1:], number)
            # Dropout draws from the global generator.
            seed = secret.torch_seed(Purpose.EXAMPLE_DROPOUT, round_, attempt, *own)
            draws = drawing_from(seed, trainer.device)
            keeps = unchanged_buffers(trainer.model)
            with watch.measure("forward and backward"), draws, keeps:
                if trainer.tolerant:
                    silo = replace(silo, examples=_usable(model, silo.examples, trainer))
                trained = train_silo(model, start, silo, own_level, trainer.recipe, trainer.task)
            summed.add(trained, silo, algorithm.weight(round_, number))
    return summed.result(watch)


def _steps_in(algorithm: Algorithm, round_: int, most: int) -> dict[int, int]:
    """Return the steps of each silo whose turn a round is; nothing where there is no schedule."""
    if not algorithm.scheduled:
        return {}
    turn = algorithm.turns(round_, most)[-1]
    return dict(zip(turn.silos, turn.steps, strict=True))


def _silo(
    trainer: CohortTrainer,
    number: int,
    own: tuple[int, ...],
    draw: tuple[int, int],
    secret: Randomness,
) -> Silo:
    """Return silo `number` at `draw`, a round and an attempt; `own` are the words of its id."""
    return Silo(
        examples=trainer.prepared(number, whole=not trainer.tolerant),
        sampling=secret.numpy(Purpose.EXAMPLE_SAMPLING, *draw, *own),
        noise=secret.numpy(Purpose.EXAMPLE_NOISE, *draw, *own),
        augmentation=secret.torch(Purpose.EXAMPLE_AUGMENTATION, *draw, *own),
        round=draw[0],
    )


def _usable(model: nn.Module, examples: Any, trainer: CohortTrainer) -> Any:
    """Return the `examples` without those of which the model's loss cannot be taken.

    Such as one with a label that the model has no class for: it adds nothing, and must not decide
    whether the others of its silo do.
    """

    def can(index: Tensor) -> bool:
        some = examples.take(index)
        try:
            # On the host first: a GPU would not outlive a target of no class.
            trainer.task.require_targets(some, trainer.dataset.classes)
            trainer.task.losses(model, some.to(trainer.device))
        except OF_THE_MACHINE:
            raise
        except Exception:
            return False
        return True

    everyone = torch.arange(len(examples))
    with torch.no_grad():
        if all(can(some) for some in everyone.split(trainer.recipe.batch_size) if len(some)):
            return examples
        able = [one for one in everyone.split(1) if can(one)]
    kept = examples.take(torch.cat([everyone[:0], *able]))
    return replace(kept, skipped=examples.skipped + len(examples) - len(kept))


@contextmanager
def _per_example(model: nn.Module, hooks: type[GradSampleModule]) -> Iterator[GradSampleModule]:
    """Give `model` Opacus' hooks, and take them off again."""
    wrapped = hooks(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # Opacus' own: the first layer's input, the data, needs no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield wrapped
    finally:
        wrapped.to_standard_module()


class _Summed:
    """Adds up what silos send, and notes what was seen of them."""

    def __init__(self, layout: Layout, bounds: int) -> None:
        blocks = len(layout.names)
        self._moves = torch.zeros(bounds, dtype=torch.float64)
        self._total = torch.zeros(layout.total, dtype=torch.float64)
        self._silos = self._examples = self._skipped = self._non_finite = 0
        self._loss = self._norm = self._clipped = 0.0
        self._block_norms = torch.zeros(blocks, dtype=torch.float64)
        self._block_clipped = torch.zeros(blocks, dtype=torch.float64)
        self._block_shares = torch.zeros(blocks, dtype=torch.float64)

    def add(self, trained: TrainedSilo, silo: Silo, weight: float) -> None:
        change, moves, seen = trained
        self._moves += torch.tensor(moves, dtype=torch.float64)
        self._silos += 1
        self._examples += len(silo.examples)
        self._skipped += silo.examples.skipped
        if not bool(torch.isfinite(change).all()):
            self._non_finite += 1
            return
        self._total += weight * change
        self._loss += seen.loss * seen.weight
        self._norm += seen.norm * seen.weight
        self._clipped += seen.clipped * seen.weight
        self._block_norms += seen.block_norms * seen.weight
        self._block_clipped += seen.block_clipped * seen.weight
        self._block_shares += seen.block_shares * seen.weight

    def result(self, watch: Stopwatch) -> CohortSum:
        return CohortSum(
            total=self._total,
            users=self._silos,
            examples=self._examples,
            skipped=self._skipped,
            non_finite=self._non_finite,
            loss=self._loss,
            norm=self._norm,
            clipped=self._clipped,
            block_norms=self._block_norms.tolist(),
            block_clipped=self._block_clipped.tolist(),
            block_shares=self._block_shares.tolist(),
            block_sent=[0.0] * len(self._block_norms),
            spans=tuple(watch.spans),
            bound_moves=self._moves.tolist(),
        )
