"""Does per-layer clipping win in a deep speech model where it does not in a shallow one?

Claim examined (Pelikan et al. 2025): in a deep transformer the norms of the layers' updates differ
so much that global clipping starves small ones, and per-layer clipping with layer-wise normalised
steps (LAMB) is needed. Two models of the same size, 4 blocks of width 48 and 40 blocks of width 16,
are fine-tuned from their own seed models, with global and three kinds of per-layer clipping, Adam
and LAMB, at three noise levels. Noise is given as its standard deviation on the mean update in
units of the clip bound, so that a small cohort stands for a large one.

Found (24 rounds of 32 users, tuned over 40, two seeds): it does not turn at 40 blocks of this
size. In the deep model global clipping with Adam has the least errors at every noise (35, 41, 47%),
`dim` is 1 to 2 points behind it, and `uniform` 3 to 6; in the shallow one all but `uniform` lie
within 2 points of one another, which is what two seeds differ by. LAMB is better than Adam by more
than that in one place alone: `uniform` in the deep model, at the least noise. A tenth of the seed
models' tensors holds 83% of an update's squared norm in the deep model and 74% in the shallow one
(gradient_heterogeneity.py), so uneven layers alone do not make per-layer clipping win.

    python simulations/clipping_by_depth.py         # a day; finished runs are kept
    python simulations/clipping_by_depth.py show    # the table and the figure again

writes tuning.csv, whose rates were chosen on development speakers, results.csv and figure.png into
simulations/results/clipping_by_depth. Those that are there were measured on half of the recordings.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.figure import Figure

import fedpriv

COHORT, SEEDS = 32, [17, 18]
# The table has less rounds than the tuning before it, for want of time.
ROUNDS = {"development": 40, "test": 24}
SHAPES = {
    "4 blocks of 48": {"depth": 4, "dim": 48, "heads": 4},
    "40 blocks of 16": {"depth": 40, "dim": 16, "heads": 1},
}
STACK = {"4 blocks of 48": 4, "40 blocks of 16": 8}
CLIPPING = {
    "global": {"kind": "global"},
    "uniform": {"kind": "per_layer", "split": "uniform"},
    "dim": {"kind": "per_layer", "split": "dim"},
    "dim, normalised": {"kind": "per_layer", "split": "dim", "normalize": True},
}
COLOURS = dict(zip(CLIPPING, (study.BLACK, study.ORANGE, study.BLUE, study.RED), strict=True))
RATES = {"adam": (0.004, 0.008), "lamb": (0.02, 0.04)}
NOISE, TUNED_AT = [0.001, 0.004, 0.016], [0.004]
CONTENDER = ["shape", "clipping", "optimizer"]
COLUMNS = [*CONTENDER, "rate", "noise", "seed", "wer", "update_norm", "parameters"]


def shaped(shape: str) -> dict[str, Any]:
    """Return the changes that make a model of that shape, with a seed model of its own."""
    return {
        **{f"model.{key}": value for key, value in SHAPES[shape].items()},
        "runtime.stack": STACK[shape],
        "runtime.workers": 1,
        "seed_model.path": f"runs/clipping-by-depth/{shape.replace(' ', '-')}.safetensors",
        "seed_model.pretrain.steps": 800,
    }


def contending(shape: str, clipping: str, optimizer: str, rate: float) -> dict[str, Any]:
    rule = {f"privacy.clipping.{key}": value for key, value in CLIPPING[clipping].items()}
    return {**shaped(shape), **rule, "server.optimizer": optimizer, "server.lr": rate}


def noisy(noise: float) -> dict[str, Any]:
    return {"privacy.target_epsilon": None, "privacy.noise_multiplier": noise * COHORT}


def trained(
    contenders: Iterable[tuple[Any, ...]], noise: list[float], seeds: list[int], evaluation: str
) -> pd.DataFrame:
    rounds = ROUNDS[evaluation]
    local = {"steps": 2, "batch_size": 3, "lr": 0.2, "max_grad_norm": 1.0, "order": "by_length"}
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / "asr_digits.yaml",
        {
            "data.evaluation": evaluation,
            "evaluation.every": rounds,
            "privacy.sampling.expected_cohort": COHORT,
        },
        rounds=rounds,
        local=local,
    )
    values = {
        "contender": {each: contending(*each) for each in contenders},
        "noise": {each: noisy(each) for each in noise},
    }
    folder = f"runs/clipping-by-depth/{evaluation}"
    table = fedpriv.sweep(experiment, values, seeds, run_dir=folder)
    table[[*CONTENDER, "rate"]] = table.contender.tolist()
    table["update_norm"] = table.run.map(study.update_norm)
    return table[COLUMNS]


def measure() -> pd.DataFrame:
    each = itertools.product(SHAPES, CLIPPING, RATES)
    tried = [(*contender, rate) for contender in each for rate in RATES[contender[-1]]]
    tuned = trained(tried, TUNED_AT, [1], "development")
    tuned.to_csv(study.results_of("clipping_by_depth", "tuning.csv"), index=False)
    best = tuned.loc[tuned.groupby(CONTENDER).wer.idxmin(), [*CONTENDER, "rate"]]
    return trained(best.itertuples(index=False, name=None), NOISE, SEEDS, "test")


def figure(results: pd.DataFrame) -> Figure:
    plotted, panels = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for axes, shape in zip(panels, SHAPES, strict=True):
        here = results[results["shape"] == shape].assign(wer=100 * results.wer)
        for (clipping, colour), optimizer in itertools.product(COLOURS.items(), RATES):
            rows = here.query("clipping == @clipping and optimizer == @optimizer")
            line, mark = ("-", "o") if optimizer == "lamb" else ("--", "s")
            means = rows.groupby("noise").wer.mean()
            axes.plot(means, line, color=colour, label=f"{clipping}, {optimizer}")
            axes.plot(rows.noise, rows.wer, mark, color=colour, markersize=4)
        axes.set(xscale="log", xlabel="noise on the mean / clip bound")
        axes.set_xticks(NOISE, [f"{noise:g}" for noise in NOISE])
        axes.minorticks_off()
        axes.set_title(f"{shape}: {here.parameters.iloc[0]:,} parameters", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("word error rate, % (each point a seed)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    index, columns = [*CONTENDER, "rate"], ["noise", "seed"]
    return (100 * results.pivot(index=index, columns=columns, values="wer")).round(1)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
