"""Does a memory that users keep remove the bias of clipping, and where can it not?

Each user holds ten samples and, when it is drawn, sends the gradient of ½·‖θ − x‖² at the next of
them, x: the optimum is the mean of all samples, in closed form. One sample in ten lies far away,
always on the same side, so that clipped gradients point to another place. In the first problem
every user has one of these, and no user's *mean* gradient at the optimum exceeds the clip bound:
what is cut off one time can be sent another time. In the second one user in ten has them all: such
a user has more to send each time than it may ever send.

Plain clipping, and user-held memory in both variants, have the same sampling, sensitivity and
noise, and so the same ε. The last half of the iterates is averaged; what distance is left without
noise comes from who was drawn how often.

    python simulations/error_feedback_bias.py

writes results.csv and figure.png into simulations/results/error_feedback_bias.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedpriv.privacy import (
    Dice,
    ErrorFeedback,
    GaussianMechanism,
    GlobalClipping,
    PoissonSampling,
    Purpose,
    Randomness,
    Remainder,
    feed_back,
)

FOLDER = Path(__file__).parent / "results" / "error_feedback_bias"
USERS, DIMENSIONS, COHORT, ROUNDS = 200, 10, 20.0, 2000
BOUND, RATE = 1.0, 0.05
SAMPLES, FAR = 10, 6.0

NOISE = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = (17, 18)
PROBLEMS = ("large now and then", "large for good")

#: A memory that decays to nothing is plain clipping. All send contributions of norm at most BOUND.
METHODS: dict[str, tuple[float, ErrorFeedback]] = {
    "plain clipping": (BOUND, Remainder(decay=0.0)),
    "memory, remainder": (BOUND, Remainder()),
    "memory, dice": (BOUND / 2, Dice(GlobalClipping(BOUND / 2))),
}


@dataclass(frozen=True)
class Result:
    """One run: what is varied, and how far from the optimum it ended."""

    problem: str
    method: str
    noise_multiplier: float
    seed: int
    distance: float
    largest_memory: float


@dataclass(frozen=True)
class Problem:
    """Where everybody's samples lie: `[USERS, SAMPLES, DIMENSIONS]`."""

    samples: Tensor

    @classmethod
    def drawn(cls, name: str, seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        centres = 0.1 * torch.randn(USERS, 1, DIMENSIONS, generator=generator, dtype=torch.float64)
        samples = centres.repeat(1, SAMPLES, 1)
        if name == "large now and then":
            turns = torch.randint(SAMPLES, (USERS,), generator=generator)
            samples[torch.arange(USERS), turns, 0] += FAR
        else:
            samples[: USERS // SAMPLES, :, 0] += FAR
        return cls(samples)

    @property
    def optimum(self) -> Tensor:
        """The mean of all samples."""
        return self.samples.mean(dim=(0, 1))


def run(problem_name: str, method: str, noise_multiplier: float, seed: int) -> Result:
    """Train as a run does: draw, bound, add up, add noise, divide by the expected cohort, step."""
    problem = Problem.drawn(problem_name, seed)
    bound, feedback = METHODS[method]
    clipping = GlobalClipping(bound)
    sampling = PoissonSampling(USERS, COHORT)
    mechanism = GaussianMechanism(noise_multiplier, feedback.contribution(clipping))
    randomness = Randomness.simulation(seed, f"{problem_name}/{method}/{noise_multiplier}")
    turns = torch.zeros(USERS, dtype=torch.int64)
    theta, average = torch.zeros(DIMENSIONS, dtype=torch.float64), 0.0
    memories = torch.zeros(USERS, DIMENSIONS, dtype=torch.float64)
    for round_ in range(1, ROUNDS + 1):
        cohort = torch.from_numpy(sampling.draw(randomness.numpy(Purpose.SAMPLING, round_)))
        updates = theta - problem.samples[cohort, turns[cohort] % SAMPLES]
        turns[cohort] += 1
        fed = feed_back(updates, memories[cohort], [DIMENSIONS], clipping, feedback)
        memories[cohort] = fed.memories
        noise = randomness.numpy(Purpose.NOISE, round_)
        released = mechanism.release(fed.sent.total, [DIMENSIONS], noise)
        theta = theta - RATE * released / sampling.expected_cohort
        if round_ > ROUNDS // 2:
            average = average + theta / (ROUNDS - ROUNDS // 2)
    distance = float((average - problem.optimum).norm())
    largest = float(memories.norm(dim=1).max())
    return Result(problem_name, method, noise_multiplier, seed, distance, largest)


def results() -> Iterator[Result]:
    for cell in itertools.product(PROBLEMS, METHODS, NOISE, SEEDS):
        yield run(*cell)


def table(found: list[Result]) -> Table:
    heads = [f"z = {noise:g}" for noise in NOISE]
    shown = Table("problem", "method", *heads, "largest memory, z = 0")
    for problem, method in itertools.product(PROBLEMS, METHODS):
        rows = [r for r in found if (r.problem, r.method) == (problem, method)]
        cells = [
            ", ".join(f"{r.distance:.3f}" for r in rows if r.noise_multiplier == noise)
            for noise in NOISE
        ]
        largest = max(r.largest_memory for r in rows if r.noise_multiplier == 0)
        shown.add_row(problem, method, *cells, f"{largest:.1f}")
    return shown


def figure(found: list[Result], path: Path) -> None:
    plotted, panels = plt.subplots(
        1, len(PROBLEMS), figsize=(9.5, 3.8), sharey=True, layout="constrained"
    )
    styles = dict(zip(METHODS, (("#222222", "o"), ("#0072B2", "s"), ("#D55E00", "^")), strict=True))
    places = range(len(NOISE))
    for axes, problem in zip(panels, PROBLEMS, strict=True):
        for method, (colour, mark) in styles.items():
            rows = [r for r in found if (r.problem, r.method) == (problem, method)]
            at = [[r.distance for r in rows if r.noise_multiplier == noise] for noise in NOISE]
            means = [sum(values) / len(values) for values in at]
            axes.plot(places, means, color=colour, label=method)
            for place, values in zip(places, at, strict=True):
                axes.plot([place] * len(values), values, mark, color=colour, markersize=4)
        axes.set_yscale("log")
        axes.set_xticks(places, [f"{noise:g}" for noise in NOISE])
        axes.set_xlabel("noise multiplier z")
        axes.set_title(f"users' updates {problem}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("distance to the optimum (each point a seed)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    plotted.savefig(path, dpi=150)


def main() -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = list(results())
    with (FOLDER / "results.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(Result)])
        rows.writeheader()
        rows.writerows(asdict(result) for result in found)
    figure(found, FOLDER / "figure.png")
    Console().print(table(found))


if __name__ == "__main__":
    main()
