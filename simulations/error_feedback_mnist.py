"""Where does user-held memory help a private vision transformer, and where does it hurt?

`configs/vit_mnist_writers.yaml` (539 writers, or as many users whose labels are skewed by a
Dirichlet draw) is trained without and with user-held memory, at the same ε and δ: over the clip
bound, how much of a memory is forgotten each time its user takes part, the noise, and how seldom
users take part, which is how old a memory is when it is sent.

    python simulations/error_feedback_mnist.py run DATA [PROCESSES]   # DATA: folder of QMNIST
    python simulations/error_feedback_mnist.py time DATA              # how long one cell takes
    python simulations/error_feedback_mnist.py show                   # the table and the figure

write results.csv and figure.png into simulations/results/error_feedback_mnist. Finished cells are
not run again. The learning rate is the config's in all cells.
"""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from one_process import resolved, train
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent / "results" / "error_feedback_mnist"

PEOPLE = {
    "writers": ["data.partition={kind: natural}"],
    "skewed labels": ["data.partition={kind: dirichlet, alpha: 0.1}", "data.users=539"],
}
MEMORY = {
    "none": "none",
    "decay 0.5": "{kind: user, decay: 0.5}",
    "decay 0.9": "{kind: user, decay: 0.9}",
    "no decay": "user",
    "dice": "{kind: user, variant: dice}",
}
BOUNDS = (0.0125, 0.05, 0.2)
#: ε at δ = 1e-3; 0 stands for no noise at all.
EPSILONS = (1.0, 8.0, 0.0)
ROUNDS = 60
SEEDS = (17, 18)


@dataclass(frozen=True)
class Setting:
    """What is varied beside the memory."""

    people: str
    cohort: int
    epsilon: float
    bound: float


@dataclass(frozen=True)
class Cell(Setting):
    """One run. `bound` bounds a contribution: of dice, update and memory have half of it each."""

    memory: str
    seed: int


@dataclass(frozen=True)
class Result(Cell):
    """One finished run."""

    accuracy: float
    update_norm: float
    memory_norm: float


#: Bound and noise together; then, at ε = 8, other people, and a cohort of a quarter.
SETTINGS = [
    *(Setting("writers", 200, *both) for both in itertools.product(EPSILONS, BOUNDS)),
    *(Setting("skewed labels", 200, 8.0, bound) for bound in BOUNDS),
    *(Setting("writers", 50, 8.0, bound) for bound in BOUNDS),
]


def cells() -> Iterator[Cell]:
    for seed, setting, memory in itertools.product(SEEDS, SETTINGS, MEMORY):
        yield Cell(**asdict(setting), memory=memory, seed=seed)


def run(job: tuple[Cell, Path]) -> Result:
    cell, data = job
    noise = "privacy.noise_multiplier=0" if cell.epsilon == 0 else "privacy.noise_multiplier=null"
    target = "null" if cell.epsilon == 0 else f"{cell.epsilon}"
    bound = cell.bound / 2 if cell.memory == "dice" else cell.bound
    config = resolved(
        "vit_mnist_writers.yaml",
        [
            *PEOPLE[cell.people],
            f"data.path={data}",
            noise,
            f"privacy.target_epsilon={target}",
            f"rounds={ROUNDS}",
            f"privacy.sampling.expected_cohort={cell.cohort}",
            f"privacy.clipping.bound={bound}",
            f"privacy.error_feedback={MEMORY[cell.memory]}",
            "privacy.accountants=[rdp]",
            "privacy.delta=1e-3",
            f"seed={cell.seed}",
        ],
    )
    outcome = train(config)
    return Result(
        **asdict(cell),
        accuracy=outcome.measures["accuracy"],
        update_norm=outcome.norm,
        memory_norm=outcome.memory_norm,
    )


def run_all(data: Path, processes: int) -> None:
    done = {tuple(asdict(result).values())[: len(fields(Cell))] for result in read()}
    jobs = [(cell, data) for cell in cells() if tuple(asdict(cell).values()) not in done]
    path = FOLDER / "results.csv"
    if not path.exists():
        path.write_text(",".join(field.name for field in fields(Result)) + "\n")
    # Processes are exchanged now and then: each cell prepares its data anew, and memory grows.
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, maxtasksperchild=6) as pool, path.open("a") as file:
        rows = csv.writer(file)
        for number, result in enumerate(pool.imap_unordered(run, jobs), 1):
            rows.writerow(asdict(result).values())
            file.flush()
            Console(stderr=True).print(f"{number}/{len(jobs)}", result)


def read() -> list[Result]:
    if not (FOLDER / "results.csv").exists():
        return []
    kinds = {"people": str, "memory": str, "cohort": int, "seed": int}
    with (FOLDER / "results.csv").open(newline="") as file:
        return [
            Result(**{name: kinds.get(name, float)(value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


def of(results: list[Result], setting: Setting, memory: str) -> list[Result]:
    wanted = asdict(setting)
    return [
        r
        for r in results
        if r.memory == memory and all(getattr(r, name) == wanted[name] for name in wanted)
    ]


def noise_text(epsilon: float) -> str:
    return f"ε = {epsilon:g}" if epsilon else "no noise"


def table(results: list[Result]) -> Table:
    shown = Table("users", "cohort", "privacy", "bound", *MEMORY)
    for setting in SETTINGS:
        found = [
            ", ".join(f"{r.accuracy:.3f}" for r in of(results, setting, memory))
            for memory in MEMORY
        ]
        noise = noise_text(setting.epsilon)
        shown.add_row(setting.people, str(setting.cohort), noise, f"{setting.bound:g}", *found)
    return shown


def figure(results: list[Result], path: Path) -> None:
    groups = list(dict.fromkeys((s.people, s.cohort, s.epsilon) for s in SETTINGS))
    plotted, panels = plt.subplots(
        1, len(groups), figsize=(3.0 * len(groups), 3.6), sharey=True, layout="constrained"
    )
    colours = dict(
        zip(MEMORY, ("#222222", "#56B4E9", "#0072B2", "#009E73", "#D55E00"), strict=True)
    )
    for axes, (people, cohort, epsilon) in zip(panels, groups, strict=True):
        for memory, colour in colours.items():
            found = [(b, of(results, Setting(people, cohort, epsilon, b), memory)) for b in BOUNDS]
            found = [(bound, rows) for bound, rows in found if rows]
            means = [statistics.mean(r.accuracy for r in rows) for _, rows in found]
            axes.plot([bound for bound, _ in found], means, color=colour, label=memory)
            for bound, rows in found:
                axes.plot([bound] * len(rows), [r.accuracy for r in rows], "o", color=colour, ms=4)
        axes.set_xscale("log")
        axes.set_xticks(BOUNDS, [f"{bound:g}" for bound in BOUNDS])
        axes.minorticks_off()
        axes.set_xlabel("clip bound")
        axes.set_title(f"{people}, {cohort} a round\n{noise_text(epsilon)}", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (each point a seed)")
    panels[-1].legend(
        title="memory", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8
    )
    plotted.savefig(path, dpi=150)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = sys.argv[1] if len(sys.argv) > 1 else "show"
    if command == "run":
        run_all(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 2)
    if command == "time":
        began = time.process_time()
        result = run((next(cells()), Path(sys.argv[2])))
        seconds, count = time.process_time() - began, len(list(cells()))
        Console().print(f"{seconds:.0f} s of one core a cell, {count} cells", result)
    if results := read():
        figure(results, FOLDER / "figure.png")
        Console().print(table(results))


if __name__ == "__main__":
    main()
