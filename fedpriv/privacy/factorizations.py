"""How noise is correlated over rounds: lower-triangular Toeplitz matrices C, and what they gain.

The noise of round t is row t of C⁻¹Z. Each factorisation says what the first column of C is, and
how rows of C⁻¹Z are made one after another; in all of them that column has norm 1 over the run.

* `Banded`: C has b bands (Choquette-Choo et al. 2023), by the square root of the prefix sums
  (Kalinin, Lampert 2024), or optimised for the run's own workload.
* `InverseBanded`: C⁻¹ has p bands, cut off from the inverse square root of the workload (BISR,
  Kalinin, McKenna, Upadhyay, Lampert 2025).
* `Buffered`: C is a sum of d decaying exponentials, so that d vectors are all the memory (BLT,
  McMahan, Xu, Zhang 2024).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # plans are made where torch is not imported
    from torch import Tensor

Floats = NDArray[np.float64]

# Columns of a workload that an optimisation looks at; errors that are told are of all of them.
_LOOKED_AT = 256
# Digits of what an optimisation finds: more would be no use. Machines need not agree on them, since
# the last bit of a number may lead a search elsewhere: ledgers record what was found.
_DIGITS = 6


@dataclass(frozen=True)
class Workload:
    """What the server makes of the noise of all rounds: a linear map, after each round.

    A server with momentum β and rates η_t has moved its model, after round t, by Σ_s A_ts y_s with
    A_ts = Σ_{s≤u≤t} η_u β^(u-s). With constant rates and no momentum that is the prefix sums.

    Attributes:
        rates: η_t of each round, in any unit.
        momentum: β.
    """

    rates: tuple[float, ...]
    momentum: float = 0.0

    @property
    def rounds(self) -> int:
        """T."""
        return len(self.rates)

    def passed_on(self, inverse: Floats) -> Floats:
        """Return what momentum makes of the column of C⁻¹: `[T]`."""
        return _divided(inverse, (1.0, -self.momentum))


class Stream(Protocol):
    """Rows of C⁻¹Z, made one after another."""

    def row(self, fresh: Tensor) -> Tensor:
        """Return the row that begins with the row `fresh` of Z, which is used up."""
        ...


class Factorization(Protocol):
    """A lower-triangular Toeplitz matrix C, whose first column has norm 1 over the run."""

    def __hash__(self) -> int:
        """What is computed of it is remembered."""
        ...

    @property
    def name(self) -> str:
        """Its name in configs and ledgers."""
        ...

    @property
    def parameters(self) -> tuple[float, ...]:
        """Numbers from which `on_record` makes it again, with their number of rounds."""
        ...

    @property
    def reach(self) -> int | None:
        """How many rows of Z there are in a row of C⁻¹Z at most; None for all before."""
        ...

    def column(self, rounds: int) -> Floats:
        """Return the first `rounds` numbers of the first column of C, from the diagonal down."""
        ...

    def stream(self) -> Stream:
        """Return the rows of C⁻¹Z, from the first on."""
        ...


def inverse_of(column: Floats) -> Floats:
    """Return the first column of C⁻¹, as long as `column`, that of C."""
    return _divided(_impulse(len(column)), column)


def _impulse(length: int) -> Floats:
    impulse = np.zeros(length)
    impulse[0] = 1.0
    return impulse


def _divided(series: Floats, by: Sequence[float] | Floats) -> Floats:
    """Return the series divided by another one, as long as it is."""
    from scipy.signal import lfilter  # nodes, which import this too, divide nothing

    return np.asarray(lfilter([1.0], by, series))


# -------------------------------------------------------------------- the factorisations


@dataclass(frozen=True)
class Banded:
    """C has as many bands as `parameters`, whose squares add up to 1."""

    parameters: tuple[float, ...]
    name: str = "square_root"
    reach = None

    def column(self, rounds: int) -> Floats:
        """Return them, and zeros."""
        found = np.zeros(rounds)
        found[: len(self.parameters)] = self.parameters[:rounds]
        return found

    def stream(self) -> Stream:
        """Return rows that take back a part of the b - 1 rows before each."""
        return _TakingBack(self.parameters)


class _TakingBack:
    def __init__(self, coefficients: Sequence[float]) -> None:
        self._first, *self._others = coefficients
        self._past: deque[Tensor] = deque(maxlen=len(self._others))

    def row(self, fresh: Tensor) -> Tensor:
        for coefficient, earlier in zip(self._others, self._past, strict=False):
            fresh.sub_(earlier, alpha=coefficient)
        fresh.div_(self._first)
        self._past.appendleft(fresh)
        return fresh


@dataclass(frozen=True)
class InverseBanded:
    """C⁻¹ is in proportion to a matrix with the bands `parameters`, over `rounds` rounds."""

    parameters: tuple[float, ...]
    rounds: int
    name = "bisr"

    @property
    def reach(self) -> int:
        """As many rows as there are bands."""
        return len(self.parameters)

    def column(self, rounds: int) -> Floats:
        """Return the series of the inverse, with norm 1 over the run."""
        whole = _divided(_impulse(max(rounds, self.rounds)), self.parameters)
        return whole[:rounds] / np.linalg.norm(whole[: self.rounds])

    def stream(self) -> Stream:
        """Return rows that are made of the p last rows of Z."""
        return _Weighing(self.parameters, 1 / float(self.column(1)[0]))


class _Weighing:
    def __init__(self, weights: Sequence[float], scale: float) -> None:
        self._weights = [scale * weight for weight in weights]
        self._past: deque[Tensor] = deque(maxlen=len(weights) - 1)

    def row(self, fresh: Tensor) -> Tensor:
        first, *others = self._weights
        found = fresh * first
        for weight, earlier in zip(others, self._past, strict=False):
            found.add_(earlier, alpha=weight)
        self._past.appendleft(fresh)
        return found


@dataclass(frozen=True)
class Buffered:
    """C_ij is in proportion to Σ_k ω_k θ_k^(i-j-1) below a diagonal of ones.

    Attributes:
        parameters: the d decays θ, then the d weights ω.
        rounds: those of the run.
    """

    parameters: tuple[float, ...]
    rounds: int
    name = "blt"
    reach = None

    @property
    def decays(self) -> tuple[float, ...]:
        """θ, of each buffer."""
        return self.parameters[: len(self.parameters) // 2]

    @property
    def weights(self) -> tuple[float, ...]:
        """ω, of each buffer."""
        return self.parameters[len(self.parameters) // 2 :]

    def column(self, rounds: int) -> Floats:
        """Return the sum of exponentials, with norm 1 over the run."""
        whole = _exponentials(
            np.array(self.decays), np.array(self.weights), max(rounds, self.rounds)
        )
        return whole[:rounds] / np.linalg.norm(whole[: self.rounds])

    def stream(self) -> Stream:
        """Return rows that take back what the buffers say."""
        return _Buffers(self.decays, self.weights, 1 / float(self.column(1)[0]))


def _exponentials(decays: Floats, weights: Floats, rounds: int) -> Floats:
    powers = decays ** np.arange(rounds - 1)[:, None]
    return np.concatenate([[1.0], powers @ weights])


class _Buffers:
    """McMahan, Xu, Zhang 2024, algorithm 1, from C: y = z - Σ ω S, then S = θ S + y."""

    def __init__(self, decays: Sequence[float], weights: Sequence[float], scale: float) -> None:
        self._decays, self._weights, self._scale = decays, weights, scale
        self._buffers: list[Tensor] = []

    def row(self, fresh: Tensor) -> Tensor:
        if not self._buffers:
            self._buffers = [fresh.new_zeros(fresh.shape) for _ in self._decays]
        for weight, buffer in zip(self._weights, self._buffers, strict=True):
            fresh.sub_(buffer, alpha=weight)
        for decay, buffer in zip(self._decays, self._buffers, strict=True):
            buffer.mul_(decay).add_(fresh)
        return fresh.mul_(self._scale)


# -------------------------------------------------------------------- sensitivity and error


@lru_cache(maxsize=16)
def sensitivity_shares(factorization: Factorization, rounds: int, separation: int) -> Floats:
    """Return what each round adds to the squared sensitivity of whoever takes part in it: `[T]`.

    Somebody who takes part in rounds a_1 < a_2 < ..., `separation` apart, moves Cx by Σ_i v_i C_a_i
    with ‖v_i‖ ≤ 1, of squared norm Σ_ij <v_i, v_j> G_ij ≤ Σ_ij |G_ij|, where G = C'C. Round a_i is
    charged with its own |G_ii| and twice its |G_ij| with those before it.
    """
    column = factorization.column(rounds)
    left = np.arange(rounds, 0, -1)  # rows that a column has, of each round
    shares = np.cumsum(column**2)[left - 1]
    for lag in range(separation, rounds, separation):
        products = np.cumsum(column[:-lag] * column[lag:])
        shares[lag:] += 2 * np.abs(products[left[lag:] - 1])
    shares.setflags(write=False)
    return shares


def squared_sensitivity(factorization: Factorization, rounds: int, separation: int) -> float:
    """Return that of whoever takes part most, in rounds 1, 1 + b, 1 + 2b, ... of the run."""
    return math.fsum(sensitivity_shares(factorization, rounds, separation)[::separation])


def error(column: Floats, workload: Workload) -> float:
    """Return the root of the mean square, over rounds, of the rows of AC⁻¹.

    It is how far noise of deviation 1 in each row of Z has moved a coordinate of the model.
    """
    passed = workload.passed_on(inverse_of(column))
    starts = np.arange(workload.rounds)
    total = sum(_squares(passed, workload, part)[0] for part in np.array_split(starts, 16))
    return math.sqrt(float(total) / workload.rounds)


def _squares(passed: Floats, workload: Workload, starts: NDArray[np.int_]) -> tuple[float, Floats]:
    """Return Σ of the squares of some columns of AC⁻¹, and its gradient by `passed`."""
    rounds, rates = workload.rounds, np.array(workload.rates)
    later = np.arange(rounds)[:, None] + starts
    scales = np.where(later < rounds, rates[np.minimum(later, rounds - 1)], 0.0)
    # Where a column has ended there is nothing more to add, nor to count.
    summed = np.cumsum(scales * passed[:, None], axis=0) * (later < rounds)
    backward = np.cumsum(summed[::-1], axis=0)[::-1]
    return float((summed**2).sum()), 2 * (backward * scales).sum(1)


# -------------------------------------------------------------------- making them


@lru_cache(maxsize=8)
def square_root(bands: int) -> Banded:
    """Return the series of (1 - x)^(-1/2), the root of the prefix sums, cut off after b."""
    series = _root_series(1.0, -0.5, bands)
    norm = math.sqrt(math.fsum(c * c for c in series))
    return Banded(tuple(float(c / norm) for c in series))


def _root_series(ratio: float, power: float, length: int) -> Floats:
    """Return the series of (1 - ratio·x)^power."""
    series = [1.0]
    for j in range(1, length):
        series.append(series[-1] * ratio * (j - 1 - power) / j)
    return np.array(series)


@lru_cache(maxsize=8)
def optimized(bands: int, workload: Workload) -> Banded:
    """Return the bands whose noise moves the model least, found by L-BFGS from `square_root`."""
    from scipy.optimize import minimize

    bands = min(bands, workload.rounds)
    starts = np.unique(np.linspace(0, workload.rounds - 1, _LOOKED_AT).astype(int))
    begin = np.array(square_root(bands).parameters)
    begin /= begin[0]

    def loss(others: Floats) -> tuple[float, Floats]:
        column = np.zeros(workload.rounds)
        column[0], column[1:bands] = 1.0, others
        inverse = inverse_of(column)
        squares, gradient = _squares(workload.passed_on(inverse), workload, starts)
        norm = 1 + float(others @ others)
        if not math.isfinite(squares):
            return 1e300, np.zeros(len(others))
        # d C⁻¹ = -C⁻¹ dC C⁻¹, and momentum's map is undone by its transpose.
        by_inverse = workload.passed_on(gradient[::-1])[::-1]
        twice = np.convolve(inverse, inverse)[: workload.rounds]
        by_column = -np.array(
            [by_inverse[j:] @ twice[: workload.rounds - j] for j in range(1, bands)]
        )
        return math.log(squares) + math.log(norm), by_column / squares + 2 * others / norm

    with np.errstate(over="ignore", invalid="ignore"):
        found = (
            begin[1:] if bands == 1 else minimize(loss, begin[1:], jac=True, method="L-BFGS-B").x
        )
    rounded = np.concatenate([[1.0], _rounded(found)])
    norm = math.sqrt(math.fsum(rounded**2))
    return Banded(tuple(float(c / norm) for c in rounded), "optimized")


@lru_cache(maxsize=8)
def inverse_root(bands: int, workload: Workload) -> InverseBanded:
    """Return the series of ((1 - x)(1 - βx))^(1/2), cut off after p: rates do not bear on it."""
    root = _root_series(1.0, 0.5, bands)
    by_momentum = _root_series(workload.momentum, 0.5, bands)
    series = np.convolve(root, by_momentum)[:bands]
    return InverseBanded(tuple(float(w) for w in series), workload.rounds)


@lru_cache(maxsize=8)
def buffered(buffers: int, workload: Workload, separation: int) -> Buffered:
    """Return d decays and weights with the least error at one cost, found by L-BFGS.

    The search begins with decays that are spread evenly, by the logarithm of how long they last,
    and with the weights that come nearest to the square root of the prefix sums.
    """
    from scipy.optimize import minimize, nnls

    rounds = workload.rounds
    starts = np.unique(np.linspace(0, rounds - 1, _LOOKED_AT).astype(int))
    decays = np.exp(-1 / np.geomspace(1.0, max(2.0, rounds), buffers))
    powers = decays ** np.arange(max(1, rounds - 1))[:, None]
    weights, _ = nnls(powers, _root_series(1.0, -0.5, len(powers) + 1)[1:])

    def made(unbounded: Floats) -> Buffered:
        rates = 1 / (1 + np.exp(-unbounded[:buffers]))
        numbers = _rounded(np.concatenate([rates, np.exp(unbounded[buffers:])]), 12)
        return Buffered(tuple(map(float, numbers)), rounds)

    def loss(unbounded: Floats) -> float:
        whole = made(np.clip(unbounded, -20, 20))
        passed = workload.passed_on(inverse_of(whole.column(rounds)))
        squares, _ = _squares(passed, workload, starts)
        cost = squared_sensitivity(whole, rounds, separation)
        return math.log(squares) + math.log(cost) if math.isfinite(squares) else 1e300

    begin = np.concatenate([np.log(decays / (1 - decays)), np.log(np.maximum(weights, 1e-4))])
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.clip(minimize(loss, begin, method="L-BFGS-B").x, -20, 20)
    return Buffered(tuple(map(float, _rounded(np.array(made(found).parameters)))), rounds)


def _rounded(numbers: Floats, digits: int = _DIGITS) -> Floats:
    return np.array([float(f"{number:.{digits}g}") for number in numbers])


#: What makes each by its name, of `bands`, the workload, and how many rounds a user stays away.
MADE: dict[str, Callable[[int, Workload, int], Factorization]] = {
    "square_root": lambda bands, workload, separation: square_root(bands),
    "optimized": lambda bands, workload, separation: optimized(bands, workload),
    "bisr": lambda bands, workload, separation: inverse_root(bands, workload),
    "blt": buffered,
}
#: Those of which C is dense: what somebody contributes stays in all later rows of Cx.
DENSE: dict[str, Callable[[tuple[float, ...], int], Factorization]] = {
    "bisr": InverseBanded,
    "blt": Buffered,
}


def on_record(name: str, parameters: tuple[float, ...], rounds: int) -> Factorization:
    """Return the factorisation that was made for a run of so many rounds, from its numbers."""
    return DENSE[name](parameters, rounds) if name in DENSE else Banded(parameters, name)
