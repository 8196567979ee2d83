"""Is a round of 100 users as quick, and a worker as small, among ten million as among ten thousand?

Synthetic images are made from a user's number, so that nothing needs to be kept of those who are
not sampled. Each population is a run of its own, through Flower and two Ray workers.

Start-up, the time until the first round begins, and memory, that of all its processes together, are
those of a whole `fedpriv run`; populations take turns, and medians are shown. Rounds are timed as
in speed.py: the runs of all populations stand ready at once and take turns of three rounds, every
second time backwards, and the first round of each turn is dropped. A machine whose speed drifts
then slows all of them, so that a population's seconds are compared with those of the smallest one
in the same turn: the median of that ratio is shown, with a 95% confidence interval.

    python simulations/benchmarks/population.py [COHORT]    # of a thousand and more, fewer rounds

writes results.csv into simulations/results/population (for a cohort of its own, beside it).
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

from contenders import HERE, ROOT, Contender, Running
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap
from watched import watch

FOLDER = ROOT / "simulations" / "results" / "population"
CONFIG = HERE / "vit_small.yaml"
POPULATIONS = (10_000, 100_000, 1_000_000, 10_000_000)
ROUNDS_A_RUN, ROUNDS_A_TURN = 10, 3
# Of each population, and of a cohort of a thousand and more, whose rounds take long.
WHOLE_RUNS, WHOLE_RUNS_OF_MANY = 3, 1
TURNS, TURNS_OF_MANY = 15, 5


@dataclass(frozen=True)
class WholeRun:
    """What one `fedpriv run` of a population showed."""

    startup_seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Result:
    """What was measured of one population.

    Attributes:
        startup_seconds: median over whole runs.
        peak_mib: the same, of all processes together.
        seconds_a_round: median over the rounds that were timed in turns.
        to_smallest: median over turns of its seconds over those of the smallest population.
        low, high: 95% confidence interval of `to_smallest` (bootstrap, BCa).
    """

    population: int
    cohort: int
    startup_seconds: float
    peak_mib: float
    seconds_a_round: float
    to_smallest: float
    low: float
    high: float


def overrides(population: int, cohort: int, rounds: int) -> list[str]:
    settings = {
        "rounds": rounds,
        "data.users": population,
        "privacy.delta": 0.01 / population,
        "privacy.sampling": f"{{kind: fixed_size, expected_cohort: {cohort}}}",
        "evaluation.every": 1000,
        "runtime.cache_mib": 0,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def whole_run(population: int, cohort: int) -> WholeRun:
    with TemporaryDirectory() as name:
        folder = Path(name) / "run"
        settings = [*overrides(population, cohort, ROUNDS_A_RUN), f"run_dir={folder}"]
        arguments = [f"--set={one}" for one in settings]
        seen = watch([sys.executable, "-m", "fedpriv", "run", str(CONFIG), *arguments])
        if seen.returncode:
            sys.exit("\n".join(line for _, line in seen.lines))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # A round's line is printed when it is finished.
    first = next(time for time, line in seen.lines if line.startswith("round"))
    return WholeRun(first - statistics.median(row["seconds"] for row in rows[1:]), seen.peak)


def whole_runs(cohort: int) -> dict[int, list[WholeRun]]:
    found: dict[int, list[WholeRun]] = {population: [] for population in POPULATIONS}
    for number in range(WHOLE_RUNS if cohort < 1000 else WHOLE_RUNS_OF_MANY):
        for population in POPULATIONS[:: -1 if number % 2 else 1]:
            found[population].append(whole_run(population, cohort))
            Console(stderr=True).print(f"{population:,}: {found[population][-1]}")
    return found


def timed_in_turns(cohort: int) -> dict[int, list[list[float]]]:
    """Return seconds a round: of each population for each turn, those that count."""
    turns = TURNS if cohort < 1000 else TURNS_OF_MANY
    rounds = ROUNDS_A_TURN * turns
    found: dict[int, list[list[float]]] = {population: [] for population in POPULATIONS}
    with TemporaryDirectory() as name, ExitStack() as stack:
        running = {}
        for population in POPULATIONS:
            folder = Path(name) / str(population)
            folder.mkdir()
            script = str(HERE / "fedpriv_rounds.py")
            line = (sys.executable, script, str(folder), str(CONFIG))
            contender = Contender(
                f"{population:,}", folder, (*line, *overrides(population, cohort, rounds))
            )
            running[population] = stack.enter_context(Running(contender))
            running[population].stand_ready()
        for turn in range(turns):
            for population in POPULATIONS[:: -1 if turn % 2 else 1]:
                one = running[population]
                with one.turn():
                    seconds = [one.round(cohort) for _ in range(ROUNDS_A_TURN)]
                found[population].append(seconds[1:])
        for one in running.values():
            one.end()
    # The first turn warms up; a run's last round measures the held-out examples.
    return {population: by_turn[1:-1] for population, by_turn in found.items()}


def measured(cohort: int) -> list[Result]:
    runs, timed = whole_runs(cohort), timed_in_turns(cohort)
    smallest = [statistics.mean(turn) for turn in timed[POPULATIONS[0]]]
    results = []
    for population in POPULATIONS:
        own = [statistics.mean(turn) for turn in timed[population]]
        ratios = [mine / its for mine, its in zip(own, smallest, strict=True)]
        low, high = 1.0, 1.0
        if population != POPULATIONS[0]:
            interval = bootstrap((ratios,), statistics.median, vectorized=False, rng=0)
            low, high = interval.confidence_interval
        results.append(
            Result(
                population,
                cohort,
                statistics.median(one.startup_seconds for one in runs[population]),
                statistics.median(one.peak_mib for one in runs[population]),
                statistics.median(second for turn in timed[population] for second in turn),
                statistics.median(ratios),
                float(low),
                float(high),
            )
        )
    return results


def main() -> None:
    cohort = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = measured(cohort)
    name = "results.csv" if cohort == 100 else f"cohort_{cohort}.csv"
    with (FOLDER / name).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(field.name for field in fields(Result))
        rows.writerows(asdict(result).values() for result in results)
    shown = Table("population", "start-up", "memory, peak", "a round", "to the smallest")
    for one in results:
        shown.add_row(
            f"{one.population:,}",
            f"{one.startup_seconds:.1f} s",
            f"{one.peak_mib:,.0f} MiB",
            f"{one.seconds_a_round:.3f} s",
            f"{one.to_smallest:.2f} ({one.low:.2f}-{one.high:.2f})",
        )
    Console().print(shown)


if __name__ == "__main__":
    main()
