"""Does per-layer clipping win where some layers have a local learning rate of their own?

Claim examined: per-layer clipping with LAMB beats global clipping for deep transformers (Pelikan et
al. 2025). Here the embedding and positions of a small ViT are trained at 1, 3, 10 and 30 times the
local rate of the rest, which inflates their norms beyond their use. `undone` is global clipping of
updates that were divided by these multipliers, and multiplied by them after the release: if it does
as well as per-layer clipping, the gain is that of the local rates alone; if per-layer clipping wins
at multiplier 1, and with noise only, it is that of the clipping.

results.csv holds global, undone and dim at multipliers 1 and 10, with Adam and LAMB, three seeds,
40 rounds, rates from 0.005 to 0.16, of which the best is inside everywhere:

    rules=global,undone,dim multipliers=1,10 rates=0.005,0.01,0.02,0.04,0.08,0.16 rounds=40
    noises="ε = 8,none"

At ε = 8 and multiplier 10 undone has 0.862 (Adam) and 0.842 (LAMB), dim 0.859 and 0.835, global
0.805 and 0.730; at multiplier 1, where undone is global with other noise, 0.855 and 0.829, 0.855
and 0.841, 0.865 and 0.813. Without noise all are within 0.007 (Adam) and 0.017 (LAMB). So here the
gain of per-layer clipping is that of undoing the local rates.

    python simulations/learning_rate_multipliers.py                  # finished runs are kept
    python simulations/learning_rate_multipliers.py rates=0.01,0.02 seeds=17,18 noises="ε = 8"
    python simulations/learning_rate_multipliers.py show

takes config=, blocks=, rules=, multipliers=, optimizers=, noises=, rates=, seeds= and rounds=, each
a list with commas, and writes results.csv and figure.png into
simulations/results/learning_rate_multipliers: a row a run, with the mean share of the squared norm,
and the coherence over users, of the inflated blocks. Table and figure choose the best server rate
of each cell, over all seeds.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv

RULES: dict[str, dict[str, Any]] = {
    "global": {"kind": "global"},
    "undone": {"kind": "global", "undo": True},
    "dim": {"kind": "per_layer", "split": "dim"},
    "uniform": {"kind": "per_layer", "split": "uniform"},
    "normalised": {"kind": "per_layer", "split": "dim", "normalize": True},
}
NOISES: dict[str, dict[str, Any]] = {
    "none": {"privacy.target_epsilon": None, "privacy.noise_multiplier": 0.0},
    "low": {"privacy.target_epsilon": 64.0},
    "ε = 8": {"privacy.target_epsilon": 8.0},
}
DEFAULTS = {
    "config": "vit_digits.yaml",
    "blocks": "embed*,positions*",
    "rules": ",".join(RULES),
    "multipliers": "1,3,10,30",
    "optimizers": "adam,lamb",
    "noises": ",".join(NOISES),
    "rates": "0.005,0.01,0.02,0.04",
    "seeds": "17,18,19",
    "rounds": "",
}
CELL = ["noise", "optimizer", "multiplier", "rule"]
STYLES = dict(zip(RULES, (study.BLACK, study.GREEN, study.BLUE, study.SKY, study.RED), strict=True))


def measure(*arguments: str) -> pd.DataFrame:
    told = DEFAULTS | dict(argument.split("=", 1) for argument in arguments)
    lists = {key: value.split(",") for key, value in told.items()}
    path = study.CONFIGS / told["config"]
    changes = {"rounds": int(told["rounds"])} if told["rounds"] else {}
    experiment = fedpriv.Experiment.load(path, changes, name=f"{Path(path).stem}-multipliers")
    bound = experiment.config.privacy.clipping.bound
    values = {
        "rule": {
            rule: {"privacy.clipping": RULES[rule] | {"bound": bound}} for rule in lists["rules"]
        },
        "multiplier": {
            m: {"local.multipliers": dict.fromkeys(lists["blocks"], float(m))}
            for m in lists["multipliers"]
        },
        "noise": {noise: NOISES[noise] for noise in lists["noises"]},
        "server.optimizer": lists["optimizers"],
        "server.lr": [float(rate) for rate in lists["rates"]],
    }
    swept = fedpriv.sweep(experiment, values, seeds=[int(seed) for seed in lists["seeds"]])
    seen = pd.DataFrame([inflated(run, lists["blocks"]) for run in swept.run])
    table = swept.rename(columns={"server.optimizer": "optimizer", "server.lr": "rate"}).join(seen)
    return table[[*CELL, "rate", "seed", measure_of(table), "epsilon", "delta", *seen.columns]]


def measure_of(results: pd.DataFrame) -> str:
    return "wer" if "wer" in results else "accuracy"


def inflated(run: fedpriv.Run, patterns: list[str]) -> dict[str, float]:
    """Return the share of the norm, and the coherence, of the blocks with rates of their own."""
    blocks = run.blocks.reset_index("block")
    own = blocks[[any(fnmatch(name, each) for each in patterns) for name in blocks.block]]
    shares = own.groupby("round")["simulation_only.block_shares"].sum()
    return {"share": shares.mean(), "coherence": own["simulation_only.block_coherence"].mean()}


def best(results: pd.DataFrame) -> pd.DataFrame:
    """Return what the best server rate of each cell comes to, mean and spread over seeds."""
    measured = measure_of(results)
    return study.best(results, CELL, measured, lowest=measured == "wer")


def figure(results: pd.DataFrame) -> Figure:
    found, noises = best(results), [n for n in NOISES if n in set(results.noise)]
    optimizers = list(dict.fromkeys(results.optimizer))
    plotted, panels = plt.subplots(
        len(optimizers),
        len(noises),
        figsize=(1 + 3 * len(noises), 0.6 + 2.4 * len(optimizers)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, optimizer in zip(panels, optimizers, strict=True):
        for axes, noise in zip(row, noises, strict=True):
            here = found[(found.optimizer == optimizer) & (found.noise == noise)]
            for rule, rows in here.groupby("rule"):
                low, high = rows["mean"] - rows["min"], rows["max"] - rows["mean"]
                axes.errorbar(
                    rows.multiplier, rows["mean"], (low, high), fmt="o-", color=STYLES[rule],
                    markersize=3, capsize=2, label=rule,
                )  # fmt: skip
            axes.set_title(f"{optimizer}, noise: {noise}", fontsize=9)
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("multiplier of the local rate")
    panels[0, 0].set_ylabel(f"held-out {measure_of(results)}")
    panels[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    index = ["noise", "optimizer", "multiplier"]
    return best(results).pivot(index=index, columns="rule", values="mean").round(3)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
