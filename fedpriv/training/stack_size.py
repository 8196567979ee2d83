"""How many users to stack: by rule, or by trying."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor
from torch.func import functional_call

from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.optimizers.local import LocalOptimizer, NumberByNumber
from fedpriv.training.cohort import CohortTrainer, train_cohort
from fedpriv.training.stacked import stacked_model
from fedpriv.training.vmapped import vmapped_model

# Users hide the operations' overhead, and fill the processor's caches. Of models of 0.2 million
# parameters 64 users are fastest, of one million 25 rather than 50, of more about 20.
_STACKED_NUMBERS = 40_000_000
_FEW, _MANY = 20, 64
# Long examples fill the caches with few users, and leave operations' overhead behind.
_FEW_LONG, _MANY_LONG = 8, 12
# A stack keeps its users' parameters and, at worst, as many gradients, of 4 bytes each; and as many
# again for each number that the optimizer remembers.
_BYTES_A_PARAMETER, _BYTES_REMEMBERED = 8, 4
# What error feedback holds at once when gradients are gone: a user's update, its memory, and what
# both become, beside the user's parameters and momentum: up to twelve numbers of 4 bytes.
_BYTES_FED_BACK = 48
# A larger stack that is so much slower than the best one will not be followed by a faster one.
_CLEARLY_SLOWER = 0.8
_SECONDS_A_TRY = 2.0
# A GPU's memory breaks into pieces, and libraries take some of their own.
_USED_OF_A_GPU = 0.8
# The more users, the less a GPU waits to be asked. Its attention takes no more rows at once.
_MOST_ON_A_GPU, _MOST_ROWS = 512, 2**16 - 1


def planned_stack(
    parameters: int, memory: int, long_examples: bool = False, remembered: int = 0, kept: int = 0
) -> int:
    """Return how many users of a model of `parameters` to stack within `memory` bytes.

    `long_examples` are utterances, of a hundred tokens and more, as against images; `remembered`
    is how many numbers the optimizer keeps for each parameter, and `kept` how many bytes a user's
    forward pass keeps, where that is to be within `memory` too. It is a
    function of the config alone: a run that is repeated adds up the same numbers in the same order.
    """
    fewest, most = (_FEW_LONG, _MANY_LONG) if long_examples else (_FEW, _MANY)
    wanted = min(max(_STACKED_NUMBERS // parameters, fewest), most)
    return max(1, min(wanted, _most_within(memory, parameters, remembered, kept)))


def measured_stack(trainer: CohortTrainer, memory: int, most: int | None = None) -> int:
    """Return the fastest number of users to stack within `memory` bytes, tried on real users.

    1, 2, 4, ... are tried until more is clearly slower; with `most`, as many at most. A GPU's
    memory is given back: others train there.
    """
    layout = Layout.of(trainer.model)
    start = layout.join(parameters_of(trainer.model))
    best, fastest = 1, 0.0
    within = _most_within(memory, layout.total, remembered_by(trainer.recipe.optimizer))
    most = within if most is None else min(within, most)
    for size in _sizes(trainer.dataset.population, most):
        tried, users = replace(trainer, stack=size), range(size)
        try:
            train_cohort(tried, start, users, round_=1)  # memory and kernels are made ready
            rounds, began = 0, time.perf_counter()
            while rounds < 3 and time.perf_counter() - began < _SECONDS_A_TRY:
                train_cohort(tried, start, users, round_=1)
                rounds += 1
        except torch.OutOfMemoryError:  # of a GPU, which others may use too
            break
        rate = rounds * size / (time.perf_counter() - began)
        if rate > fastest:
            best, fastest = size, rate
        elif rate < _CLEARLY_SLOWER * fastest:
            break
    if trainer.device.type == "cuda":
        stacked_model.cache_clear()
        vmapped_model.cache_clear()
        gc.collect()  # a pass that had no memory left refers to itself
        torch.cuda.empty_cache()
    return best


@dataclass(frozen=True)
class Room:
    """Memory of a GPU, in bytes.

    Attributes:
        free: what a worker may take.
        fixed: what it takes whoever is trained: start, sum, and the model itself.
        each: what a user of a stack takes: parameters, gradients, and what a forward pass keeps, or
            what error feedback holds after it.
    """

    free: int
    fixed: int
    each: int

    @classmethod
    def on_gpu(cls, trainer: CohortTrainer, share: float) -> Room:
        """Return the room on the trainer's GPU now, of which a worker has a `share`."""
        free, _ = torch.cuda.mem_get_info(trainer.device)
        return cls.of(trainer, int(free * min(1.0, share) * _USED_OF_A_GPU))

    @classmethod
    def of(cls, trainer: CohortTrainer, free: int) -> Room:
        """Return the room within `free` bytes."""
        parameters = Layout.of(trainer.model).total
        numbers = _bytes_a_parameter(remembered_by(trainer.recipe.optimizer))
        if trainer.vmapped is None:
            kept = kept_bytes(trainer)
        else:
            kept = trainer.vmapped.kept * trainer.recipe.batch_size
        each = numbers * parameters + kept
        if trainer.feedback is not None:
            each = max(each, _BYTES_FED_BACK * parameters)
        return cls(free, 16 * parameters, each)


def fitting_stack(trainer: CohortTrainer, room: Room) -> int:
    """Return how many users of a stack there is room for, at least one, and no more than help."""
    rows = _MOST_ROWS // trainer.recipe.batch_size
    return max(1, min((room.free - room.fixed) // room.each, rows, _MOST_ON_A_GPU))


def kept_bytes(trainer: CohortTrainer) -> int:
    """Return what a user's forward pass keeps for its backward pass, in float32.

    A step as large as the recipe allows is taken on the meta device, which has shapes and no
    numbers: no user's data are looked at.
    """
    model, recipe, shape = trainer.model, trainer.recipe, trainer.dataset.input_shape
    inputs = trainer.task.largest_step(model, recipe.batch_size, recipe.batch_sizes, shape)
    there = {
        name: torch.empty_like(one, device="meta").requires_grad_(one.requires_grad)
        for name, one in chain(model.named_parameters(), model.named_buffers())
    }
    kept: dict[int, Tensor] = {}  # by storage, which is there until all are counted

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    before = model.training
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = functional_call(model, there, tuple(one.to("meta") for one in inputs))
    model.train(before)
    del outputs
    own = {one.untyped_storage()._cdata for one in there.values()}
    return sum(one.untyped_storage().nbytes() for key, one in kept.items() if key not in own)


def remembered_by(optimizer: LocalOptimizer) -> int:
    """Return how many numbers an optimizer keeps for each parameter of a stack."""
    return optimizer.kept if isinstance(optimizer, NumberByNumber) else 0


def _most_within(memory: int, parameters: int, remembered: int, kept: int = 0) -> int:
    return memory // (_bytes_a_parameter(remembered) * parameters + kept)


def _bytes_a_parameter(remembered: int) -> int:
    return _BYTES_A_PARAMETER + _BYTES_REMEMBERED * remembered


def _sizes(population: int, most: int) -> Iterator[int]:
    size = 1
    while size == 1 or size <= min(population, most):
        yield size
        size *= 2
