"""How many users to stack: by rule, or by trying."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from fedpriv.training.cohort import CohortTrainer, train_cohort
from fedpriv.training.parameters import Layout, parameters_of

# Users hide the operations' overhead, and fill the processor's caches. Of models of 0.2 million
# parameters 64 users are fastest, of one million 25 rather than 50, of more about 20.
_STACKED_NUMBERS = 40_000_000
_FEW, _MANY = 20, 64
# Long examples fill the caches with few users, and leave operations' overhead behind.
_FEW_LONG, _MANY_LONG = 8, 12
# A stack keeps its users' parameters and, at worst, as many gradients, of 4 bytes each; with
# momentum as many again.
_BYTES_A_PARAMETER, _BYTES_WITH_MOMENTUM = 8, 12
# A larger stack that is so much slower than the best one will not be followed by a faster one.
_CLEARLY_SLOWER = 0.8
_SECONDS_A_TRY = 2.0


def planned_stack(
    parameters: int, memory: int, long_examples: bool = False, momentum: bool = False
) -> int:
    """Return how many users of a model of `parameters` to stack within `memory` bytes.

    `long_examples` are utterances, of a hundred tokens and more, as against images. It is a
    function of the config alone: a run that is repeated adds up the same numbers in the same order.
    """
    fewest, most = (_FEW_LONG, _MANY_LONG) if long_examples else (_FEW, _MANY)
    wanted = min(max(_STACKED_NUMBERS // parameters, fewest), most)
    return max(1, min(wanted, _most_within(memory, parameters, momentum)))


def measured_stack(trainer: CohortTrainer, memory: int) -> int:
    """Return the fastest number of users to stack within `memory` bytes, tried on real users.

    1, 2, 4, ... are tried until more is clearly slower.
    """
    layout = Layout.of(trainer.model)
    start = layout.join(parameters_of(trainer.model))
    best, fastest = 1, 0.0
    most = _most_within(memory, layout.total, momentum=bool(trainer.recipe.momentum))
    for size in _sizes(trainer.dataset.population, most):
        tried, users = replace(trainer, stack=size), range(size)
        train_cohort(tried, start, users, round_=1)  # memory and kernels are made ready
        rounds, began = 0, time.perf_counter()
        while rounds < 3 and time.perf_counter() - began < _SECONDS_A_TRY:
            train_cohort(tried, start, users, round_=1)
            rounds += 1
        rate = rounds * size / (time.perf_counter() - began)
        if rate > fastest:
            best, fastest = size, rate
        elif rate < _CLEARLY_SLOWER * fastest:
            break
    return best


def _most_within(memory: int, parameters: int, momentum: bool) -> int:
    return memory // ((_BYTES_WITH_MOMENTUM if momentum else _BYTES_A_PARAMETER) * parameters)


def _sizes(population: int, most: int) -> Iterator[int]:
    size = 1
    while size == 1 or size <= min(population, most):
        yield size
        size *= 2
