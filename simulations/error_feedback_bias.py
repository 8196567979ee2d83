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

Found: memory removes the bias of the first problem, where the noise allows; in the second one it
grows without end and the bias stays.

    python simulations/error_feedback_bias.py
    python simulations/error_feedback_bias.py show    # the table and the figure again

writes results.csv and figure.png into simulations/results/error_feedback_bias.
"""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
import torch
from matplotlib.figure import Figure
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

USERS, DIMENSIONS, COHORT, ROUNDS = 200, 10, 20.0, 2000
BOUND, RATE = 1.0, 0.05
SAMPLES, FAR = 10, 6.0
NOISE, SEEDS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0), (17, 18)
PROBLEMS = ("large now and then", "large for good")
#: A memory that decays to nothing is plain clipping. All send contributions of norm at most BOUND.
METHODS: dict[str, tuple[float, ErrorFeedback]] = {
    "plain clipping": (BOUND, Remainder(decay=0.0)),
    "memory, remainder": (BOUND, Remainder()),
    "memory, dice": (BOUND / 2, Dice(GlobalClipping(BOUND / 2))),
}
STYLES = ((study.BLACK, "o"), (study.BLUE, "s"), (study.RED, "^"))


def samples_of(problem: str, seed: int) -> Tensor:
    """Return where everybody's samples lie: `[USERS, SAMPLES, DIMENSIONS]`."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.1 * torch.randn(USERS, 1, DIMENSIONS, generator=generator, dtype=torch.float64)
    samples = centres.repeat(1, SAMPLES, 1)
    if problem == "large now and then":
        turns = torch.randint(SAMPLES, (USERS,), generator=generator)
        samples[torch.arange(USERS), turns, 0] += FAR
    else:
        samples[: USERS // SAMPLES, :, 0] += FAR
    return samples


def run(problem: str, method: str, noise_multiplier: float, seed: int) -> dict[str, Any]:
    """Draw, bound, add up, add noise, divide by the expected cohort, step: in closed form."""
    samples, (bound, feedback) = samples_of(problem, seed), METHODS[method]
    clipping, sampling = GlobalClipping(bound), PoissonSampling(USERS, COHORT)
    mechanism = GaussianMechanism(noise_multiplier, feedback.contribution(clipping))
    randomness = Randomness.simulation(seed, f"{problem}/{method}/{noise_multiplier}")
    turns = torch.zeros(USERS, dtype=torch.int64)
    theta, average = torch.zeros(2, DIMENSIONS, dtype=torch.float64)
    memories = torch.zeros(USERS, DIMENSIONS, dtype=torch.float64)
    for round_ in range(1, ROUNDS + 1):
        cohort = torch.from_numpy(sampling.draw(randomness.numpy(Purpose.SAMPLING, round_)))
        updates = theta - samples[cohort, turns[cohort] % SAMPLES]
        turns[cohort] += 1
        fed = feed_back(updates, memories[cohort], [DIMENSIONS], clipping, feedback)
        memories[cohort] = fed.memories
        noise = randomness.numpy(Purpose.NOISE, round_)
        released = mechanism.release(fed.sent.total, [DIMENSIONS], noise)
        theta = theta - RATE * released / sampling.expected_cohort
        if round_ > ROUNDS // 2:
            average = average + theta / (ROUNDS - ROUNDS // 2)
    return {
        "problem": problem,
        "method": method,
        "noise_multiplier": noise_multiplier,
        "seed": seed,
        "distance": float((average - samples.mean(dim=(0, 1))).norm()),
        "largest_memory": float(memories.norm(dim=1).max()),
    }


def measure() -> pd.DataFrame:
    torch.set_num_threads(1)
    cells = itertools.product(PROBLEMS, METHODS, NOISE, SEEDS)
    return pd.DataFrame([run(*cell) for cell in cells])


def figure(results: pd.DataFrame) -> Figure:
    plotted, panels = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
    results = results.assign(place=results.noise_multiplier.map(NOISE.index))
    for axes, problem in zip(panels, PROBLEMS, strict=True):
        for method, (colour, mark) in zip(METHODS, STYLES, strict=True):
            rows = results[(results.problem == problem) & (results.method == method)]
            axes.plot(rows.groupby("place").distance.mean(), color=colour, label=method)
            axes.plot(rows.place, rows.distance, mark, color=colour, markersize=4)
        axes.set_yscale("log")
        axes.set_xticks(range(len(NOISE)), [f"{noise:g}" for noise in NOISE])
        axes.set_xlabel("noise multiplier z")
        axes.set_title(f"users' updates {problem}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("distance to the optimum (each point a seed)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return plotted


def table(results: pd.DataFrame) -> pd.DataFrame:
    index, columns = ["problem", "method", "seed"], "noise_multiplier"
    shown = results.pivot(index=index, columns=columns, values="distance").round(3)
    without = results[results.noise_multiplier == 0].set_index(index)
    return shown.assign(**{"largest memory, z = 0": without.largest_memory.round(1)})


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
