"""Does per-layer clipping win where some layers have a local learning rate of their own?

Claim examined: per-layer clipping with LAMB beats global clipping for deep transformers (Pelikan et
al. 2025). Here the embedding and positions of a small ViT are trained at 1, 3, 10 and 30 times the
local rate of the rest, which inflates their norms beyond their use. `undone` is global clipping of
updates that were divided by these multipliers, and multiplied by them after the release: if it does
as well as per-layer clipping, the gain is that of the local rates alone; if per-layer clipping wins
at multiplier 1, and with noise only, it is that of the clipping.

What came out is in docs/results.md, "Layers with learning rates of their own". results.csv was made
by several calls, each of which adds its rows to those that are there:

    runtime.workers=1 rounds=40
    config=vit_mnist_writers.yaml data.path=FOLDER privacy.sampling.expected_cohort=50 rounds=60
        runtime.workers=1 "noises=ε = 8,low,none"
    config=asr_digits.yaml blocks=head.* seed_model.reinitialize=[head.*] runtime.workers=1
        privacy.sampling.expected_cohort=64 rules=global,undone,dim multipliers=1,10
        "noises=ε = 8" optimizers=lamb rates=0.015,0.03 seeds=17,18

of which the first left uniform and normalised at low and no noise out at multipliers 3 and 30, and
the last was made again with optimizers=adam rates=0.008,0.016. Others were of single cells, at
rates beyond an edge at which the best had been, or, of speech, a third seed, and multipliers 3 and
30, low and no noise, uniform and normalised at 0.03, low noise in part at 0.06. Kept apart, since
the best rate of a cell is of its three seeds: more_seeds.csv, of seeds 20 to 24 at these rates; and
bounds.csv, the writers at low noise with Adam, at a quarter, half, two and four times the bound.

    python simulations/learning_rate_multipliers.py                  # finished runs are kept
    python simulations/learning_rate_multipliers.py rates=0.01,0.02 seeds=17,18 noises="ε = 8"
    python simulations/learning_rate_multipliers.py show

takes config=, blocks=, rules=, multipliers=, optimizers=, noises=, rates=, seeds= and rounds=, each
a list with commas, and changes of the config by their keys, and writes results.csv and figure.png
into simulations/results/learning_rate_multipliers: a row a run, with the mean share of the squared
norm, and the coherence over users, of the inflated blocks. Table and figure choose the best server
rate of each cell, over all seeds.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import fedpriv

RULES: dict[str, dict[str, Any]] = {
    "global": {"kind": "global"},
    "undone": {"kind": "global", "undo": True},
    "dim": {"kind": "per_layer", "split": "dim"},
    "uniform": {"kind": "per_layer", "split": "uniform"},
    "normalised": {"kind": "per_layer", "split": "dim", "normalize": True},
}
NOISES: dict[str, dict[str, Any]] = {
    "none": study.NOISES["none"],
    "low": {"privacy.target_epsilon": 64.0},
    "ε = 8": study.NOISES["ε = 8"],
}
DEFAULTS = {
    "config": "vit_digits.yaml",
    "blocks": "embed*,positions*",
    "rules": ",".join(RULES),
    "multipliers": "1,3,10,30",
    "optimizers": "adam,lamb",
    "noises": ",".join(NOISES),
    "rates": "0.01,0.02,0.04,0.08",
    "seeds": "17,18,19",
    "rounds": "",
}
DATA = {"vit_digits": "digits", "vit_mnist_writers": "writers", "asr_digits": "speech"}
CELL = ["data", "noise", "optimizer", "multiplier", "rule"]
COLUMNS = [*CELL, "rate", "seed", "accuracy", "wer", "epsilon", "delta", "share", "coherence"]
STYLES = dict(zip(RULES, (study.BLACK, study.GREEN, study.BLUE, study.SKY, study.RED), strict=True))


def measure(*arguments: str) -> pd.DataFrame:
    told = dict(argument.split("=", 1) for argument in arguments)
    changes = {key: yaml.safe_load(told.pop(key)) for key in list(told) if "." in key}
    told = DEFAULTS | told
    lists = {key: value.split(",") for key, value in told.items()}
    path = study.CONFIGS / told["config"]
    sections = {"rounds": int(told["rounds"])} if told["rounds"] else {}
    experiment = fedpriv.Experiment.load(
        path, changes, name=f"{Path(path).stem}-multipliers", **sections
    )
    values = grid(lists, experiment.config.privacy.clipping.bound)
    swept = fedpriv.sweep(experiment, values, seeds=[int(seed) for seed in lists["seeds"]])
    seen = pd.DataFrame([inflated(run, lists["blocks"]) for run in swept.run])
    table = swept.rename(columns={"server.optimizer": "optimizer", "server.lr": "rate"}).join(seen)
    table = table.assign(data=DATA.get(path.stem, path.stem), multiplier=table.multiplier.map(int))
    there = study.results_of("learning_rate_multipliers")
    parts = [pd.read_csv(there), table] if there.exists() else [table]
    joined = pd.concat([part.reindex(columns=COLUMNS) for part in parts])
    joined = joined.drop_duplicates([*CELL, "rate", "seed"], keep="last")
    return joined.sort_values([*CELL, "rate", "seed"])


def grid(lists: dict[str, list[str]], bound: float) -> dict[str, Any]:
    return {
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


def measure_of(results: pd.DataFrame) -> str:
    return "accuracy" if results.wer.isna().all() else "wer"


def inflated(run: fedpriv.Run, patterns: list[str]) -> dict[str, float]:
    """Return the share of the norm, and the coherence, of the blocks with rates of their own."""
    blocks = run.blocks.reset_index("block")
    own = blocks[[any(fnmatch(name, each) for each in patterns) for name in blocks.block]]
    shares = own.groupby("round")["simulation_only.block_shares"].sum()
    return {"share": shares.mean(), "coherence": own["simulation_only.block_coherence"].mean()}


def best(results: pd.DataFrame) -> pd.DataFrame:
    """Return what the best server rate of each cell comes to, mean and spread over seeds."""
    found = []
    for _, of_data in results.groupby("data", sort=False):
        measured = measure_of(of_data)
        found.append(study.best(of_data, CELL, measured, lowest=measured == "wer"))
    return pd.concat(found)


def figure(results: pd.DataFrame) -> Figure:
    found, noises = best(results), [n for n in reversed(NOISES) if n in set(results.noise)]
    rows = found[["data", "optimizer"]].drop_duplicates().itertuples(index=False, name=None)
    pairs = sorted(rows, key=lambda pair: ([*DATA.values()].index(pair[0]), pair[1]))
    plotted, panels = plt.subplots(
        len(pairs),
        len(noises),
        figsize=(1 + 3 * len(noises), 0.6 + 2.1 * len(pairs)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, (data, optimizer) in zip(panels, pairs, strict=True):
        here = found[(found.data == data) & (found.optimizer == optimizer)]
        for axes, noise in zip(row, noises, strict=True):
            draw(axes, here[here.noise == noise], f"{data}, {optimizer}, noise: {noise}")
        measured = measure_of(results[results.data == data])
        row[0].set_ylabel("word error rate" if measured == "wer" else "held-out accuracy")
        if measured == "wer":
            row[0].invert_yaxis()  # better is higher everywhere
    plotted.supxlabel("multiplier of the local rate", fontsize=9)
    handles = [Line2D([], [], color=STYLES[rule], marker="o", markersize=3) for rule in RULES]
    panels[0, -1].legend(handles, list(RULES), loc="lower left", frameon=False, fontsize=8)
    return plotted


def draw(axes: Axes, here: pd.DataFrame, title: str) -> None:
    if here.empty:
        axes.axis("off")
        return
    for rule, rows in here.groupby("rule"):
        low, high = rows["mean"] - rows["min"], rows["max"] - rows["mean"]
        axes.errorbar(
            rows.multiplier, rows["mean"], (low, high), fmt="o-", color=STYLES[rule],
            markersize=3, capsize=2, label=rule,
        )  # fmt: skip
    axes.set_title(title, fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    axes.minorticks_off()
    axes.tick_params(labelbottom=True)
    axes.grid(alpha=0.3)


def table(results: pd.DataFrame) -> pd.DataFrame:
    index = ["data", "noise", "optimizer", "multiplier"]
    return best(results).pivot(index=index, columns="rule", values="mean").round(3)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
