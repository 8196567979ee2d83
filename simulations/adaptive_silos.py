"""Can silos find their clip bound themselves, and what does that ask of the learning rate?

`configs/vit_digits_silos.yaml` (12 silos, examples protected by ε = 8 at most) with bounds from a
hundred times too small to a hundred times too large: fixed, or adaptive from there (the median of
the gradients' norms, followed from step to step), at the same ε and two local learning rates.

    python simulations/adaptive_silos.py [OUTPUT_FOLDER]    # a quarter of an hour

writes results.csv and figure.png (default folder: simulations/results/adaptive_silos).
"""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from rich.console import Console

ROOT = Path(__file__).parents[1]
BOUNDS, LEARNING_RATES, SEEDS = (0.01, 1.0, 100.0), (0.1, 0.5), (17, 18)
KINDS = {"fixed": "global", "adaptive": "adaptive"}


@dataclass(frozen=True)
class Result:
    """One run: `bound` at its start, `last_bound` in its last round."""

    clipping: str
    bound: float
    lr: float
    seed: int
    accuracy: float
    last_bound: float
    epsilon: float


def run(clipping: str, bound: float, lr: float, seed: int) -> Result:
    with TemporaryDirectory() as folder:
        overrides = [
            f"privacy.clipping={{kind: {KINDS[clipping]}, bound: {bound}}}",
            f"local.lr={lr}",
            f"seed={seed}",
            "privacy.accountants=[rdp]",
            "privacy.delta=1e-3",
            f"run_dir={folder}/run",
        ]
        options = [part for override in overrides for part in ("--set", override)]
        config = str(ROOT / "configs" / "vit_digits_silos.yaml")
        command = [sys.executable, "-m", "fedpriv", "run", config, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        *_, last = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(last)
    return Result(
        clipping,
        bound,
        lr,
        seed,
        accuracy=row["held_out"]["accuracy"],
        last_bound=row["clip_bound"],
        epsilon=row["epsilon"]["rdp"],
    )


def figure(results: list[Result], path: Path) -> None:
    plotted, panels = plt.subplots(
        1, len(LEARNING_RATES), figsize=(7, 3.2), sharey=True, layout="constrained"
    )
    for axes, lr in zip(panels, LEARNING_RATES, strict=True):
        for clipping, colour in zip(KINDS, ("#222222", "#0072B2"), strict=True):
            found = [r for r in results if (r.clipping, r.lr) == (clipping, lr)]
            axes.plot([r.bound for r in found], [r.accuracy for r in found], "o", color=colour)
            means = [
                sum(r.accuracy for r in found if r.bound == bound) / len(SEEDS) for bound in BOUNDS
            ]
            axes.plot(BOUNDS, means, color=colour, label=clipping)
        axes.set_xscale("log")
        axes.set_xlabel("clip bound at the start")
        axes.set_title(f"local learning rate {lr:g}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (each point a seed)")
    panels[-1].legend()
    plotted.savefig(path, dpi=150)


def main() -> None:
    default = Path(__file__).parent / "results" / "adaptive_silos"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with (folder / "results.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(Result)])
        rows.writeheader()
        for cell in itertools.product(KINDS, BOUNDS, LEARNING_RATES, SEEDS):
            results.append(run(*cell))
            rows.writerow(asdict(results[-1]))
            file.flush()
            Console(stderr=True).print(results[-1])
    figure(results, folder / "figure.png")


if __name__ == "__main__":
    main()
