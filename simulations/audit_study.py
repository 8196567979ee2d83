"""Does the audit's lower bound stay below the accountant's ε where all is right?

Claim examined: on a correctly configured run the lower bound, which may be wrong with probability
5%, lies below the ε by PLD, the tightest that is claimed, with each of 20 seeds. Found: it does.
The run is configs/vit_digits.yaml with fewer users and rounds and an ε that 600 canaries could
refute: each seed has its own partition, coins, directions, cohorts and noise.

    python simulations/audit_study.py
    python simulations/audit_study.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/audit_study.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv

SEEDS, CANARIES = range(1, 21), 600
CHANGES = {
    "rounds": 3,
    "data.users": 100,
    "privacy.delta": 1e-4,
    "privacy.sampling.expected_cohort": 50,
    "privacy.target_epsilon": None,
    "privacy.noise_multiplier": 2.0,
}


def measure() -> pd.DataFrame:
    experiment = fedpriv.Experiment.load(study.CONFIGS / "vit_digits.yaml", CHANGES)
    return pd.DataFrame([audited(experiment.with_(seed=seed)) for seed in SEEDS])


def audited(experiment: fedpriv.Experiment) -> dict[str, Any]:
    found = experiment.audit(CANARIES)
    estimate, users = found.estimates[0], found.users
    assert users is not None
    return {
        "seed": found.seed,
        "epsilon_rdp": found.epsilons["rdp"],
        "epsilon_pld": found.epsilons["pld"],
        "delta": found.delta,
        "confidence": found.confidence,
        "bound": found.bound.epsilon,
        "guesses": found.bound.guesses,
        "correct": found.bound.correct,
        "ceiling": found.bound.ceiling,
        "estimate": estimate.epsilon,
        "estimate_low": estimate.low,
        "estimate_high": estimate.high,
        "users_auc": users.auc,
        "users_bound": users.bound.epsilon,
        "below": found.holds,
    }


def figure(results: pd.DataFrame) -> Figure:
    plotted, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    first, most = results.iloc[0], f"most that {CANARIES} canaries show"
    axes.axhline(first.epsilon_rdp, color="black", linestyle="--", linewidth=1, label="ε by RDP")
    axes.axhline(first.epsilon_pld, color="black", linewidth=1, label="ε by PLD")
    axes.axhline(first.ceiling, color=study.GREY, linestyle=":", label=most)
    estimate, low, high = (results[f"estimate{end}"] for end in ("", "_low", "_high"))
    spread, style = [estimate - low, high - estimate], {"color": study.RED, "markersize": 4}
    axes.errorbar(results.seed, estimate, spread, fmt="s", label="estimate, no bound", **style)
    bounds = results[["bound", "users_bound"]].max(axis=1)
    axes.plot(results.seed, bounds, "o", color=study.BLUE, label="lower bound, 95%")
    axes.set(xticks=results.seed, xlabel="seed", ylabel=f"ε at δ = {first.delta:g}")
    axes.set_ylim(bottom=-0.1)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    return results[["seed", "epsilon_pld", "bound", "users_bound", "estimate", "below"]]


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
