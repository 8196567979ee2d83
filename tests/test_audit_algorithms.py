"""Audits of what users send beside, or in place of, one update: payloads, slots, and memories."""

import math
import threading
from collections import namedtuple
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from audited import Unseen, audited, audited_config

from fedpriv import audit as auditing
from fedpriv.audit import AuditSettings
from fedpriv.errors import InputError
from fedpriv.experiment import prepare
from fedpriv.privacy import GaussianMechanism
from fedpriv.privacy.clipping import clip_and_sum
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.training import cohort, memory_store
from fedpriv.training.memory_store import RoundMemories

CONTROL = {"bounds": {"control": 0.5}}
SCAFFOLD = {"algorithm": {"name": "scaffold", **CONTROL}}
EDGES = {
    "algorithm": {"name": "hierarchical", "edges": 16},
    "server": {"optimizer": "sgd", "lr": 1.0},
}
KINDS = {
    "fedavg": {},
    "fedprox": {"algorithm": {"name": "fedprox", "mu": 0.1}},
    "scaffold": SCAFFOLD,
    "scaffold_m": {"algorithm": {"name": "scaffold_m", **CONTROL}},
    "fedspeed": {"algorithm": {"name": "fedspeed"}},
    "hierarchical": EDGES,
    "ofvl_ms": {"algorithm": {"name": "ofvl_ms", "tasks": ["user-1*", "user-2*", "*"]}},
    "hidenseek": {"algorithm": {"name": "hidenseek"}},
    "remainder": {"privacy__error_feedback": "user"},
    "dice": {"privacy__error_feedback": {"kind": "user", "variant": "dice", "memory_bound": 0.2}},
}
#: Everybody is in every round, where Gaussians are told best.
FULL = {
    "rounds": 2,
    "privacy__sampling": {"kind": "all"},
    "privacy__noise_multiplier": 3.0,
    "privacy__clipping": {"kind": "global", "bound": 0.1},
    "privacy__accountants": ["rdp", "pld"],
    "local": {"steps": 2, "lr": 0.1, "batch_size": 4},
    "model__dim": 8,
}
DISK = namedtuple("DISK", "total used free")
KEEPS = ["scaffold", "scaffold_m", "fedspeed", "remainder", "dice"]


def run_of(kind, canaries=60, **changes):
    config = audited_config(**FULL | KINDS[kind] | changes)
    return auditing._AuditedRun(prepare(config), AuditSettings(canaries))


def silent(monkeypatch):
    none = partial(torch.zeros, dtype=torch.float64)
    monkeypatch.setattr(GaussianMechanism, "noise", lambda self, sizes, _: none(sum(sizes)))


# ---------------------------------------------------------------- what canaries send, and where


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_a_canary_shows_along_all_of_its_payloads_and_in_its_own_sum(
    kind, monkeypatch
):
    """In 2 rounds: n for those who are in, nothing for those who are not, who stay apart."""
    silent(monkeypatch)
    run = run_of(kind)
    run.judged(Unseen(), threading.Event())
    found, included = run.evidence, run.canaries.included
    # Relative to the noise, each payload of V has a V-th of a contribution's squared length.
    np.testing.assert_allclose(found.energy, 2 / 9, rtol=1e-4)
    full = 2 / 9
    if kind == "dice":  # its memory, twice as long as its update, is empty in the first round
        full = 1 / 9 + 1 / 27
    np.testing.assert_allclose(found.projection[included], full, rtol=2e-3)
    np.testing.assert_allclose(found.projection[~included], 0.0, atol=1e-3)


@pytest.mark.parametrize(("kind", "bounds"), [("scaffold", [0.1, 0.5]), ("fedspeed", [0.1])])
def test_each_payload_of_a_canary_uses_its_whole_bound(kind, bounds):
    run = run_of(kind)
    planted, sizes = run.nodes[1].trainer.planted, run.plan.layout.sizes * len(bounds)
    for update in planted[:5]:
        total = clip_and_sum(update[None], sizes, run.trainer.clipping).total
        norms = total.view(len(bounds), -1).norm(dim=1)
        torch.testing.assert_close(norms, torch.tensor(bounds).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "changes", "slots"),
    [
        ("hierarchical", {}, 16),
        ("ofvl_ms", {}, 3),
        # Patterns that only whole ids fit.
        ("ofvl_ms", {"algorithm": {"name": "ofvl_ms", "tasks": ["user-?", "user-??"]}}, 2),
    ],
)
def test_canaries_are_in_the_sums_that_real_users_are_in(kind, changes, slots):
    run = run_of(kind, canaries=240, **changes)
    of_users = [run.plan.algorithm.slot(each) for each in run.trainer.dataset.user_ids]
    assert len(set(of_users)) == slots
    assert run.canaries.slots.tolist() == of_users * 4
    ids = run.nodes[1].trainer.dataset.user_ids
    assert [run.plan.algorithm.slot(each) for each in ids] == of_users * 4


def test_a_group_of_correlated_noise_may_have_no_canary():
    few = {"mechanism": {"kind": "correlated", "bands": 40}}
    few["sampling"] = {"kind": "poisson", "expected_cohort": 1}
    found = audited(40, rounds=40, data__users=60, **{f"privacy__{k}": v for k, v in few.items()})
    assert found.holds


def test_an_audit_needs_room_for_what_users_keep(monkeypatch):
    monkeypatch.setattr(memory_store.shutil, "disk_usage", lambda path: DISK(10, 10, 0))
    with pytest.raises(InputError, match=r"^TMPDIR: its disk has .* a larger disk"):
        audited(60, **FULL | KINDS["remainder"])


@pytest.mark.parametrize("kind", KEEPS)
def test_real_users_and_canaries_keep_what_they_keep_in_a_run(kind, monkeypatch):
    """What each reads in a round is what it wrote in the last in which it took part."""
    seen, kept = [], {}
    read, write = RoundMemories.read, RoundMemories.write

    def reading(self, users):
        rows = read(self, users)
        for user, row in zip(users, rows, strict=True):
            expected = kept.get((self._file.name.rpartition("/")[0], user))
            seen.append(expected is not None and bool(expected.norm() > 0))
            torch.testing.assert_close(row, row * 0 if expected is None else expected)
        return rows

    def writing(self, users, memories):
        for user, row in zip(users, memories, strict=True):
            kept[self._file.name.rpartition("/")[0], user] = row.clone().float()
        write(self, users, memories)

    monkeypatch.setattr(RoundMemories, "read", reading)
    monkeypatch.setattr(RoundMemories, "write", writing)
    sampling = {"kind": "poisson", "expected_cohort": 10}
    run = run_of(kind, rounds=4, privacy__sampling=sampling)
    run.judged(Unseen(), threading.Event())
    nodes = {folder for folder, _ in kept}
    # Canaries of algorithms send what is planted, whatever they would keep.
    assert len(nodes) == (2 if kind in ("remainder", "dice") else 1)
    assert sum(seen) > 2


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_stays_below_what_is_charged(kind):
    found = audited(300, **FULL | KINDS[kind])
    assert found.holds
    assert found.bound.epsilon <= found.epsilons["pld"] < np.inf
    # Near the truth: 300 canaries leave the estimate a spread of about a quarter.
    assert found.estimates[0].epsilon == pytest.approx(found.epsilons["pld"], rel=0.6)


def leave_the_last_payload_unclipped(monkeypatch):
    honest = cohort.clip_and_add

    def clip_and_add(updates, rule, total):
        blocks = list(updates)
        last = blocks[len(blocks) // 2 :]
        part = total.split([block.shape[1] for block in blocks])
        before = [each.clone() for each in part[len(blocks) // 2 :]]
        seen = honest(updates, rule, total)
        for each, was, block in zip(part[len(blocks) // 2 :], before, last, strict=True):
            each.copy_(was + block.double().sum(0))
        return seen

    monkeypatch.setattr(cohort, "clip_and_add", clip_and_add)


def divide_the_noise_among_sums(monkeypatch):
    honest = GaussianMechanism.noise
    monkeypatch.setattr(GaussianMechanism, "noise", lambda *given: honest(*given) / 16)


def send_memories_unclipped(monkeypatch):
    honest = cohort.feed_back

    def feed_back(updates, memories, *rest):
        fed = honest(updates, memories, *rest)
        total = fed.sent.total + memories.double().sum(0)
        return replace(fed, sent=replace(fed.sent, total=total))

    monkeypatch.setattr(cohort, "feed_back", feed_back)


PLANTED = {
    "a payload without a bound": ("scaffold", leave_the_last_payload_unclipped),
    "noise that sums share": ("hierarchical", divide_the_noise_among_sums),
    "memories without a bound": ("remainder", send_memories_unclipped),
}


@pytest.mark.parametrize(("kind", "plant"), PLANTED.values(), ids=PLANTED)
def test_planted_bugs_are_refuted(kind, plant, monkeypatch):
    plant(monkeypatch)
    # The gate for replies would not let the sums of two of them pass.
    monkeypatch.setattr(Mechanism, "largest_sums", lambda self, users, sizes: (math.inf,))
    assert not audited(300, **FULL | KINDS[kind]).holds
