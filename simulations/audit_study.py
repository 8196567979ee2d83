"""Does the audit's lower bound stay below the accountant's ε where all is right?

Claim examined: on a correctly configured run the lower bound, which may be wrong with probability
5%, lies below the ε by PLD, the tightest that is claimed, with each of 20 seeds. The run is
configs/vit_digits.yaml with fewer users and rounds and an ε that 600 canaries could refute: each
seed has its own partition, coins, directions, cohorts and noise.

    python simulations/audit_study.py [OUTPUT_FOLDER]

writes results.csv and figure.png (default folder: simulations/results/audit_study).
"""

from __future__ import annotations

import csv
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console

from fedpriv.audit import AuditSettings, audit
from fedpriv.config_files import load_config
from fedpriv.reporting.audit import Audit

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "vit_digits.yaml"
SEEDS = range(1, 21)
CANARIES = 600
OVERRIDES = (
    "rounds=3",
    "data.users=100",
    "privacy.delta=1e-4",
    "privacy.sampling.expected_cohort=50",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=2.0",
)


@dataclass(frozen=True)
class Result:
    """One audited run."""

    seed: int
    epsilon_rdp: float
    epsilon_pld: float
    delta: float
    confidence: float
    bound: float
    guesses: int
    correct: int
    ceiling: float
    estimate: float
    estimate_low: float
    estimate_high: float
    users_auc: float
    users_bound: float
    below: bool


class Unseen:
    def begin(self, rounds: int) -> None:
        pass

    def finished(self, round_: int) -> None:
        pass


def run(seed: int) -> Result:
    config = load_config(CONFIG, [*OVERRIDES, f"seed={seed}"])
    return result(audit(config, AuditSettings(CANARIES), Unseen(), threading.Event()))


def result(found: Audit) -> Result:
    summed, users = found.estimates[0], found.users
    assert users is not None
    return Result(
        seed=found.seed,
        epsilon_rdp=found.epsilons["rdp"],
        epsilon_pld=found.epsilons["pld"],
        delta=found.delta,
        confidence=found.confidence,
        bound=found.bound.epsilon,
        guesses=found.bound.guesses,
        correct=found.bound.correct,
        ceiling=found.bound.ceiling,
        estimate=summed.epsilon,
        estimate_low=summed.low,
        estimate_high=summed.high,
        users_auc=users.auc,
        users_bound=users.bound.epsilon,
        below=found.holds,
    )


def figure(results: list[Result], path: Path) -> None:
    plotted, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    first, seeds = results[0], [each.seed for each in results]
    for name, epsilon, style in (("RDP", first.epsilon_rdp, "--"), ("PLD", first.epsilon_pld, "-")):
        axes.axhline(epsilon, color="black", linestyle=style, linewidth=1, label=f"ε by {name}")
    axes.axhline(
        first.ceiling, color="#999999", linestyle=":", label=f"most that {CANARIES} canaries show"
    )
    estimates = [each.estimate for each in results]
    spread = [
        [each.estimate - each.estimate_low for each in results],
        [each.estimate_high - each.estimate for each in results],
    ]
    axes.errorbar(
        seeds, estimates, spread, fmt="s", color="#D55E00", markersize=4, label="estimate, no bound"
    )
    bounds = [max(each.bound, each.users_bound) for each in results]
    axes.plot(seeds, bounds, "o", color="#0072B2", label="lower bound, 95%")
    axes.set_xticks(seeds)
    axes.set_xlabel("seed")
    axes.set_ylabel(f"ε at δ = {first.delta:g}")
    axes.set_ylim(bottom=-0.1)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    plotted.savefig(path, dpi=150)


def main() -> None:
    torch.set_num_threads(1)
    default = ROOT / "simulations" / "results" / "audit_study"
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    output.mkdir(parents=True, exist_ok=True)
    console, results = Console(), []
    with (output / "results.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(Result.__dataclass_fields__)
        for seed in SEEDS:
            results.append(run(seed))
            rows.writerow(vars(results[-1]).values())
            file.flush()
            console.print(results[-1])
    figure(results, output / "figure.png")
    below = sum(each.below for each in results)
    console.print(
        f"the lower bound lies below the accountant's ε in {below} of {len(results)} seeds"
    )


if __name__ == "__main__":
    main()
