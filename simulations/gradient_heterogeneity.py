"""How different are the norms of the layers' updates, in a deep and in a shallow speech model?

The observation behind per-layer clipping (Pelikan et al. 2025, Zhang et al. 2024): in a deep
transformer some layers' updates are much larger than others', so that one bound for all is filled
by few. Measured here over users of `asr_digits`, two local steps from the seed model and from
random parameters, without clipping, for pre-LN models of one size and different depth: the norm of
each block of parameters, and as one number the share of the squared norm that lies in the largest
tenth of the parameters' blocks. The biases of the keys get no gradient at all, for softmax does not
change when all scores of a query move together: their norms, near 1e-10, are rounding, and lie
below the figure.

Found: a tenth of the seed models' tensors holds 83% of an update's squared norm in the deep model
and 74% in the shallow one.

    python simulations/gradient_heterogeneity.py         # finished runs are kept
    python simulations/gradient_heterogeneity.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/gradient_heterogeneity.
"""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import study
from clipping_by_depth import SHAPES, shaped
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import fedpriv

USERS = 48
STARTS = {"random": {"seed_model": None}, "seed model": {}}
KINDS = {
    "attention q, k": (r"attention\.[qk]\.weight", study.BLUE),
    "attention v, o": (r"attention\.[vo]\.weight", study.SKY),
    "mlp": (r"mlp\.(?:up|down)\.weight", study.RED),
    "norms": (r"norm\.weight", study.GREEN),
    "biases": (r"bias", study.GREY),
}


def measure() -> pd.DataFrame:
    """Train all users for one round; before it the server has done nothing yet."""
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / "asr_digits.yaml",
        {"data.users": USERS},
        name="gradient-heterogeneity",
        privacy=None,
        cohort=USERS,
        rounds=1,
    )
    values = {"shape": {shape: shaped(shape) for shape in SHAPES}, "start": STARTS}
    swept = fedpriv.sweep(experiment, values)
    found = {(each["shape"], each.start): norms(each.run) for _, each in swept.iterrows()}
    return pd.concat(found, names=["shape", "start"]).reset_index(["shape", "start"])


def norms(run: fedpriv.Run) -> pd.DataFrame:
    seen = run.blocks.loc[1, "simulation_only.block_norms"]
    sizes = {name: block.numel() for name, block in run.model().named_parameters()}
    return pd.DataFrame({"block": seen.index, "size": seen.index.map(sizes), "norm": seen.values})


def largest_tenth(norms: pd.Series) -> float:
    """Return the share of the squared norm in the tenth of the blocks with most of it."""
    squares = np.sort(norms.to_numpy() ** 2)[::-1]
    return float(squares[: round(len(squares) / 10)].sum() / squares.sum())


def figure(results: pd.DataFrame) -> Figure:
    plotted, panels = plt.subplots(2, 2, figsize=(9, 6), sharey=True, layout="constrained")
    starts = {"random": "random parameters", "seed model": "the seed model"}
    for axes, (start, shape) in zip(panels.flat, itertools.product(STARTS, SHAPES), strict=True):
        here = results[(results["shape"] == shape) & (results.start == start)]
        for kind, (pattern, colour) in KINDS.items():
            rows = here[here.block.str.contains(pattern)]
            depth = rows.block.str.extract(r"blocks\.(\d+)\.", expand=False).astype(float)
            axes.plot(depth, rows.norm, "o", markersize=3, color=colour, label=kind)
        axes.set(yscale="log", ylim=(3e-5, 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        most = f"{largest_tenth(here.norm):.0%} of the squared norm in a tenth of the tensors"
        axes.set_title(f"{shape}, from {starts[start]}:\n{most}", fontsize=9)
        axes.grid(alpha=0.3)
    for below, left in zip(panels[1], panels[:, 0], strict=True):
        below.set_xlabel("transformer block, first to last")
        left.set_ylabel("norm of a user's update")
    panels[0, 1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    rms = results.assign(rms=results.norm / results["size"] ** 0.5)
    groups = rms.groupby(["shape", "start"])
    quantiles = groups.rms.quantile([0.1, 0.9]).unstack()
    return pd.DataFrame(
        {
            "tensors": groups.size(),
            "largest tenth": groups.norm.apply(largest_tenth).round(2),
            "90% / 10% of norms a coordinate": (quantiles[0.9] / quantiles[0.1]).round(1),
        }
    )


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
