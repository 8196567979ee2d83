"""Audits where what one round shows bears on others: correlated noise, allocation, directions."""

from dataclasses import replace

import numpy as np
import pytest
from audited import audited, audited_config
from scipy.linalg import toeplitz

from fedpriv import audit
from fedpriv.errors import InputError
from fedpriv.privacy.auditing import along_columns
from fedpriv.privacy.mechanisms import correlated
from fedpriv.privacy.mechanisms.allocated import AllocatedMechanism
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism

SEPARATED = {"kind": "min_separation", "rounds": 2}
CORRELATED = {"kind": "correlated", "bands": 2}
KINDS = {
    "banded": {"privacy__mechanism": CORRELATED, "rounds": 4},
    "without coins": {
        "privacy__mechanism": CORRELATED,
        "privacy__sampling": SEPARATED,
        "rounds": 4,
    },
    "replaced": {
        "privacy__mechanism": CORRELATED,
        "privacy__sampling": SEPARATED,
        "rounds": 4,
        "privacy__adjacency": "replace_one",
    },
    "blt": {
        "privacy__mechanism": {**CORRELATED, "factorization": "blt"},
        "privacy__sampling": SEPARATED,
        "rounds": 4,
    },
    "bisr": {
        "privacy__mechanism": {**CORRELATED, "factorization": "bisr"},
        "privacy__sampling": SEPARATED,
        "rounds": 4,
    },
    "allocated": {"privacy__sampling": {"kind": "random_allocation", "rounds": 2}, "rounds": 5},
    "fedavg_m": {
        "algorithm": {"name": "fedavg_m"},
        "local": {"steps": 2, "lr": 0.1, "batch_size": 4},
    },
    "fednova": {
        "algorithm": {"name": "fednova", "effective_steps": 2},
        "local": {"steps": 2, "lr": 0.1, "batch_size": 4},
    },
    "normalised": {"server": {"optimizer": "sgd", "normalize": "scale"}},
}


def small(canaries=300, **changes):
    return audited(canaries, privacy__accountants=["rdp"], **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_stays_below_what_is_charged(kind):
    found = small(**KINDS[kind])
    assert found.bound.epsilon <= found.epsilons["rdp"] < np.inf


@pytest.mark.parametrize("kind", ["banded", "allocated"])
def test_it_does_in_twenty_of_twenty_seeds(kind):
    """Of eight real users, so that a run takes a moment: canaries are what is judged."""
    few = {"data__users": 8, "evaluation__every": 9, "model__dim": 8}
    if "privacy__sampling" not in KINDS[kind]:
        few["privacy__sampling"] = {"kind": "poisson", "expected_cohort": 0.8}
    for seed in range(20):
        found = small(100, **{**KINDS[kind], **few, "seed": seed})
        assert found.bound.epsilon <= found.epsilons["rdp"]


def no_noise(patch):
    """A hundredth of the noise that is charged."""
    made = GaussianMechanism.noise
    patch.setattr(GaussianMechanism, "noise", lambda *given: made(*given) / 100)


def everybody_in_each_round(patch):
    """Nobody is allocated: all take part in every round."""
    patch.setattr(
        AllocatedMechanism,
        "cohort",
        lambda self, round_, generator: np.arange(self.sampling.population),
    )


def one_group(patch):
    """All are drawn from in each round, whatever their group, and with certainty."""
    patch.setattr(
        correlated.CorrelatedMechanism,
        "cohort",
        lambda self, round_, generator: np.arange(self.sampling.population),
    )


@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        ("banded", no_noise),
        ("blt", no_noise),
        ("allocated", no_noise),
        ("fedavg_m", no_noise),
        ("allocated", everybody_in_each_round),
        ("banded", one_group),
    ],
)
def test_planted_bugs_are_found(kind, plant, monkeypatch):
    changes = KINDS[kind]
    if plant is not no_noise:
        # Coins and rounds are worth most where there is little noise and many of them.
        coins = {"kind": "poisson", "expected_cohort": 0.6}
        many = {"kind": "random_allocation", "rounds": 30}
        sampling = many if kind == "allocated" else coins
        noise = 1.0 if kind == "allocated" else 0.7
        changes = {**changes, "privacy__sampling": sampling, "privacy__noise_multiplier": noise}
    with monkeypatch.context() as patched:
        plant(patched)
        found = small(800, **changes)
    assert found.bound.epsilon > found.epsilons["rdp"]


def test_a_contribution_is_looked_for_along_its_column():
    """Against C written out: of noiseless releases the projection is the energy."""
    column = np.array([0.8, 0.5, 0.3, 0.1])
    c = toeplitz(column, np.zeros(4))
    direction = np.random.default_rng(1).standard_normal(50)
    for first in range(4):
        released = np.zeros((4, 50))
        released[first] = direction
        along = released @ direction
        projections, energies = along_columns(
            along[:, None], np.full((4, 1), direction @ direction), column
        )
        spread = np.outer(c[:, first], direction)
        assert projections[first, 0] == pytest.approx(np.sum(c @ released * spread))
        assert energies[first, 0] == pytest.approx(np.sum(spread**2))


def test_so_few_rounds_that_a_group_is_never_drawn_from_are_refused():
    config = audited_config(**KINDS["banded"])
    settings = replace(audit.AuditSettings(), rounds=1)
    prepared = audit.prepare(config)
    with pytest.raises(InputError, match="as many rounds as there are groups"):
        audit._AuditedRun(prepared, settings)
