"""What a mechanism from outside must be for a ledger to charge what its noise is worth.

A ledger rebuilds the event of a release from the recorded numbers, using only fedpriv's own code
for the kind that they name. So who is drawn and who pays must be as that kind says, and the noise
must be Gaussian and at least as large as recorded. Deliberately malicious code is not stopped.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from fedpriv.errors import InputError
from fedpriv.privacy.charging import charge
from fedpriv.privacy.ledger import Release
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.privacy.mechanisms.correlated import CorrelatedMechanism
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.privacy.randomness import Randomness
from fedpriv.privacy.sampling import Sampling

# What only the kind decides, not a mechanism from outside: who is in a round and who pays.
_OF_THE_KIND = (
    "accounts",
    "accounts_of",
    "affordable",
    "asks_all_nodes",
    "cohort",
    "event_of",
    "groups",
    "in_sums",
    "matrix",
    "most_rounds",
    "needed",
    "paid",
    "payer",
    "payers",
    "sampling_of",
)
# Fields of the record that follow from the config and not from the mechanism.
_GIVEN = (
    "sampling",
    "adjacency",
    "population",
    "expected_cohort",
    "bound",
    "sensitivity",
    "counts",
    "payloads",
)
# Rounds, and numbers of each, that are drawn to see how much noise there is.
_ROUNDS, _NUMBERS = 32, 40_000
# The least variance in any direction: that of the drawn numbers themselves is above 0.9.
_LEAST = 0.85
# The largest correlation between the noise of two blocks, in standard errors.
_MOST_ALIKE = 7.0
# The least p-value of a Kolmogorov-Smirnov test; what is drawn on trial is the same every time.
_LEAST_LIKELY = 1e-9


def require_recorded(mechanism: Any, sampling: Sampling, gaussian: GaussianMechanism) -> None:
    """Check that a ledger charges what a mechanism of somebody's own says that it costs.

    `sampling` and `gaussian` are what it was made with.

    Raises:
        InputError: it is none, or the ledger would charge something else, or somebody else.
    """
    name = type(mechanism).__name__
    if not isinstance(mechanism, Mechanism):
        raise InputError(f"privacy.mechanism: {name} is not a Mechanism; extend CentralMechanism")
    payers = mechanism.payers(1, np.zeros(0, dtype=np.int64))
    recorded = Release.of(1, 0, mechanism, "", payers)
    if recorded.payers != payers:
        raise InputError(
            f"privacy.mechanism: {name} does not record who pays, as CorrelatedMechanism records "
            "a group"
        )
    charged, claimed = (
        charge({event: 1}, mechanism.adjacency, [1e-6], ("rdp",)).first.epsilon
        for event in (recorded.event(), mechanism.event())
    )
    if charged < claimed or not math.isclose(charged, claimed, rel_tol=1e-6):
        raise InputError(
            f"privacy.mechanism: {name} says that a round costs ε = {claimed:.6g}, but what it "
            f"records costs {charged:.6g} (at δ = 1e-6): record and event must agree"
        )
    _require_its_kind(mechanism, recorded, sampling, gaussian)


def _require_its_kind(
    mechanism: Mechanism, recorded: Release, sampling: Sampling, gaussian: GaussianMechanism
) -> None:
    """Check that it takes part and pays as the kind does by whose code its ledger is read.

    Raises:
        InputError: it does not, or is recorded with other bounds or samples than it was given.
    """
    name, kind = type(mechanism).__name__, recorded.mechanism
    other = next(
        (e for e in _OF_THE_KIND if hasattr(kind, e) and not _same(type(mechanism), kind, e)),
        None if dict(mechanism.header) == dict(kind.header) else "header",
    )
    if other is not None or not isinstance(mechanism, kind):
        raise InputError(
            f"privacy.mechanism: {name} overrides {other or 'record'}, but its ledger is read by "
            f"the rules of {kind.__name__}, which decides who is drawn and who pays; a mechanism "
            "from outside may only change how the server's noise is drawn"
        )
    given = kind.record(mechanism, recorded.payers)
    changed = [each for each in _GIVEN if getattr(recorded, each) != given[each]]
    if changed or mechanism.sampling != sampling or mechanism.gaussian != gaussian:
        raise InputError(
            f"privacy.mechanism: {name} records or draws with another "
            f"{changed[0] if changed else 'sampling or bound'} than the config's"
        )


def _same(mechanism: type[Mechanism], kind: type[Mechanism], name: str) -> bool:
    one, other = getattr(mechanism, name), getattr(kind, name)
    return bool(getattr(one, "__func__", one) == getattr(other, "__func__", other))


def require_noise(mechanism: Mechanism, blocks: int, rounds: int) -> None:
    """Draw the noise of some rounds, which nobody will see, and check that it is what is recorded.

    Its covariance over rounds, attempts and runs must be at least that of the kind on record, in
    every direction: noise that is too small, that is used twice or in part, or that does not come
    from the run's own source, is found. It must also be Gaussian, and drawn anew for each number,
    which the accountant takes for granted. `blocks` are those of what a user sends.

    Raises:
        InputError: there is too little, or it is of another kind.
    """
    gaussian, name = mechanism.gaussian, type(mechanism).__name__
    if gaussian.noise_multiplier == 0:
        return
    payers = mechanism.payers(1, np.zeros(0, dtype=np.int64))
    recorded = Release.of(1, 0, mechanism, "", payers)
    rows, counts = _drawn_on_trial(mechanism, recorded, blocks, min(rounds, _ROUNDS))
    covariance = rows @ rows.T / rows.shape[1]
    least = float(np.linalg.eigvalsh(covariance)[0]) if np.isfinite(covariance).all() else 0.0
    if recorded.count_stddev is not None:
        # Few numbers: what is nearly nothing is found.
        size = float(np.mean(counts**2)) / recorded.count_stddev**2
        least = 0.0 if size < 0.05 else least
    if least < _LEAST:
        raise InputError(
            f"privacy.mechanism: {name} adds less noise than it records: in some direction over "
            f"rounds, attempts and runs its variance is {least:.3g} of the recorded one (measured "
            "on drawn numbers; 1 is expected)"
        )
    _require_independent_gaussians(name, rows, blocks)


def _drawn_on_trial(
    mechanism: Mechanism, recorded: Release, blocks: int, rounds: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what a mechanism draws for two runs of some rounds, and for the counts.

    The first, `[2 (rounds + 1), numbers]`, would be independent standard normals if it were what is
    `recorded`; the row after those of a run is another attempt at its first round.
    """
    gaussian, name = mechanism.gaussian, type(mechanism).__name__
    sizes = [math.ceil(_NUMBERS / blocks)] * blocks
    stddevs = np.repeat(gaussian.block_stddevs(blocks), sizes[0])
    stddevs *= recorded.stddev / gaussian.stddev
    band = [1.0]
    if isinstance(mechanism, CorrelatedMechanism):
        band = mechanism.matrix.column(rounds).tolist()
    rows, of_counts = [], []
    for run in ("one", "another"):
        randomness = Randomness.simulation(0, f"noise that is looked at, {run}")
        source = mechanism.noise(sizes, randomness, lambda round_: 0)
        drawn = [source.draw(round_, 0, gaussian) for round_ in range(1, rounds + 1)]
        again = mechanism.noise(sizes, randomness, lambda round_: 1).draw(1, 1, gaussian)
        for each in (*drawn, again):
            if each.shape != (len(stddevs) + recorded.counts,) or each.dtype != torch.float64:
                raise InputError(
                    f"privacy.mechanism: {name} draws {each.dtype} {list(each.shape)} for "
                    f"{len(stddevs) + recorded.counts} numbers, and must draw float64 for each"
                )
        whole = np.stack([each.numpy() for each in drawn])
        of_counts.append(whole[:, len(stddevs) :])
        scaled = whole[:, : len(stddevs)] / stddevs
        # What is released is worth rows of Z, C times its noise.
        rows += [
            sum(band[j] * scaled[t - j] for j in range(min(t + 1, len(band))))
            for t in range(len(scaled))
        ]
        rows.append(band[0] * again.numpy()[: len(stddevs)] / stddevs)
    return np.stack(rows), np.concatenate(of_counts)


def _require_independent_gaussians(name: str, rows: NDArray[np.float64], blocks: int) -> None:
    """Check that noise, as `_drawn_on_trial` returns it, is as a Gaussian draws it.

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
