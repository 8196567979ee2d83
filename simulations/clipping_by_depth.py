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

    python simulations/clipping_by_depth.py tune [PROCESSES]   # rates, development speakers
    python simulations/clipping_by_depth.py run [PROCESSES]    # the table, test speakers
    python simulations/clipping_by_depth.py show               # the table and the figure again

write tuning.csv, results.csv and figure.png into simulations/results/clipping_by_depth. Finished
cells are not run again.
"""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from one_process import resolved, train
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent / "results" / "clipping_by_depth"
COHORT = 32
# The table has less rounds than the tuning before it, for want of time.
ROUNDS = {"development": 40, "test": 24}

SHAPES = {
    "4 blocks of 48": ["model.depth=4", "model.dim=48", "model.heads=4", "runtime.stack=4"],
    "40 blocks of 16": ["model.depth=40", "model.dim=16", "model.heads=1", "runtime.stack=8"],
}
CLIPPING = {
    "global": ["privacy.clipping.kind=global"],
    "uniform": ["privacy.clipping.kind=per_layer", "privacy.clipping.split=uniform"],
    "dim": ["privacy.clipping.kind=per_layer", "privacy.clipping.split=dim"],
    "dim, normalised": [
        "privacy.clipping.kind=per_layer",
        "privacy.clipping.split=dim",
        "privacy.clipping.normalize=true",
    ],
}
RATES = {"adam": (0.004, 0.008), "lamb": (0.02, 0.04)}
NOISE = (0.001, 0.004, 0.016)
TUNED_AT = 0.004
SEEDS = (17, 18)


@dataclass(frozen=True)
class Cell:
    """One run: what is varied."""

    shape: str
    clipping: str
    optimizer: str
    rate: float
    noise: float
    seed: int


@dataclass(frozen=True)
class Result(Cell):
    """One finished run."""

    wer: float
    update_norm: float
    parameters: int


def shaped(shape: str) -> list[str]:
    """Return the overrides that make a model of that shape, and say where its seed model lies."""
    path = f"runs/clipping-by-depth/{shape.replace(' ', '-')}.safetensors"
    few_steps = "seed_model.pretrain.steps=800"
    return [*SHAPES[shape], f"seed_model.path={path}", few_steps, "runtime.workers=1"]


def make_seed_model(shape: str) -> None:
    resolved("asr_digits.yaml", shaped(shape))


def run(job: tuple[Cell, str]) -> Result:
    cell, evaluation = job
    config = resolved(
        "asr_digits.yaml",
        [
            *shaped(cell.shape),
            *CLIPPING[cell.clipping],
            f"data.evaluation={evaluation}",
            f"rounds={ROUNDS[evaluation]}",
            "local={steps: 2, batch_size: 3, lr: 0.2, max_grad_norm: 1.0, order: by_length}",
            f"server.optimizer={cell.optimizer}",
            f"server.lr={cell.rate}",
            "privacy.target_epsilon=null",
            f"privacy.noise_multiplier={cell.noise * COHORT}",
            f"privacy.sampling.expected_cohort={COHORT}",
            f"seed={cell.seed}",
        ],
    )
    outcome = train(config, every=2)
    return Result(
        **asdict(cell),
        wer=outcome.measures["wer"],
        update_norm=outcome.norm,
        parameters=outcome.parameters,
    )


def tuning_cells() -> Iterator[Cell]:
    for shape, clipping, optimizer in itertools.product(SHAPES, CLIPPING, RATES):
        for rate in RATES[optimizer]:
            yield Cell(shape, clipping, optimizer, rate, TUNED_AT, seed=1)


def cells() -> Iterator[Cell]:
    """Yield the cells of the table, each at the rate that did best on development speakers."""
    tuned = read("tuning.csv")
    for seed, noise, shape, clipping, optimizer in itertools.product(
        SEEDS, NOISE, SHAPES, CLIPPING, RATES
    ):
        tried = [
            r for r in tuned if (r.shape, r.clipping, r.optimizer) == (shape, clipping, optimizer)
        ]
        rate = min(tried, key=lambda r: r.wer).rate
        yield Cell(shape, clipping, optimizer, rate, noise, seed)


def run_all(wanted: Iterable[Cell], evaluation: str, name: str, processes: int) -> None:
    done = {tuple(asdict(r).values())[: len(fields(Cell))] for r in read(name)}
    jobs = [(cell, evaluation) for cell in wanted if tuple(asdict(cell).values()) not in done]
    path = FOLDER / name
    if not path.exists():
        path.write_text(",".join(f.name for f in fields(Result)) + "\n")
    with multiprocessing.get_context("fork").Pool(processes) as pool, path.open("a") as file:
        pool.map(make_seed_model, SHAPES, chunksize=1)
        rows = csv.writer(file)
        for number, result in enumerate(pool.imap_unordered(run, jobs), 1):
            rows.writerow(asdict(result).values())
            file.flush()
            Console(stderr=True).print(f"{number}/{len(jobs)}", result)


def read(name: str) -> list[Result]:
    if not (FOLDER / name).exists():
        return []
    with (FOLDER / name).open(newline="") as file:
        return [
            Result(
                row["shape"],
                row["clipping"],
                row["optimizer"],
                *(float(row[key]) for key in ("rate", "noise")),
                int(row["seed"]),
                *(float(row[key]) for key in ("wer", "update_norm")),
                int(row["parameters"]),
            )
            for row in csv.DictReader(file)
        ]


def table(results: list[Result]) -> Table:
    shown = Table("shape", "clipping", "optimizer", "rate", *(f"noise {n:g}" for n in NOISE))
    for shape, clipping, optimizer in itertools.product(SHAPES, CLIPPING, RATES):
        rows = chosen(results, shape, clipping, optimizer)
        found = [", ".join(f"{r.wer:.1%}" for r in rows if r.noise == noise) for noise in NOISE]
        rates = sorted({f"{r.rate:g}" for r in rows})
        shown.add_row(shape, clipping, optimizer, ", ".join(rates), *found)
    return shown


def chosen(results: list[Result], shape: str, clipping: str, optimizer: str) -> list[Result]:
    return [
        r for r in results if (r.shape, r.clipping, r.optimizer) == (shape, clipping, optimizer)
    ]


def figure(results: list[Result], path: Path) -> None:
    plotted, panels = plt.subplots(1, len(SHAPES), figsize=(9.5, 3.8), layout="constrained")
    colours = dict(zip(CLIPPING, ("#222222", "#E69F00", "#0072B2", "#D55E00"), strict=True))
    for axes, shape in zip(panels, SHAPES, strict=True):
        for clipping, optimizer in itertools.product(CLIPPING, RATES):
            rows = chosen(results, shape, clipping, optimizer)
            levels = sorted({r.noise for r in rows})
            means = [100 * statistics.mean(r.wer for r in rows if r.noise == n) for n in levels]
            colour, lamb = colours[clipping], optimizer == "lamb"
            label = f"{clipping}, {optimizer}"
            axes.plot(levels, means, "-" if lamb else "--", color=colour, label=label)
            points = [100 * r.wer for r in rows]
            mark = "o" if lamb else "s"
            axes.plot([r.noise for r in rows], points, mark, color=colour, markersize=4)
        axes.set_xscale("log")
        axes.set_xticks(NOISE, [f"{n:g}" for n in NOISE])
        axes.minorticks_off()
        axes.set_xlabel("noise on the mean / clip bound")
        parameters = next(r.parameters for r in results if r.shape == shape)
        axes.set_title(f"{shape}: {parameters:,} parameters", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("word error rate, % (each point a seed)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    plotted.savefig(path, dpi=150)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = sys.argv[1] if len(sys.argv) > 1 else "show"
    processes = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    if command == "tune":
        run_all(tuning_cells(), "development", "tuning.csv", processes)
    if command == "run":
        run_all(cells(), "test", "results.csv", processes)
    if results := read("results.csv"):
        figure(results, FOLDER / "figure.png")
        Console().print(table(results))


if __name__ == "__main__":
    main()
