"""How fast is fedpriv beside vanilla Flower and Apple's pfl-research, on this machine, now?

Six workloads, all on two worker processes of one thread each (configs beside this file):

- vit-small, vit-large: vision transformers of 0.2 and 2.7 million parameters on synthetic images,
  100 of 200 users a round, two local steps of five images. fedpriv runs with everything on
  (clipping, noise, ledger, checkpoints, metrics). pfl-research 0.5 runs with its own central
  Gaussian mechanism, over gloo. Flower is its own FedAvg with one message a user and two Ray
  actors, without privacy; model and data stay in the actors, which is kind to it.
- cnn: the same work for a convolutional network with group normalisation, of 5 thousand parameters,
  that fedpriv gets from outside and trains by vmap.
- speech: a CTC encoder of 0.24 million parameters on synthetic speech, 64 users a round;
  lognormal: the small vision transformer with users of 1 to 100 images; and untuned: one of 64
  small patches and a class token, with such users, by which no setting was ever chosen. fedpriv
  alone, many users at once (`runtime.engine: stacked`) against one after another (`sequential`).

First one round without noise and clipping is compared: the average update of every contender,
from the same start, with the same users and full-batch local steps (or, between the two engines,
the same batches), must be that of the first contender within 1e-4 of its largest number. Then all
contenders of a workload stand ready at once and take turns (A B C A B C ...), three rounds a turn,
while the others' processes are stopped: Ray's would take up to a tenth of a core. A round's time is
the wall time from one round's end to the next one's, as seen from outside, with all that happens
there. The first turn is a warm-up and is dropped. So are the first round of each turn, which finds
the processor's caches full of the others' numbers, as no round of a training does, and each
contender's last, in which fedpriv measures the held-out examples.

    python simulations/benchmarks/speed.py --pfl-python pfl-env/bin/python

pfl needs an environment of its own, for it wants an older dp-accounting:

    python -m venv pfl-env
    pfl-env/bin/pip install 'pfl[pytorch]==0.5.2' torch==2.14.1 numpy==2.4.6 pydantic==2.14.3

Without --pfl-python its column is left out. Writes results.csv and figure.png (default folder:
simulations/results/benchmarks); the times mean something only where nothing else is running.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import signal
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from contenders import (
    FLOWER,
    HERE,
    PFL,
    ROOT,
    SEQUENTIAL,
    Contender,
    Peers,
    Running,
    against_itself,
    against_peers,
    cohort_of,
    difference,
    start_of,
    updates,
)
from rich.console import Console
from rich.table import Table

from fedpriv.config_files import load_config

LARGEST_DIFFERENCE = 1e-4
CHECKED_USERS = 20
ROUNDS_A_TURN = 3
NOISE_FREE = ["privacy=null", "rounds=1", f"data.users={CHECKED_USERS}"]

Line = Callable[[Path, list[str], Path, Peers], list[Contender]]


@dataclass(frozen=True)
class Workload:
    """Who runs which config; `check` makes of it a round that all must agree on."""

    config: Path
    line_up: Line
    check: list[str]


def both_engines(config: Path, overrides: list[str], folder: Path, peers: Peers) -> list[Contender]:
    return against_itself(config, overrides, folder)


# The order of examples is each contender's own, so that with peers all steps take all examples.
FULL_BATCH = [*NOISE_FREE, "local.batch_size=10", "local.lr=0.5"]
WORKLOADS = {
    "vit-small": Workload(HERE / "vit_small.yaml", against_peers, FULL_BATCH),
    "vit-large": Workload(HERE / "vit_large.yaml", against_peers, FULL_BATCH),
    "cnn": Workload(HERE / "cnn.yaml", against_peers, FULL_BATCH),
    "speech": Workload(HERE / "speech.yaml", both_engines, NOISE_FREE),
    "lognormal": Workload(HERE / "lognormal.yaml", both_engines, NOISE_FREE),
    "untuned": Workload(HERE / "untuned.yaml", both_engines, NOISE_FREE),
}


@dataclass(frozen=True)
class Round:
    """One round of one contender, and whether it counts."""

    workload: str
    contender: str
    number: int
    users: int
    seconds: float
    kept: bool
    update_difference: float


@dataclass(frozen=True)
class Summary:
    """The kept rounds of a contender, in users a second: median, slowest and fastest."""

    workload: str
    contender: str
    median: float
    slowest: float
    fastest: float
    update_difference: float


def main() -> None:
    # So that contenders and their folders go with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse(sys.argv[1:])
    console = Console(width=None if sys.stdout.isatty() else 110)
    if options.pfl_python is None:
        console.print("without --pfl-python: pfl-research is left out")
    peers = Peers(options.pfl_python)
    options.output.mkdir(parents=True, exist_ok=True)
    rounds: list[Round] = []
    with TemporaryDirectory() as scratch:
        for name in options.workloads:
            workload, folder = WORKLOADS[name], Path(scratch) / name
            differences = agree(workload, folder / "check", peers)
            told = ", ".join(f"{who} {value:.1e}" for who, value in differences.items())
            console.print(f"{name}: updates agree, difference to the first: {told}")
            rounds += measure(name, folder / "timed", peers, differences, options)
    write(rounds, options.output / "results.csv")
    figure(summaries(rounds), rounds, options.output / "figure.png")
    console.print(table(summaries(rounds)))
    console.print(f"medians of {2 * options.turns} rounds, {machine()}")


def parse(arguments: list[str]) -> argparse.Namespace:
    described, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=described,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "simulations" / "results" / "benchmarks"
    parser.add_argument("--pfl-python", metavar="PATH", help="interpreter with pfl installed")
    parser.add_argument(
        "--turns", type=int, default=4, help="of two kept rounds each (default 4, at least 3)"
    )
    parser.add_argument("--output", type=Path, default=default, metavar="FOLDER")
    parser.add_argument(
        "--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), metavar="NAME"
    )
    options = parser.parse_args(arguments)
    if options.turns < 3:
        parser.error("--turns must be at least 3")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output: {options.output} is a file; write the name of a folder")
    return options


def agree(workload: Workload, folder: Path, peers: Peers) -> dict[str, float]:
    """Compare one noise-free round of all contenders; return each one's difference to the first.

    Ends the program where one differs: then there is nothing to compare in speed.
    """
    contenders = workload.line_up(workload.config, workload.check, folder, peers)
    config = load_config(workload.config, workload.check)
    found = updates(contenders, start_of(config), cohort_of(config))
    reference = found[contenders[0].name]
    differences = {name: difference(update, reference) for name, update in found.items()}
    apart = {name: value for name, value in differences.items() if value > LARGEST_DIFFERENCE}
    if apart:
        sys.exit(f"{workload.config.stem}: updates differ from the first contender's: {apart}")
    return differences


def measure(
    name: str,
    folder: Path,
    peers: Peers,
    differences: dict[str, float],
    options: argparse.Namespace,
) -> list[Round]:
    """Run all contenders of a workload in turn."""
    workload = WORKLOADS[name]
    number = ROUNDS_A_TURN * (1 + options.turns) + 1
    overrides = [f"rounds={number}", f"evaluation.every={number}"]
    users = cohort_of(load_config(workload.config, overrides))
    contenders = workload.line_up(workload.config, overrides, folder, peers)
    rounds = []
    with ExitStack() as stack:
        running = [stack.enter_context(Running(contender)) for contender in contenders]
        for one in running:
            one.stand_ready()
        for first in range(0, number, ROUNDS_A_TURN):
            for one in running:
                who = one.contender.name
                with one.turn():
                    for place in range(first, min(first + ROUNDS_A_TURN, number)):
                        kept = ROUNDS_A_TURN < place < number - 1 and place > first
                        taken = users, one.round(users), kept, differences[who]
                        rounds.append(Round(name, who, place + 1, *taken))
        for one in running:
            one.end()
    return rounds


def summaries(rounds: list[Round]) -> list[Summary]:
    """Sum up the kept rounds of each contender of each workload, in the order of `rounds`."""
    found = []
    for workload, contender in dict.fromkeys((r.workload, r.contender) for r in rounds):
        own = [r for r in rounds if (r.workload, r.contender) == (workload, contender)]
        speeds = [r.users / r.seconds for r in own if r.kept]
        median = own[0].users / statistics.median(r.seconds for r in own if r.kept)
        apart = own[0].update_difference
        found.append(Summary(workload, contender, median, min(speeds), max(speeds), apart))
    return found


def table(summed: list[Summary]) -> Table:
    known = {"÷ Flower": FLOWER, "÷ pfl": PFL, "÷ sequential": SEQUENTIAL}
    present = {one.contender for one in summed}
    baselines = {title: name for title, name in known.items() if name in present}
    shown = Table("workload", "contender", "users/s", "slowest", "fastest", *baselines)
    for one in summed:
        others = {s.contender: s.median for s in summed if s.workload == one.workload}
        ratios = [
            f"{one.median / others[name]:.2f}" if name in others else ""
            for name in baselines.values()
        ]
        speeds = [f"{speed:.1f}" for speed in (one.median, one.slowest, one.fastest)]
        shown.add_row(one.workload, one.contender, *speeds, *ratios)
    return shown


def figure(summed: list[Summary], rounds: list[Round], path: Path) -> None:
    workloads = list(dict.fromkeys(one.workload for one in summed))
    plotted, panels = plt.subplots(
        1, len(workloads), figsize=(3.2 * len(workloads), 3.2), layout="constrained", squeeze=False
    )
    for axes, workload in zip(panels[0], workloads, strict=True):
        own = [one for one in summed if one.workload == workload]
        colours = ["#0072B2", *["#999999"] * (len(own) - 1)]
        axes.bar(range(len(own)), [one.median for one in own], color=colours, width=0.6)
        for place, one in enumerate(own):
            speeds = [
                r.users / r.seconds
                for r in rounds
                if r.kept and (r.workload, r.contender) == (workload, one.contender)
            ]
            axes.plot([place] * len(speeds), speeds, "o", color="black", markersize=3, alpha=0.5)
        labels = [one.contender.replace(" ", "\n").replace(",", "") for one in own]
        axes.set_xticks(range(len(own)), labels, fontsize=8)
        axes.set_title(workload, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylabel("users a second")
    plotted.suptitle(
        f"Median of rounds (points), in turns; 2 workers of 1 thread; {machine()}", fontsize=8
    )
    plotted.savefig(path, dpi=150)


def machine() -> str:
    """Return what the times were taken on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}"


def write(rounds: list[Round], path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(Round.__dataclass_fields__)
        rows.writerows([vars(one).values() for one in rounds])


if __name__ == "__main__":
    main()
