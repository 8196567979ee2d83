"""Small audited runs: 60 real users, 800 canaries, at an ε that so many canaries can refute."""

from __future__ import annotations

import threading
from typing import Any

from in_process import small_config

from fedpriv.audit import AuditSettings, audit
from fedpriv.config import ExperimentConfig
from fedpriv.reporting.audit import Audit


class Unseen:
    """An observer that looks away."""

    def begin(self, rounds: int) -> None:
        pass

    def finished(self, round_: int) -> None:
        pass


def audited_config(**changes: Any) -> ExperimentConfig:
    """A config of 2,762 parameters, ε = 0.64 by PLD at δ = 1e-4 for 3 rounds at q = 0.1."""
    settings = {
        "rounds": 3,
        "model__dim": 16,
        "model__mlp_ratio": 2.0,
        "privacy__delta": 1e-4,
        "privacy__noise_multiplier": 1.5,
        "privacy__accountants": ["rdp", "pld"],
        "privacy__sampling": {"kind": "poisson", "expected_cohort": 6},
    }
    return small_config(**{**settings, **changes})


def audited(canaries: int = 800, **changes: Any) -> Audit:
    """Audit that config."""
    return audit(audited_config(**changes), AuditSettings(canaries), Unseen(), threading.Event())
