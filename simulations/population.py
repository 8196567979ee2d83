"""Is a round of 100 users as quick, and a worker as small, among ten million as among ten thousand?

Synthetic images are made from a user's number, so that nothing needs to be kept of those who are
not sampled. Each population is a `fedpriv run` of its own, through Flower and two Ray workers:
start-up is the time until the first round begins, memory that of all its processes together.
Populations take turns, so that a machine that slows down slows them all, and medians are shown.

    python simulations/population.py [COHORT]

writes results.csv into simulations/results/population (for a cohort of its own, beside it).
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table
from watched import watch

FOLDER = Path(__file__).parent / "results" / "population"
CONFIG = Path(__file__).parent / "benchmarks" / "vit_small.yaml"
POPULATIONS = (10_000, 100_000, 1_000_000, 10_000_000)
TURNS, ROUNDS, WARM_UP = 3, 15, 3


@dataclass(frozen=True)
class Turn:
    """What one run of a population showed: the rounds after those that warm up."""

    startup_seconds: float
    seconds: list[float]
    peak_mib: float


@dataclass(frozen=True)
class Result:
    """What was measured of one population: medians over turns, and over the rounds of all."""

    population: int
    cohort: int
    startup_seconds: float
    seconds_a_round: float
    peak_mib: float

    @classmethod
    def of(cls, population: int, cohort: int, turns: list[Turn]) -> Result:
        return cls(
            population,
            cohort,
            statistics.median(turn.startup_seconds for turn in turns),
            statistics.median(second for turn in turns for second in turn.seconds),
            statistics.median(turn.peak_mib for turn in turns),
        )


def run(population: int, cohort: int) -> Turn:
    rounds = ROUNDS if cohort < 1000 else 2 * WARM_UP
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        settings = {
            "run_dir": folder,
            "rounds": rounds,
            "data.users": population,
            "privacy.delta": 0.01 / population,
            "privacy.sampling": f"{{kind: poisson, expected_cohort: {cohort}}}",
            "evaluation.every": 1000,
            "runtime.cache_mib": 0,
        }
        overrides = [f"--set={key}={value}" for key, value in settings.items()]
        seen = watch([sys.executable, "-m", "fedpriv", "run", str(CONFIG), *overrides])
        if seen.returncode:
            sys.exit("\n".join(line for _, line in seen.lines))
        metrics = (folder / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in metrics][WARM_UP:]
    # A round's line is printed when it is finished.
    first = next(time for time, line in seen.lines if line.startswith("round"))
    return Turn(first - statistics.median(seconds), seconds, seen.peak)


def measured(cohort: int) -> list[Result]:
    """Return what was measured of each population; every second turn goes backwards."""
    turns: dict[int, list[Turn]] = {population: [] for population in POPULATIONS}
    for number in range(TURNS if cohort < 1000 else 1):
        for population in POPULATIONS[:: -1 if number % 2 else 1]:
            turns[population].append(run(population, cohort))
            Console(stderr=True).print(f"{population:,}: {turns[population][-1]}")
    return [Result.of(population, cohort, turns[population]) for population in POPULATIONS]


def main() -> None:
    cohort = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = measured(cohort)
    name = "results.csv" if cohort == 100 else f"cohort_{cohort}.csv"
    with (FOLDER / name).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(field.name for field in fields(Result))
        rows.writerows(asdict(result).values() for result in results)
    shown = Table("population", "cohort", "start-up", "a round", "peak of all processes")
    for one in results:
        shown.add_row(
            f"{one.population:,}",
            f"{one.cohort:,}",
            f"{one.startup_seconds:.1f} s",
            f"{one.seconds_a_round:.3f} s",
            f"{one.peak_mib:,.0f} MiB",
        )
    Console().print(shown)


if __name__ == "__main__":
    main()
