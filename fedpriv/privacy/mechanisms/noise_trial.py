"""Noise of a mechanism from outside, drawn on trial before a run; nobody sees what is drawn.

What is looked at: that the noise is made of the given randomness alone; over some rounds, runs and
a second attempt that it is Gaussian, drawn anew for each number and in every direction as large as
recorded; and on the run's own blocks that no round, no block and no coordinate has less.

A trial finds honest mistakes and proves nothing. It sees the rounds that it tries, under the clip
bounds at the start and, where they adapt, twice these, and a second attempt at round 1 alone. A
shortage that is too small for the numbers drawn stays unseen (docs/extending.md has the figures),
and so does whatever code does that tells a trial from a run.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.linalg import toeplitz

from fedpriv.errors import InputError
from fedpriv.failures import told_as
from fedpriv.privacy.clipping import bounds_of
from fedpriv.privacy.ledger import Release
from fedpriv.privacy.mechanisms.base import Mechanism, NoiseSource
from fedpriv.privacy.mechanisms.correlated import CorrelatedMechanism
from fedpriv.privacy.randomness import Randomness

Rows = NDArray[np.float64]

# On made-up blocks: rounds, numbers of each, and numbers of all draws together.
_ROUNDS, _NUMBERS, _ALL_NUMBERS = 32, 40_000, 2_500_000
# On the run's own blocks: draws of a release at least, rounds at most, and numbers of a release.
_DRAWS, _MOST_ROUNDS, _OF_A_RELEASE = 64, 256, 20_000
# Larger models are drawn twice in their own sizes, up to so many numbers.
_LARGE = 4_000_000
# The least variance in any direction: that of the drawn numbers themselves is above 0.9.
_LEAST = 0.85
# The largest correlation between the noise of two blocks, in standard errors.
_MOST_ALIKE = 7.0
# The least p-value of a test; what is drawn on trial is the same every time.
_LEAST_LIKELY = 1e-9


def require_noise(mechanism: Mechanism, sizes: Sequence[int], rounds: int) -> None:
    """Draw noise for blocks of `sizes` and a run of `rounds`, and check that it is as recorded.

    Raises:
        InputError: there is too little, it is of another kind, or it cannot be drawn.
    """
    if mechanism.gaussian.noise_multiplier == 0:
        return
    trial = _Trial(mechanism, mechanism, rounds)
    _require_repeatable(trial, _shortened(sizes, _OF_A_RELEASE))
    _require_gaussian(trial, len(sizes))
    _require_enough_of_each(trial, sizes)
    if mechanism.gaussian.counts is not None:  # bounds adapt, and noise must follow them
        doubled = [2 * bound for bound in bounds_of(mechanism.gaussian.clipping)]
        _require_enough_of_each(_Trial(mechanism, mechanism.at(doubled), rounds), sizes)


def _shortened(sizes: Sequence[int], most: int) -> list[int]:
    """Return `sizes` that sum to about `most` at most: the largest blocks are cut to one length."""
    left, least = most, most
    for place, size in enumerate(sorted(sizes)):
        least = max(1, left // (len(sizes) - place))
        if size > least:
            break
        left -= size
    return [min(size, least) for size in sizes]


@dataclass(frozen=True)
class _Trial:
    """Draws of a mechanism in a run of some `rounds`, held against the record of one of them.

    Attributes:
        mechanism: the one whose noise it is.
        of_round: the same, with the clip bounds under which its noise is drawn.
        rounds: how many the run has.
    """

    mechanism: Mechanism
    of_round: Mechanism
    rounds: int

    @cached_property
    def recorded(self) -> Release:
        payers = self.mechanism.payers(1, np.zeros(0, dtype=np.int64))
        return Release.of(1, 0, self.of_round, "", payers)

    @property
    def name(self) -> str:
        return type(self.mechanism).__name__

    def tried(self, most: int) -> list[int]:
        """Return which rounds are drawn: the first, and others up to the last of the run.

        Of correlated noise they are the first alone, since what a round has of earlier ones can
        be told only where these are there.
        """
        if self.rounds <= most or isinstance(self.mechanism, CorrelatedMechanism):
            return list(range(1, min(self.rounds, most) + 1))
        first = most // 2
        spread = np.linspace(self.rounds, first + 1, most - first, dtype=int).tolist()
        # The last two are neighbours, of whom one might have the noise of the other.
        spread[1:2] = [self.rounds - 1] if len(spread) > 1 else []
        return sorted({*range(1, first + 1), *spread})

    def source(self, sizes: Sequence[int], run: str, attempt: int = 0) -> NoiseSource:
        """Return the mechanism's source of noise, for a run of its own."""
        randomness = Randomness.simulation(0, f"noise that is looked at, {run}")
        method = f"{self.name}.noise(sizes, randomness, attempts)"
        attempts = lambda round_: attempt  # noqa: E731 - an argument of theirs
        source = _called(method, self.mechanism.noise, list(sizes), randomness, attempts)
        if not callable(getattr(source, "draw", None)):
            raise InputError(
                f"privacy.mechanism: {method} must return an object with draw(round_, attempt, "
                f"gaussian), and returns {type(source).__name__}"
            )
        return cast(NoiseSource, source)

    def draw(
        self, source: NoiseSource, sizes: Sequence[int], round_: int, attempt: int = 0
    ) -> torch.Tensor:
        """Return the noise of a round."""
        method = f"{type(source).__name__}.draw(round_, attempt, gaussian), from {self.name}.noise,"
        drawn = _called(method, source.draw, round_, attempt, self.of_round.gaussian)
        wanted = [sum(sizes) + self.recorded.counts]
        if not isinstance(drawn, torch.Tensor):
            found = type(drawn).__name__
        elif list(drawn.shape) != wanted or drawn.dtype != torch.float64:
            found = f"{drawn.dtype} {list(drawn.shape)}"
        else:
            return drawn
        raise InputError(
            f"privacy.mechanism: {method} must return a torch.Tensor of float64 {wanted}, and "
            f"returns {found}"
        )

    def rows(self, sizes: Sequence[int], rounds: Sequence[int], run: str, attempt: int = 0) -> Rows:
        """Return what is drawn for `rounds`: `[rounds, numbers]`.

        They would be independent standard normals if the noise were what is recorded.
        """
        source = self.source(sizes, run, attempt)
        stddevs = self._stddevs(sizes)
        noise = np.stack([self.draw(source, sizes, r, attempt).numpy() for r in rounds]) / stddevs
        if not np.isfinite(noise).all():
            raise InputError(f"privacy.mechanism: {self.name} adds noise that is not finite")
        if isinstance(self.mechanism, CorrelatedMechanism):
            # What is released is worth rows of Z, C times its noise.
            column = self.mechanism.matrix.column(len(rounds))
            noise = toeplitz(column, np.zeros(len(rounds))) @ noise
        return noise

    def _stddevs(self, sizes: Sequence[int]) -> Rows:
        gaussian, recorded = self.of_round.gaussian, self.recorded
        of_blocks = np.repeat(gaussian.block_stddevs(len(sizes)), sizes)
        of_blocks *= recorded.stddev / gaussian.stddev
        of_counts = [recorded.count_stddev] * recorded.counts if recorded.count_stddev else []
        return np.concatenate([of_blocks, of_counts])

    def require_enough(self, rows: Rows, sizes: Sequence[int], rounds: Sequence[int]) -> None:
        """Check the variance of draws `[draws, numbers]`, of each part and on the whole.

        `rounds` are those of the draws. Sums of squares follow χ² if the noise is as recorded.

        Raises:
            InputError: it is smaller than a Gaussian of the recorded σ is once in 10^9 times.
        """
        squares = rows**2
        blocks = np.array([size for size in (*sizes, self.recorded.counts) if size])
        by_block = np.add.reduceat(squares, np.cumsum(blocks) - blocks, axis=1)
        block = "in block {0} of " + f"{len(blocks)} (of {{2}} numbers)"
        parts: tuple[tuple[str, Rows, Any], ...] = (
            (block, by_block.sum(axis=0), blocks * len(rows)),
            ("in round {1}", by_block.sum(axis=1), squares.shape[1]),
            (block + ", in round {1},", by_block, blocks),
            ("at number {0} of a release", squares.sum(axis=0), len(rows)),
            ("on the whole", by_block.sum(keepdims=True)[0], squares.size),
        )
        for where, sums, numbers in parts:
            unlikely = stats.chi2.cdf(sums, numbers)
            if unlikely.min() * sums.size >= _LEAST_LIKELY:
                continue
            place = np.unravel_index(unlikely.argmin(), sums.shape)
            ratio = float((sums / numbers)[place])
            round_ = rounds[place[0]] if "{1}" in where else 0
            size = blocks[place[-1]] if "{2}" in where else 0
            raise self.too_little(where.format(place[-1] + 1, round_, size), ratio)

    def too_little(self, where: str, ratio: float) -> InputError:
        """Return the error of noise whose variance is `ratio` of what it should be."""
        return InputError(
            f"privacy.mechanism: {self.name} adds less noise than it records: {where} its variance "
            f"is {max(ratio, 0.0):.3g} of the recorded one (measured on drawn numbers; 1 is "
            "expected)"
        )


def _called(method: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a method from outside returns.

    Raises:
        InputError: it takes other arguments, or fails.
    """
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise InputError(
            f"privacy.mechanism: {method} cannot be called with these arguments: {error}"
        ) from None
    except ValueError:  # of compiled code the signature is not known
        pass
    with told_as(f"privacy.mechanism: {method} fails"):
        return function(*arguments)


def _require_repeatable(trial: _Trial, sizes: Sequence[int]) -> None:
    """Check that the same randomness, round and attempt give the same noise to the bit.

    Raises:
        InputError: it is made of another generator than that of the run.
    """
    tried, kept = trial.tried(_ROUNDS), {}
    with _generators_set(1):
        source = trial.source(sizes, "drawn twice")
        for round_ in tried:
            drawn = trial.draw(source, sizes, round_)
            kept[round_] = drawn.clone()
            drawn.zero_()  # whoever adds noise uses it up
        again = [trial.draw(source, sizes, tried[-1])]
    with _generators_set(2):  # as in a run that goes on in another process
        again += [
            trial.draw(trial.source(sizes, "drawn twice"), sizes, round_)
            for round_ in (tried[-1], tried[0])
        ]
    wanted = kept[tried[-1]], kept[tried[-1]], kept[tried[0]]
    if not all(map(torch.equal, again, wanted)):
        raise InputError(
            f"privacy.mechanism: {trial.name} draws other noise when it is asked again for the "
            "same round and attempt, or in a run that is resumed: draw it from the `randomness` "
            "that noise is given and from no other generator (such as torch.randn), and return a "
            "new tensor each time"
        )


@contextmanager
def _generators_set(seed: int) -> Iterator[None]:
    """Seed the generators that a whole process shares, and leave them as they were."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)


def _require_gaussian(trial: _Trial, blocks: int) -> None:
    """Check noise for `blocks` blocks of one size over rounds, runs and a second attempt.

    Sizes are made up, so that there are numbers enough to tell a small difference.

    Raises:
        InputError: there is too little, or used twice; numbers of a release are alike, or they are
            not normally distributed.
    """
    tried = trial.tried(_ROUNDS)
    draws = 2 * (len(tried) + 1)
    sizes = [math.ceil(max(_NUMBERS, _ALL_NUMBERS / draws) / blocks)] * blocks
    drawn = []
    for run in ("one", "another"):
        drawn += [trial.rows(sizes, tried, run), trial.rows(sizes, [1], run, attempt=1)]
    of_all = np.concatenate(drawn)
    rows = of_all[:, : sum(sizes)]
    least = float(np.linalg.eigvalsh(rows @ rows.T / rows.shape[1])[0])
    if least < _LEAST:
        where = "in some direction over rounds, attempts and runs"
        raise trial.too_little(where, least)
    _require_independent_gaussians(trial.name, rows, blocks)
    trial.require_enough(of_all, sizes, [*tried, 1] * 2)


def _require_enough_of_each(trial: _Trial, sizes: Sequence[int]) -> None:
    """Check the variance of each round, block and coordinate on the run's own blocks.

    The largest blocks of a large model are shortened, or they would take too long.

    Raises:
        InputError: one has too little.
    """
    shortened, tried = _shortened(sizes, _OF_A_RELEASE), trial.tried(_MOST_ROUNDS)
    runs = math.ceil(_DRAWS / len(tried))
    drawn = [trial.rows(shortened, tried, f"own blocks, {run}") for run in range(runs)]
    trial.require_enough(np.concatenate(drawn), shortened, [*tried] * runs)
    if sum(sizes) > _OF_A_RELEASE:
        large, two = _shortened(sizes, _LARGE), trial.tried(2)
        trial.require_enough(trial.rows(large, two, "large"), large, two)


def _require_independent_gaussians(name: str, rows: Rows, blocks: int) -> None:
    """Check that noise, as `_Trial.rows` returns it, is as a Gaussian draws it.

    Raises:
        InputError: numbers of a release are alike, or they are not normally distributed.
    """
    rows = rows / rows.std(axis=1, keepdims=True)  # a round may have more of it than another
    by_block = rows.reshape(len(rows), blocks, -1).swapaxes(0, 1).reshape(blocks, -1)
    between = np.abs(np.corrcoef(by_block) - np.eye(blocks)).max() * math.sqrt(by_block.shape[1])
    if between > _MOST_ALIKE or any(len(np.unique(row)) < len(row) for row in rows):
        raise InputError(
            f"privacy.mechanism: {name} adds the same noise to several numbers of a release; draw "
            "it anew for each, in float64"
        )
    if stats.kstest(rows.ravel(), "norm").pvalue < _LEAST_LIKELY:
        raise InputError(
            f"privacy.mechanism: {name} adds noise that is not Gaussian, or less of it to some "
            "numbers than to others; a ledger charges Gaussian noise alone"
        )
