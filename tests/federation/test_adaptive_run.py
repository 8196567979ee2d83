"""Whole runs whose clip bounds adapt: what they follow, where they hold, what they survive."""

import math
from itertools import pairwise

import pytest
import torch
from in_process import SILOS
from listened import Listened, ListeningGrid, begun, resumed
from scipy import stats

from fedpriv.data.federated import Examples, PartitionedImages
from fedpriv.errors import WorkerLost
from fedpriv.federation import client_app
from fedpriv.privacy import Purpose
from fedpriv.privacy.clipping import bounds_of

ADAPTS = pytest.mark.parametrize("adapts", ["global", "per_layer"])


def adaptive(adapts: str, **options) -> dict:
    """Changes of the small config: bounds adapt, and a round has 30 users."""
    clipping = {"kind": "adaptive", "adapts": adapts, "bound": 1e-3, "adapt_lr": 1.0, **options}
    return {"privacy__sampling__expected_cohort": 30, "privacy__clipping": clipping}


def charged_bounds(run: Listened) -> list[float]:
    return [release.bound for release in run.ledger]


def is_noise_of(noise: torch.Tensor, stddev: float) -> bool:
    """Σx²/σ² of d Gaussians is chi-square with d degrees: two-sided, one in a million."""
    low, high = stats.chi2.interval(1 - 1e-6, len(noise))
    return low < float((noise / stddev).square().sum()) < high


@ADAPTS
def test_the_noise_of_each_round_is_that_of_the_bound_it_is_charged_with(tmp_path, adapts):
    run = begun(tmp_path / "run", **adaptive(adapts)).go()
    bounds = charged_bounds(run)
    assert bounds[-1] > 2 * bounds[0]  # else noise at the first bounds would do
    for release in run.ledger:
        assert is_noise_of(run.noise(release.round), release.stddev)


@pytest.mark.parametrize("adapting", [False, True], ids=["fixed", "adaptive"])
def test_noise_per_block_is_in_proportion_to_each_blocks_own_bound(tmp_path, adapting):
    changes = adaptive("per_layer") if adapting else {}
    run = begun(tmp_path / "run", privacy__noise="per_block", **changes).go()
    sizes, first = (
        run.prepared.plan.layout.sizes,
        bounds_of(run.prepared.plan.mechanism.gaussian.clipping),
    )
    moved = set()
    for release in run.ledger:
        assert release.noise_shape == "per_block"
        bounds = run.grid.heard[release.round][0].work.bounds or first
        moved.add(tuple(bounds))
        assert math.hypot(*bounds) == pytest.approx(release.bound)
        multiplier = release.stddev / release.bound * math.sqrt(len(sizes))
        for part, bound in zip(run.noise(release.round).split(sizes), bounds, strict=True):
            assert is_noise_of(part, multiplier * bound)
    assert len(moved) == (len(run.ledger) if adapting else 1)


@ADAPTS
def test_nodes_clip_with_the_bounds_of_the_round(tmp_path, adapts):
    """They fall from far above the norms to far below them, and sums with them."""
    falling = {"bound": 10.0, "quantile": 0.02, "adapt_lr": 3.0, "count_noise": 1.0}
    little = {"privacy__noise_multiplier": 0.1, **adaptive(adapts, **falling)}
    run = begun(tmp_path / "run", **little).go()
    bounds = charged_bounds(run)
    assert bounds[-1] < 1e-2 * bounds[0]
    for release in run.ledger:
        answers = run.grid.heard[release.round]
        assert sum(len(answer.work.users) for answer in answers) > 0
        for answer in answers:
            most = len(answer.work.users) * release.bound
            assert float(answer.summed.total.norm()) <= most
    last = [answer.summed for answer in run.grid.heard[len(bounds)]]
    assert sum(s.norm for s in last) > 2 * sum(s.users for s in last) * bounds[-1]  # it binds


@pytest.fixture
def some_are_not_finite(monkeypatch):
    """Every fifth user's images are not numbers."""
    honest = PartitionedImages.user

    def user(self, index):
        examples = honest(self, index)
        if index % 5:
            return examples
        return Examples(examples.inputs * math.nan, examples.targets)

    monkeypatch.setattr(PartitionedImages, "user", user)
    monkeypatch.setattr(client_app, "_TRAINERS", client_app._Trainers())


@ADAPTS
def test_bounds_follow_noisy_counts_over_the_public_denominator(
    tmp_path, adapts, some_are_not_finite
):
    """By the formula of Andrew et al. 2021; who is not finite adds nothing to any count.

    The noise on the counts is so large here that bounds would stay nearly where they are, were
    the counts used without it.
    """
    options = {"count_noise": 200.0, "adapt_lr": 0.05, "quantile": 0.3, "bound": 0.02}
    run = begun(tmp_path / "run", **adaptive(adapts, **options)).go()
    plan = run.prepared.plan
    bounds = bounds_of(plan.mechanism.gaussian.clipping)
    not_finite = 0
    for release in run.ledger:
        assert release.bound == pytest.approx(math.hypot(*bounds))
        sums = [answer.summed for answer in run.grid.heard[release.round]]
        not_finite += sum(s.non_finite for s in sums)
        finite = sum(s.users - s.non_finite for s in sums)
        if adapts == "global":
            above = [sum(s.clipped for s in sums)]
        else:
            above = [sum(column) for column in zip(*(s.block_clipped for s in sums), strict=True)]
        generator = plan.randomness.numpy(Purpose.NOISE, release.round, 0)
        drawn = generator.standard_normal(plan.layout.total + len(bounds))[plan.layout.total :]
        fractions = [
            (finite / 2 - a + 200.0 * n) / 30 + 0.5 for a, n in zip(above, drawn, strict=True)
        ]
        bounds = [c * math.exp(-0.05 * (b - 0.3)) for c, b in zip(bounds, fractions, strict=True)]
    assert not_finite > 0
    steps = [abs(math.log(after / now)) for now, after in pairwise(charged_bounds(run))]
    assert max(steps) > 0.05  # further than any counts without noise could move a bound


@pytest.mark.parametrize("kind", ["global", "per_layer", "silos"])
def test_a_resumed_run_goes_on_with_the_bounds_as_they_had_adapted(tmp_path, kind):
    if kind == "silos":
        clipping = {"kind": "adaptive", "bound": 1e-3, "adapt_lr": 1.0, "count_noise": 5.0}
        silos = {
            **SILOS,
            "data__users": 3,
            "data__examples_per_user": 30,
            "privacy__example": {"sampling_rate": 0.5, "silo_size": 30},
            "privacy__sampling": {"kind": "all"},
        }
        changes = {**silos, "rounds": 4, "privacy__clipping": clipping}
    else:
        changes = adaptive(kind)
    whole = begun(tmp_path / "whole", **changes).go()
    with pytest.raises(WorkerLost):
        begun(tmp_path / "run", ListeningGrid(last=2), **changes).go()
    again = resumed(tmp_path / "run")
    assert again.prepared.finished_rounds == 2
    again.go()
    assert charged_bounds(whole)[2] > 1.05 * charged_bounds(whole)[0]
    for round_ in (3, 4):
        for answer, expected in zip(
            again.grid.heard[round_], whole.grid.heard[round_], strict=True
        ):
            assert answer.work.bounds == expected.work.bounds
    assert list(again.ledger) == list(whole.ledger)
    ends = [run.prepared.server.parameters() for run in (again, whole)]
    assert ends[0].equal(ends[1])
