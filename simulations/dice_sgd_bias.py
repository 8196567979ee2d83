"""Does error feedback remove the bias of clipping, and at which ε does that pay?

The mean of 20,000 skewed points in the plane of least squares, f(x) = mean ‖x - a_i‖²/2: nine
tenths of the points lie near 0 and one tenth near (4, 0, ...), so that the optimum is their mean,
and a clipped gradient pulls towards the many. DP-SGD and DiceSGD (Zhang et al., ICLR 2024) take the
same steps with the same batches and the same noise of standard deviation σ on the mean gradient;
the answer is the average of the last half of the iterates. Claim of the paper: as σ → 0, DP-SGD
stalls at the distance that clipping leaves, and DiceSGD goes to the optimum. What σ costs is then
told by each accounting by its name. What is left without noise is that batches are drawn.

    python simulations/dice_sgd_bias.py         # measure (about a minute)
    python simulations/dice_sgd_bias.py show    # the table and the figure again

write results.csv and figure.png into simulations/results/dice_sgd_bias.
"""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedpriv.privacy import GlobalClipping, PoissonSampling, Unclipped
from fedpriv.privacy.accounting import PLD_UP_TO
from fedpriv.privacy.dice import DiceMechanism, dice_step, sum_batch
from fedpriv.privacy.dice_accounting import dice_epsilon

FOLDER = Path(__file__).parent / "results" / "dice_sgd_bias"
POINTS, DIMENSION, FAR = 20_000, 5, 4.0
BATCH, STEPS, RATE, DELTA = 2_000.0, 400, 0.2, 1e-6
C1, C2, G = 0.5, 0.5, 5.0
STDDEVS = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SEEDS = (1, 2, 3)
# Method: C2 and G. Without a memory DiceSGD is DP-SGD, and both its accountings are DP-SGD's.
METHODS = {
    "DP-SGD": (0.0, math.inf),
    "DiceSGD": (C2, math.inf),
    "DiceSGD, memory of gradients up to G": (C2, G),
}


@dataclass(frozen=True)
class Result:
    """One run, and what its noise costs by each accounting; PLD only below its useful range."""

    method: str
    stddev: float
    seed: int
    distance: float
    delta: float
    provable_rdp: float
    provable_pld: float | None
    published_rdp: float | None


def points() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = 0.1 * torch.randn(POINTS, DIMENSION, generator=generator)
    found[: POINTS // 10, 0] += FAR
    return found


def mechanism(method: str, stddev: float) -> DiceMechanism:
    c2, gradient = METHODS[method]
    whole = Unclipped() if math.isinf(gradient) else GlobalClipping(gradient)
    sampling = PoissonSampling(POINTS, BATCH)
    return DiceMechanism(
        sampling, stddev * BATCH / C1, GlobalClipping(C1), GlobalClipping(c2), whole
    )


def distance(data: torch.Tensor, dice: DiceMechanism, seed: int) -> float:
    """Train, and return the distance of the averaged iterates from the optimum."""
    bits, noise = (np.random.default_rng((seed, purpose)) for purpose in (0, 1))
    x, memory = torch.zeros(2, DIMENSION, dtype=torch.float64)
    average = torch.zeros_like(x)
    for step in range(STEPS):
        batch = torch.from_numpy(dice.sampling.draw(bits))
        sums = sum_batch(x - data[batch], [DIMENSION], dice)
        v, memory = dice_step(memory, sums, [DIMENSION], dice)
        x = x - RATE * (v + dice.stddev * torch.from_numpy(noise.standard_normal(DIMENSION)))
        if step >= STEPS // 2:
            average += x / (STEPS - STEPS // 2)
    return float((average - data.double().mean(0)).norm())


def costs(dice: DiceMechanism, method: str) -> tuple[float, float | None, float | None]:
    """Return ε: provable by RDP, provable by PLD, and published, where there is a memory."""
    provable = dice_epsilon(dice, STEPS, DELTA).epsilon
    tight = None
    if provable < PLD_UP_TO:
        tight = dice_epsilon(dice, STEPS, DELTA, accountant="pld").epsilon
    if method == "DP-SGD":
        return provable, tight, None
    return provable, tight, dice_epsilon(dice, STEPS, DELTA, "published").epsilon


def measure() -> list[Result]:
    data, results = points(), []
    for method in METHODS:
        for stddev in STDDEVS:
            dice = mechanism(method, stddev)
            spent = costs(dice, method)
            results += [
                Result(method, stddev, seed, distance(data, dice, seed), DELTA, *spent)
                for seed in SEEDS
            ]
    return results


def stalled(data: torch.Tensor) -> float:
    """Return how far from the optimum the clipped gradients of all points sum to zero."""
    everybody = DiceMechanism(
        PoissonSampling(POINTS, POINTS), 0.0, GlobalClipping(C1), GlobalClipping(0.0)
    )
    x = torch.zeros(DIMENSION, dtype=torch.float64)
    for _ in range(500):
        x = x - sum_batch(x - data, [DIMENSION], everybody).clipped / POINTS
    return float((x - data.double().mean(0)).norm())


COLOURS = dict(zip(METHODS, ("#0072B2", "#D55E00", "#009E73"), strict=True))


def figure(results: list[Result], path: Path) -> None:
    plotted, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    smallest = STDDEVS[1] / 3  # where σ = 0 is drawn
    for method in METHODS:
        chosen = [r for r in results if r.method == method]
        colour, near = COLOURS[method], [r.distance for r in chosen]
        large = method == "DiceSGD"  # its points are those of the third method, where σ is small
        left.plot(
            [r.stddev or smallest for r in chosen],
            near,
            "o",
            ms=7 if large else 3,
            mfc="none" if large else colour,
            color=colour,
        )
        means = [np.mean([r.distance for r in chosen if r.stddev == s]) for s in STDDEVS]
        left.plot([s or smallest for s in STDDEVS], means, color=colour, label=method)
        private = [r for r in chosen if r.stddev > 0]
        right.plot([r.provable_rdp for r in private], near[len(SEEDS) :], "o", ms=3, color=colour)
        right.plot([r.provable_rdp for r in private][:: len(SEEDS)], means[1:], color=colour)
    claimed = [r for r in results if r.method == "DiceSGD" and r.stddev > 0]
    right.plot(
        [r.published_rdp for r in claimed],
        [r.distance for r in claimed],
        "x",
        ms=4,
        color=COLOURS["DiceSGD"],
        label="DiceSGD by the published accounting:\nits authors' claim, not proved",
    )
    for axes in (left, right):
        axes.axhline(stalled(points()), color="grey", lw=0.8, ls="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    left.set_xticks([smallest, *STDDEVS[2::2]], ["0", *(f"{s:g}" for s in STDDEVS[2::2])])
    left.set_xlabel("σ: noise on each coordinate of the mean gradient")
    left.set_ylabel("distance to the optimum")
    left.set_title("As the noise goes to 0 (dashed: where clipping alone stalls)", fontsize=9)
    right.set_xlim(0.05, 1e5)
    right.set_xlabel(f"ε at δ = {DELTA:g} (RDP; lines: proved)")
    right.set_title("The same runs, by what they cost", fontsize=9)
    left.legend(fontsize=8, frameon=False)
    right.legend(fontsize=8, frameon=False, loc="upper right")
    plotted.savefig(path, dpi=150)


def read() -> list[Result]:
    with (FOLDER / "results.csv").open(newline="") as file:
        return [
            Result(
                row["method"],
                float(row["stddev"]),
                int(row["seed"]),
                float(row["distance"]),
                float(row["delta"]),
                float(row["provable_rdp"]),
                *(float(row[k]) if row[k] else None for k in ("provable_pld", "published_rdp")),
            )
            for row in csv.DictReader(file)
        ]


def write(results: list[Result]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "results.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(field.name for field in fields(Result))
        rows.writerows(asdict(result).values() for result in results)


def table(results: list[Result]) -> Table:
    shown = Table("method", "σ", "distance", "ε provable (rdp)", "(pld)", "ε published (claim)")
    for result in results[:: len(SEEDS)]:
        same = (result.method, result.stddev)
        near = [r.distance for r in results if (r.method, r.stddev) == same]
        epsilons = (result.provable_rdp, result.provable_pld, result.published_rdp)
        cells = ["-" if e is None else f"{e:.4g}" for e in epsilons]
        distances = " ".join(f"{d:.3g}" for d in near)
        shown.add_row(result.method, f"{result.stddev:g}", distances, *cells)
    return shown


def main() -> None:
    if sys.argv[1:] != ["show"]:
        write(measure())
    results = read()
    figure(results, FOLDER / "figure.png")
    Console(width=140).print(table(results))


if __name__ == "__main__":
    main()
