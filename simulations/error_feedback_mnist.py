"""Where does user-held memory help a private vision transformer, and where does it hurt?

`configs/vit_mnist_writers.yaml` (539 writers, or as many users whose labels are skewed by a
Dirichlet draw) is trained without and with user-held memory, at the same ε and δ: over the clip
bound, how much of a memory is forgotten each time its user takes part, the noise, and how seldom
users take part, which is how old a memory is when it is sent. The learning rate is the config's.

Found: it loses in nearly all of the 15 settings, the more the less of a memory is forgotten; with
the largest bound and users who come seldom it neither helps nor hurts.

    python simulations/error_feedback_mnist.py DATA    # folder of QMNIST; finished runs are kept
    python simulations/error_feedback_mnist.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/error_feedback_mnist. `bound` bounds a
contribution: of dice, update and memory have half of it each. `epsilon` 0 stands for no noise.
"""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv

SEEDS, ROUNDS, BOUNDS = [17, 18], 60, [0.0125, 0.05, 0.2]
PEOPLE = {
    "writers": {"data.partition": {"kind": "natural"}},
    "skewed labels": {"data.partition": {"kind": "dirichlet", "alpha": 0.1}, "data.users": 539},
}
MEMORY = {
    "none": {"kind": "none"},
    "decay 0.5": {"kind": "user", "decay": 0.5},
    "decay 0.9": {"kind": "user", "decay": 0.9},
    "no decay": {"kind": "user"},
    "dice": {"kind": "user", "variant": "dice"},
}
COLOURS = dict(zip(MEMORY, study.COLOURS, strict=False))
SETTING = ["people", "cohort", "epsilon"]
SETTINGS = [("writers", 200, 1.0), ("writers", 200, 8.0), ("writers", 200, 0.0)]
SETTINGS += [("skewed labels", 200, 8.0), ("writers", 50, 8.0)]
COLUMNS = [*SETTING, "bound", "memory", "seed", "accuracy", "update_norm", "memory_norm"]


def setting(people: str, cohort: int, epsilon: float) -> dict[str, Any]:
    return {
        **PEOPLE[people],
        "privacy.sampling.expected_cohort": cohort,
        "privacy.target_epsilon": epsilon or None,
        "privacy.noise_multiplier": None if epsilon else 0,
    }


def contribution(bound: float, memory: str) -> dict[str, Any]:
    clipping = {"privacy.clipping.bound": bound / 2 if memory == "dice" else bound}
    return {"privacy.error_feedback": MEMORY[memory], **clipping}


def measure(data: str) -> pd.DataFrame:
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / "vit_mnist_writers.yaml",
        {
            "data.path": data,
            "privacy.accountants": ["rdp"],
            "privacy.delta": 1e-3,
            "evaluation.every": ROUNDS,
        },
        name="error-feedback-mnist",
        rounds=ROUNDS,
    )
    pairs = itertools.product(BOUNDS, MEMORY)
    values = {
        "setting": {each: setting(*each) for each in SETTINGS},
        "contribution": {each: contribution(*each) for each in pairs},
    }
    table = fedpriv.sweep(experiment, values, SEEDS)
    table[SETTING] = table.setting.tolist()
    table[["bound", "memory"]] = table.contribution.tolist()
    table["update_norm"] = table.run.map(study.update_norm)
    table["memory_norm"] = table.run.map(memory_norm)
    return table[COLUMNS]


def memory_norm(run: fedpriv.Run) -> float:
    return float(run.metrics.iloc[-1].get("simulation_only.memory_norm", 0.0))


def figure(results: pd.DataFrame) -> Figure:
    plotted, panels = plt.subplots(1, 5, figsize=(15, 3.6), sharey=True, layout="constrained")
    for axes, (people, cohort, epsilon) in zip(panels, SETTINGS, strict=True):
        here = results.query("people == @people and cohort == @cohort and epsilon == @epsilon")
        for memory, colour in COLOURS.items():
            rows = here[here.memory == memory]
            axes.plot(rows.groupby("bound").accuracy.mean(), color=colour, label=memory)
            axes.plot(rows.bound, rows.accuracy, "o", color=colour, markersize=4)
        axes.set(xscale="log", xlabel="clip bound")
        axes.set_xticks(BOUNDS, [f"{bound:g}" for bound in BOUNDS])
        axes.minorticks_off()
        noise = f"ε = {epsilon:g}" if epsilon else "no noise"
        axes.set_title(f"{people}, {cohort} a round\n{noise}", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (each point a seed)")
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    panels[-1].legend(title="memory", frameon=False, fontsize=8, **place)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    columns = ["memory", "seed"]
    return results.pivot(index=[*SETTING, "bound"], columns=columns, values="accuracy").round(3)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
