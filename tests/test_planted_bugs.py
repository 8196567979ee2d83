"""Faults that a private training could have, planted here and nowhere else, and what finds each.

All are found from outside, by an audit that knows nothing of the code: four of the five by its
lower bound, which is a proof at 95% confidence. Noise of half the strength is too small a fault
for that bound with so few canaries: it is found by the one-shot estimate, which is no proof, and
by the size of the noise itself, which is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from audited import audited
from in_process import train_small
from scipy import stats

from fedpriv.errors import ClientFault
from fedpriv.federation import client_app
from fedpriv.federation.strategy import PrivateFedAvg
from fedpriv.privacy import GaussianMechanism, PoissonSampling, Unclipped
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.privacy.model_deltas import ModelDeltas
from fedpriv.training import cohort

Plant = Callable[[pytest.MonkeyPatch], None]


def halve_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GaussianMechanism.noise
    monkeypatch.setattr(GaussianMechanism, "noise", lambda *given: honest(*given) / 2)


def skip_the_clip_of_the_largest_block(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = cohort.clip_and_add

    def clip_and_add(updates, rule, total):
        blocks = updates
        if isinstance(updates, ModelDeltas):
            blocks = updates.written_out().split(list(updates.sizes), dim=1)
        sizes = [block.shape[1] for block in blocks]
        largest = int(np.argmax(sizes))
        part = total.split(sizes)[largest]
        before = part.clone()
        seen = honest(blocks, rule, total)
        part.copy_(before + blocks[largest].double().sum(0))
        return seen

    monkeypatch.setattr(cohort, "clip_and_add", clip_and_add)


def weigh_by_examples_over_the_actual_count(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, release, seen = client_app.train_cohort, PrivateFedAvg._paid_release, []

    def train_cohort(trainer, parameters, users, round_, memories=None):
        whole = honest(trainer, parameters, users, round_)
        seen.append(whole.examples)
        alone = [honest(trainer, parameters, [user], round_) for user in users]
        weighted = [each.total * each.examples for each in alone]
        return replace(whole, total=sum(weighted, torch.zeros_like(whole.total)))

    def paid_release(self, *args):
        released = release(self, *args)
        examples = max(1, sum(seen))
        seen.clear()
        return released * self.plan.sampling.expected_cohort / examples

    monkeypatch.setattr(client_app, "train_cohort", train_cohort)
    monkeypatch.setattr(PrivateFedAvg, "_paid_release", paid_release)


def sample_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoissonSampling, "draw", lambda self, _: np.arange(self.population))


def add_memory_after_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """What clipping cut off a user's update is kept, and added when it takes part again."""
    honest, memory = client_app.train_cohort, {}

    def train_cohort(trainer, parameters, users, round_, memories=None):
        summed = honest(trainer, parameters, users, round_)
        free = replace(trainer, clipping=Unclipped())
        for user in users:
            whole = honest(free, parameters, [user], round_).total
            clipped = honest(trainer, parameters, [user], round_).total
            summed.total.add_(memory.get((trainer.dataset, user), 0.0))
            memory[trainer.dataset, user] = whole - clipped
        return summed

    monkeypatch.setattr(client_app, "train_cohort", train_cohort)


FULL = {"rounds": 2, "privacy__sampling": {"kind": "all"}, "privacy__noise_multiplier": 3.0}

PLANTED: dict[str, tuple[Plant, dict]] = {
    "clip skipped for one layer": (skip_the_clip_of_the_largest_block, {}),
    "weights unbounded over the actual count": (weigh_by_examples_over_the_actual_count, {}),
    "sampling without the stated rate": (sample_everyone, {}),
    "memory added after clipping": (add_memory_after_clipping, FULL),
}


def test_without_a_bug_the_bound_stays_below():
    """The control of all tests here: the same audit of the same config."""
    found = audited()
    assert found.holds
    assert found.bound.epsilon < 0.5 * found.epsilon
    assert found.bound.ceiling > 4 * found.epsilon  # a refutation was possible


#: Those that the gate for replies finds before any audit does.
LARGE = ("clip skipped for one layer", "memory added after clipping")


@pytest.mark.parametrize("name", LARGE)
def test_sums_beyond_the_bound_do_not_pass_the_gate(name, monkeypatch):
    plant, changes = PLANTED[name]
    plant(monkeypatch)
    with pytest.raises(ClientFault, match=r"the norm of its sum is .* is possible"):
        audited(**changes)


@pytest.mark.parametrize(("plant", "changes"), PLANTED.values(), ids=PLANTED)
def test_the_lower_bound_refutes(plant: Plant, changes: dict, monkeypatch):
    assert audited(**changes).holds
    plant(monkeypatch)
    monkeypatch.setattr(Mechanism, "largest_sums", lambda self, users, sizes: (math.inf,))
    found = audited(**changes)
    assert not found.holds
    assert found.bound.epsilon > found.epsilons["rdp"] > found.epsilons["pld"]


# ---------------------------------------------------------------- noise halved


def test_the_estimate_is_near_the_accountant_at_full_participation():
    """Two rounds of everybody are one Gaussian mechanism: the accountant's ε is exact by PLD."""
    found = audited(1500, **FULL)
    summed = found.estimates[0]
    assert summed.low < found.epsilon < summed.high
    assert not found.suspicious
    assert found.holds


def test_the_estimate_rises_above_the_claim_when_noise_is_halved(monkeypatch):
    halve_noise(monkeypatch)
    found = audited(1500, **FULL)
    assert found.suspicious
    assert found.estimates[0].low > found.epsilon


def noise_is_as_charged(folder: Path) -> None:
    """Check that released minus summed has the standard deviation that the ledger charges."""
    noise: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as watched:
        release = PrivateFedAvg._paid_release

        def paid_release(self, total, noise_only):
            released = release(self, total, noise_only)
            charged = self.ledger.charges(self.next_round)[-1].stddev
            noise.append((released - total) / charged)
            return released

        watched.setattr(PrivateFedAvg, "_paid_release", paid_release)
        train_small(folder)
    squares = torch.cat(noise).square()
    low, high = stats.chi2.interval(1 - 1e-6, len(squares))
    assert low < float(squares.sum()) < high


def test_the_noise_is_as_charged(tmp_path):
    noise_is_as_charged(tmp_path / "run")


def test_halved_noise_is_not_as_charged(tmp_path, monkeypatch):
    halve_noise(monkeypatch)
    with pytest.raises(AssertionError):
        noise_is_as_charged(tmp_path / "run")
