"""How different are the norms of the layers' updates, in a deep and in a shallow speech model?

The observation behind per-layer clipping (Pelikan et al. 2025, Zhang et al. 2024): in a deep
transformer some layers' updates are much larger than others', so that one bound for all is filled
by few. Measured here over users of `asr_digits`, two local steps from the seed model and from
random parameters, without clipping, for pre-LN models of one size and different depth: the norm of
each block of parameters, and as one number the share of the squared norm that lies in the largest
tenth of the parameters' blocks. The biases of the keys get no gradient at all, for softmax does not
change when all scores of a query move together: their norms, near 1e-10, are rounding, and lie
below the figure.

    python simulations/gradient_heterogeneity.py         # measure
    python simulations/gradient_heterogeneity.py show    # the table and the figure again

write norms.csv and figure.png into simulations/results/gradient_heterogeneity.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from clipping_by_depth import shaped
from matplotlib.ticker import MaxNLocator
from one_process import prepared, resolved
from rich.console import Console
from rich.table import Table

from fedpriv.training.cohort import train_cohort

FOLDER = Path(__file__).parent / "results" / "gradient_heterogeneity"
USERS = 48
SHAPES = ("4 blocks of 48", "40 blocks of 16")
STARTS = ("random", "seed model")
KINDS = {
    "attention q, k": r"attention\.[qk]\.weight",
    "attention v, o": r"attention\.[vo]\.weight",
    "mlp": r"mlp\.(up|down)\.weight",
    "norms": r"norm\.weight",
    "biases": r"bias",
}


@dataclass(frozen=True)
class BlockNorm:
    """The mean norm of one block of parameters over users."""

    shape: str
    start: str
    block: str
    size: int
    norm: float


def measure(shape: str, start: str) -> list[BlockNorm]:
    overrides = [*shaped(shape), "privacy=null", "cohort=256"]
    if start == "random":
        overrides.append("seed_model=null")
    experiment = prepared(resolved("asr_digits.yaml", overrides))
    parameters = experiment.server.parameters()
    summed = train_cohort(experiment.trainer, parameters, list(range(USERS)), round_=1)
    layout = experiment.plan.layout
    return [
        BlockNorm(shape, start, name, size, norm / USERS)
        for name, size, norm in zip(layout.names, layout.sizes, summed.block_norms, strict=True)
    ]


def largest_tenth(blocks: Sequence[BlockNorm]) -> float:
    """Return the share of the squared norm in the tenth of the blocks with most of it."""
    squares = np.sort([block.norm**2 for block in blocks])[::-1]
    return float(squares[: round(len(squares) / 10)].sum() / squares.sum())


def spread(blocks: Sequence[BlockNorm]) -> float:
    """Return the 90th over the 10th percentile of norms a coordinate (root mean square)."""
    rms = [block.norm / block.size**0.5 for block in blocks]
    return float(np.quantile(rms, 0.9) / np.quantile(rms, 0.1))


def figure(found: list[BlockNorm], path: Path) -> None:
    plotted, panels = plt.subplots(2, 2, figsize=(9, 6), sharey=True, layout="constrained")
    colours = dict(zip(KINDS, ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#999999"), strict=True))
    for row, start in zip(panels, STARTS, strict=True):
        for axes, shape in zip(row, SHAPES, strict=True):
            blocks = [b for b in found if (b.shape, b.start) == (shape, start)]
            for kind, pattern in KINDS.items():
                chosen = [
                    (int(match[1]), block.norm)
                    for block in blocks
                    if re.search(pattern, block.block)
                    and (match := re.search(r"blocks\.(\d+)\.", block.block))
                ]
                depths, norms = zip(*chosen, strict=True)
                axes.plot(depths, norms, "o", markersize=3, color=colours[kind], label=kind)
            axes.set_yscale("log")
            axes.set_ylim(3e-5, 0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(
                f"{shape}, from {'random parameters' if start == 'random' else 'the seed model'}:\n"
                f"{largest_tenth(blocks):.0%} of the squared norm in a tenth of the tensors",
                fontsize=9,
            )
            axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("transformer block, first to last")
    for axes in panels[:, 0]:
        axes.set_ylabel("norm of a user's update")
    panels[0, 1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    plotted.savefig(path, dpi=150)


def read() -> list[BlockNorm]:
    with (FOLDER / "norms.csv").open(newline="") as file:
        return [
            BlockNorm(
                row["shape"], row["start"], row["block"], int(row["size"]), float(row["norm"])
            )
            for row in csv.DictReader(file)
        ]


def write(found: list[BlockNorm]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "norms.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(field.name for field in fields(BlockNorm))
        rows.writerows(asdict(block).values() for block in found)


def main() -> None:
    if sys.argv[1:] != ["show"]:
        write([b for shape in SHAPES for start in STARTS for b in measure(shape, start)])
    found = read()
    figure(found, FOLDER / "figure.png")
    shown = Table("shape", "start", "tensors", "largest tenth", "90% / 10% of norms a coordinate")
    for shape in SHAPES:
        for start in STARTS:
            blocks = [b for b in found if (b.shape, b.start) == (shape, start)]
            share, ratio = f"{largest_tenth(blocks):.0%}", f"{spread(blocks):.1f}"
            shown.add_row(shape, start, f"{len(blocks)}", share, ratio)
    Console().print(shown)


if __name__ == "__main__":
    main()
