"""Faults that correlated noise could have, planted here and nowhere else, and what finds each.

Each check knows the papers' definitions, and nothing of the code that it looks at: it is given a
run of the mechanism, and holds with none planted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
import torch
from in_process import small_config
from scipy import stats
from scipy.linalg import toeplitz
from torch import nn

from fedpriv import experiment
from fedpriv.federation import plan as plans
from fedpriv.optimizers.schedules import factor
from fedpriv.privacy import (
    CorrelatedMechanism,
    GaussianMechanism,
    GlobalClipping,
    MinSeparationSampling,
    PoissonSampling,
    Randomness,
    Release,
    Workload,
)
from fedpriv.privacy import factorizations as matrices
from fedpriv.privacy.mechanisms import correlated

Plant = Callable[[pytest.MonkeyPatch], None]
IDS = [f"person {number}" for number in range(300)]
Z, BOUND, GROUPS = 1.5, 0.2, 4


def made(ids=IDS, bands: int = GROUPS, sampling=None) -> CorrelatedMechanism:
    gaussian = GaussianMechanism(Z, GlobalClipping(BOUND))
    sampling = sampling or PoissonSampling(300, 60.0)
    return CorrelatedMechanism(sampling, gaussian, bands, ids)


# ---------------------------------------------------------------- what finds them


def everybody_is_drawn_in_the_rounds_that_its_group_pays_for() -> bool:
    """The group is that of the id's hash, worked out here."""
    mechanism, generator = made(), np.random.default_rng(1)
    digests = [hashlib.sha256(b"group/" + each.encode()).digest() for each in IDS]
    groups = np.array([int.from_bytes(digest) % GROUPS for digest in digests])
    for round_ in range(1, 13):
        cohort = mechanism.cohort(round_, generator)
        release = Release.of(round_, 0, mechanism, "", mechanism.payers(round_, cohort))
        if not len(cohort) or set(groups[cohort]) != {release.group}:
            return False
    return True


def nobodys_rounds_depend_on_others() -> bool:
    """One user less: each of the others is drawn from in the same rounds as before."""

    def rounds(ids):
        mechanism = made(ids, sampling=PoissonSampling(300, 75.0))  # all of a group
        drawn = [mechanism.cohort(r, np.random.default_rng(r)) for r in range(1, 5)]
        return {ids[user]: r for r, cohort in enumerate(drawn) for user in cohort}

    whole, less = rounds(IDS), rounds(IDS[1:])
    return all(whole[each] == less[each] for each in IDS[1:])


def noise(attempts=None, rounds: int = 8, size: int = 40_000) -> np.ndarray:
    last = attempts or {}
    source = made().noise([size], Randomness.simulation(3, "run"), lambda r: last.get(r, 0))
    gaussian = made().gaussian
    drawn = [source.draw(r, last.get(r, 0), gaussian) for r in range(1, rounds + 1)]
    return torch.stack(drawn).numpy()


def the_noise_is_as_large_as_a_matrix_with_columns_of_norm_one_makes_it() -> bool:
    """CN/σ is standard, where C is the square root of the prefix sums, cut off and scaled."""
    series = np.array([math.comb(2 * j, j) / 4**j for j in range(GROUPS)])
    column = np.zeros(8)
    column[:GROUPS] = series / np.linalg.norm(series)
    recorded = Release.of(1, 0, made(), "", (0,)).stddev
    white = toeplitz(column, np.zeros(8)) @ noise() / recorded
    low, high = stats.chi2.interval(1 - 1e-7, white.size)
    return bool(low < float((white**2).sum()) < high)


def a_round_that_is_drawn_afresh_has_noise_of_its_own() -> bool:
    """Neither what was added before, nor anything that goes with it."""
    before, after = noise(rounds=4)[3], noise({4: 1}, rounds=4)[3]
    alike = np.corrcoef(before, after)[0, 1]
    return bool(abs(alike) < 6 / math.sqrt(len(before)))


def no_two_contributions_of_a_user_are_in_one_row() -> bool:
    """Or nothing is claimed for them."""
    sampling = MinSeparationSampling(300, 75.0, GROUPS)
    try:
        mechanism = made(bands=GROUPS + 2, sampling=sampling)
    except ValueError:
        return True
    event = Release.of(1, 0, mechanism, "", (0,)).event()
    return isinstance(event, dp_accounting.NonPrivateDpEvent)


def the_workload_is_what_the_server_does() -> bool:
    """Unit vectors go through the true optimizer, one a round."""
    server = {
        "optimizer": "sgd",
        "lr": 1.0,
        "options": {"momentum": 0.9},
        "schedule": {"kind": "exponential", "factor": 0.9},
    }
    mechanism = {"kind": "correlated", "bands": 3, "factorization": "optimized"}
    config = small_config(rounds=6, server=server, privacy__mechanism=mechanism)
    workload = experiment.prepare(config).plan.mechanism.workload
    model = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer, rows = torch.optim.SGD([model], lr=1.0, momentum=0.9), []
    for round_ in range(1, 7):
        model.grad = -torch.eye(6, dtype=torch.float64)[round_ - 1]
        optimizer.param_groups[0]["lr"] = factor(config.server.schedule, round_, 6)
        optimizer.step()
        rows.append(model.detach().numpy().copy())
    moved = math.sqrt((np.array(rows) ** 2).sum() / 6)
    return matrices.error(np.eye(6)[0], workload) == pytest.approx(moved, rel=1e-9)


# ---------------------------------------------------------------- what is planted


def draw_from_another_group(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = CorrelatedMechanism.cohort
    monkeypatch.setattr(
        CorrelatedMechanism, "cohort", lambda self, r, generator: honest(self, r + 1, generator)
    )


def group_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def cohort(self, round_, generator):
        drawn, group = self._of_all.draw(generator), self._group(round_)
        return np.array(
            [p for p in drawn.tolist() if p < len(self.user_ids) and p % GROUPS == group]
        )

    monkeypatch.setattr(CorrelatedMechanism, "cohort", cohort)


def columns_that_are_not_normed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = matrices.square_root

    def square_root(bands):
        found = honest(bands)
        return replace(found, parameters=tuple(c / found.parameters[0] for c in found.parameters))

    monkeypatch.setitem(matrices.MADE, "square_root", lambda bands, *_: square_root(bands))


def use_noise_again_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = correlated.CorrelatedNoise._make

    def again(self, round_, attempt, gaussian):
        honest(self, round_, 0, gaussian)
        self._newest = round_, attempt

    monkeypatch.setattr(correlated.CorrelatedNoise, "_make", again)


def allow_more_bands_than_rounds_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CorrelatedMechanism, "__post_init__", lambda self: None)
    monkeypatch.setattr(
        CorrelatedMechanism,
        "event_of",
        classmethod(lambda cls, release, gaussian: cls.sampling_of(release).event(gaussian)),
    )


def leave_out_the_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = plans.workload_of
    monkeypatch.setattr(plans, "workload_of", lambda *given: Workload(honest(*given).rates))


PLANTED: dict[str, tuple[Plant, Callable[[], bool]]] = {
    "wrong group": (
        draw_from_another_group,
        everybody_is_drawn_in_the_rounds_that_its_group_pays_for,
    ),
    "group by index": (group_by_index, nobodys_rounds_depend_on_others),
    "wrong column norm": (
        columns_that_are_not_normed,
        the_noise_is_as_large_as_a_matrix_with_columns_of_norm_one_makes_it,
    ),
    "noise again after a resume": (
        use_noise_again_after_a_resume,
        a_round_that_is_drawn_afresh_has_noise_of_its_own,
    ),
    "band longer than separation": (
        allow_more_bands_than_rounds_between,
        no_two_contributions_of_a_user_are_in_one_row,
    ),
    "momentum left out, which costs use and no privacy": (
        leave_out_the_momentum,
        the_workload_is_what_the_server_does,
    ),
}


@pytest.mark.parametrize(("plant", "holds"), PLANTED.values(), ids=PLANTED)
def test_what_is_planted_is_found(plant: Plant, holds: Callable[[], bool], monkeypatch):
    assert holds()
    plant(monkeypatch)
    assert not holds()
