"""Does noise that is correlated over rounds train better models than independent noise, at one ε?

Claim examined: at equal ε by PLD, noise of which later rounds take a part back (Choquette-Choo et
al. 2023) disturbs the model less, most where cohorts are small beside the population, and so gains
quality. Speech: 2,048 synthetic speakers, a seed model of one accent, LAMB. Writers: the 539 people
who wrote MNIST's training digits. Digits: 750 users of two images each, seen as four patches or as
one ("whole"). All but speech with Adam. Bands are optimised for the server's rates and momentum.
Extrapolated is the noise on the mean that ε = 8 asks of nine times the users and the cohort.

Found, with two seeds: it does for speech. With 64 of 2,048 users a round word errors fall from
18.7% and 16.5% to 10.2% and 9.6%, which is what 256 users reach with independent noise (9.7% and
8.2%, docs/results.md); with 256 they are 6.9% and 6.8%. Noise moves the model 57% less there, by
rates that fall and a momentum of 0.9, and so the rate can be doubled: with independent noise that
ended at 42% (a third seed, development speakers, on which all rates of speech and writers were
chosen). It does not where Adam takes steps that noise dominates: writers (50 of 539 users) lose 5
points, the digits 2. Adam divides by the size of each round's noise, which is 1.4 to 1.9 times as
large, and so needs twice the rate. Prefix sums are disturbed as much as before, or more. At ε = 2
speech gains one or two points, and half a point extrapolated; with Adam nothing is gained at any.

    python simulations/correlated_noise.py writers=FOLDER     # finished runs are kept
    python simulations/correlated_noise.py data=digits seeds=17
    python simulations/correlated_noise.py show               # the table and the figure again

takes data=, promises= and seeds=, lists with commas, and rounds=, and writes results.csv and
figure.png into simulations/results/correlated_noise. `prefix` is the error of prefix sums: how far
noise alone moves a coordinate of the model by steps of rate 1, root mean square over rounds, in
clip bounds; `error` is that by the run's own rates and momentum. Table and figure choose the best
server rate of each cell, over all seeds.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import study
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fedpriv
from fedpriv.federation.plan import workload_of
from fedpriv.preparation import plan_for, ready_trainer
from fedpriv.privacy.factorizations import Workload, error, optimized

FALLING = {"server.schedule": {"kind": "linear"}}
#: A digit of 8 times 8 pixels is one patch, of which there is nothing to attend to.
WHOLE = {"model.patch": 8, "model.dim": 32, "rounds": 60}
RATES = (0.02, 0.05, 0.1)
MORE = (*RATES, 0.2)
MIDDLE, HIGH = (0.02, 0.04, 0.08), (0.04, 0.08, 0.16)
#: Of each data set the config, and what is changed in it.
DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "speech": ("asr_digits.yaml", {}),
    "writers": ("vit_mnist_writers.yaml", {"local.steps": 12}),
    "digits": ("vit_digits.yaml", FALLING),
    "whole-digits": ("vit_digits.yaml", FALLING | WHOLE),
}
#: Of each promise and data set the cohorts, and of each the bands and the server rates.
CELLS: dict[str, dict[str, dict[int, dict[int, tuple[float, ...]]]]] = {
    "ε = 8": {
        "speech": {64: {1: (0.03,), 32: (0.06,)}, 256: {1: (0.03,), 8: (0.06,)}},
        "writers": {50: {1: (0.04,), 8: (0.04, 0.08)}, 200: {1: (0.04,)}},
        "digits": {60: {1: RATES, 8: MORE}, 370: {1: RATES, 2: MORE}, 740: {1: (0.05,)}},
        "whole-digits": {60: {1: MIDDLE, 8: HIGH}, 370: {1: MIDDLE, 2: MIDDLE}},
    },
    "ε = 2": {
        "speech": {64: {1: (0.015, 0.03), 32: (0.03, 0.06)}},
        "writers": {50: {1: (0.02,), 8: (0.04,)}},
        "digits": {60: {1: RATES, 8: MORE}, 370: {1: RATES, 2: MORE}},
        "whole-digits": {60: {1: MIDDLE, 8: HIGH}, 370: {1: MIDDLE, 2: MIDDLE}},
    },
    "extrapolated": {
        "speech": {64: {1: (0.03, 0.06), 32: (0.03, 0.06)}},
        "writers": {50: {1: (0.04,), 8: (0.08,)}},
        "digits": {60: {1: RATES, 8: MORE}, 370: {1: RATES, 2: MORE}},
        "whole-digits": {60: {1: MIDDLE, 8: HIGH}, 370: {1: MIDDLE, 2: MIDDLE}},
    },
}
#: How many times the users and the cohort that is extrapolated to has, at ε = 8.
LARGER = 9
NOISES = {"independent": study.GREY, "correlated": study.BLUE}
DEFAULTS = {
    "data": ",".join(DATA),
    "promises": ",".join(CELLS),
    "seeds": "17,18",
    "rounds": "",
    "writers": "data/qmnist",
}
CELL = ["promise", "data", "cohort", "noise"]


def measure(*arguments: str) -> pd.DataFrame:
    told = DEFAULTS | dict(argument.split("=", 1) for argument in arguments)
    return pd.concat(
        [
            measured(promise, name, cohort, bands, told)
            for promise in told["promises"].split(",")
            for name in told["data"].split(",")
            for cohort, tried in CELLS[promise][name].items()
            for bands in tried
        ]
    )


def measured(
    promise: str, name: str, cohort: int, bands: int, told: dict[str, str]
) -> pd.DataFrame:
    """Return the runs of one promise, data set, cohort and number of bands, with their noise."""
    config, changes = DATA[name]
    mechanism = {"kind": "correlated", "bands": bands, "factorization": "optimized"}
    changes = {
        **changes,
        "privacy.target_epsilon": 2.0 if promise == "ε = 2" else 8.0,
        "privacy.sampling.expected_cohort": cohort,
        "privacy.mechanism": mechanism if bands > 1 else {"kind": "independent"},
    }
    if name == "writers":
        changes["data.path"] = told["writers"]
    if told["rounds"]:
        changes["rounds"] = int(told["rounds"])
    experiment = fedpriv.Experiment.load(
        study.CONFIGS / config, changes, name=f"correlated-noise-{name}"
    )
    if promise == "extrapolated":
        experiment = experiment.with_(
            {"privacy.noise_multiplier": noise_of(experiment) / LARGER}
            | {"privacy.target_epsilon": None}
        )
    tried = CELLS[promise][name][cohort][bands]
    rates = {f"{promise}-{cohort}-{bands}-{r}": {"server.lr": r} for r in tried}
    seeds = [int(seed) for seed in told["seeds"].split(",")]
    swept = fedpriv.sweep(experiment, {"cell": rates}, seeds=seeds)
    noise = "correlated" if bands > 1 else "independent"
    table = swept.assign(promise=promise, data=name, cohort=cohort, noise=noise)
    table["rate"] = [run.config.server.lr for run in swept.run]
    table["quality"] = 1 - table.wer if "wer" in table else table.accuracy
    table = table[[*CELL, "rate", "seed", "quality", "epsilon", "delta"]]
    return table.join(pd.DataFrame([moved(run) for run in swept.run]))


def noise_of(experiment: fedpriv.Experiment) -> float:
    """Return z of a plan: with LARGER times the users and the cohort it would be the same."""
    prepared = ready_trainer(experiment.config, seeded=False)
    return plan_for(*prepared).mechanism.gaussian.noise_multiplier


def moved(run: fedpriv.Run) -> dict[str, float]:
    """Return the bands, z, and how far noise moves the model by prefix sums, and by its rates."""
    first, rounds = run.ledger.iloc[0], run.config.rounds
    bands = int(first.get("bands") or 1)
    workload = workload_of(run.config.server, rounds)
    column = optimized(bands, workload).column(rounds)
    unit = first.noise_multiplier / first.expected_cohort
    prefix = unit * error(column, Workload((1.0,) * rounds))
    return {
        "bands": bands,
        "z": first.noise_multiplier,
        "prefix": prefix,
        "error": unit * error(column, workload),
    }


def best(results: pd.DataFrame) -> pd.DataFrame:
    """Return what the best server rate of each cell comes to, mean and spread over seeds."""
    run = [*CELL, "rate"]
    noise = results.groupby(run)[["prefix", "error"]].first()
    return study.best(results, CELL, "quality").join(noise, on=run)


def figure(results: pd.DataFrame) -> Figure:
    found = best(results)
    promises = [each for each in CELLS if each in set(found.promise)]
    names = [name for name in DATA if name in set(found.data)]
    plotted, panels = plt.subplots(
        len(promises),
        len(names),
        figsize=(1 + 2.3 * len(names), 0.6 + 2.2 * len(promises)),
        squeeze=False,
        layout="constrained",
    )
    for row, promise in zip(panels, promises, strict=True):
        for axes, name in zip(row, names, strict=True):
            draw(axes, found[(found.data == name) & (found.promise == promise)])
            axes.set_title(f"{name}, {promise}", fontsize=9)
        row[0].set_ylabel("accuracy, or 1 - WER")
    plotted.supxlabel("users a round", fontsize=9)
    panels[0, -1].legend(frameon=False, fontsize=8)
    return plotted


def draw(axes: Axes, here: pd.DataFrame) -> None:
    if here.empty:
        axes.axis("off")
        return
    cohorts = sorted(set(here.cohort))
    for (noise, colour), shift in zip(NOISES.items(), (-0.08, 0.08), strict=True):
        rows = here[here.noise == noise].set_index("cohort").reindex(cohorts)
        places = [place + shift for place in range(len(cohorts))]
        spread = rows["mean"] - rows["min"], rows["max"] - rows["mean"]
        axes.errorbar(places, rows["mean"], spread, fmt="o", color=colour, capsize=3, label=noise)
    axes.set_xticks(range(len(cohorts)), cohorts)
    axes.set_xlim(-0.5, len(cohorts) - 0.5)
    axes.grid(axis="y", alpha=0.3)


def table(results: pd.DataFrame) -> pd.DataFrame:
    return best(results).set_index(CELL).round(4)


if __name__ == "__main__":
    study.run(__file__, measure, figure, table)
