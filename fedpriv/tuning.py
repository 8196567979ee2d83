"""Tuning that is counted: trials of which only the best is released, at a price that is known.

    fedpriv.tune(experiment, {"server.lr": [0.01, 0.02]}, "geometric", mean=10)

How many trials there are, and which, is drawn from the seed and written down before anything is
trained, in `tuning.json`; so an interrupted tuning goes on with the same trials, and a second one
in the same folder is a second line of it, which adds to the price (docs/privacy.md, "Tuning").
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import dp_accounting

from fedpriv.api import Experiment, Run
from fedpriv.config import ExperimentConfig
from fedpriv.disk import write_whole
from fedpriv.errors import InputError
from fedpriv.federation.plan import Plan
from fedpriv.preparation import plan_for, ready_trainer
from fedpriv.privacy.charging import Cost
from fedpriv.privacy.randomness import Purpose, Randomness
from fedpriv.privacy.trials import Trials, price
from fedpriv.reporting.ledgers import open_ledger
from fedpriv.reporting.run_directory import TUNED
from fedpriv.reporting.terminal import beside, saying
from fedpriv.selection import not_public
from fedpriv.training.cohort import CohortTrainer

Events = Mapping[dp_accounting.DpEvent, int]

# Labels of trials are drawn below it: two alike among 10,000 are one in 10^11 tunings.
_LABELS = 2**62


@dataclass(frozen=True)
class Tuned:
    """What a tuning gave.

    Attributes:
        best: the run to release, of all tunings in the folder; None where no trial was drawn.
        point: the settings that it was trained with.
        cost: what all tunings in the folder cost together, by RDP.
    """

    best: Run | None
    point: Mapping[str, Any] | None
    cost: Cost


def tune(
    experiment: Experiment,
    values: Mapping[str, Sequence[Any]],
    law: Literal["logarithmic", "geometric", "poisson"] = "geometric",
    mean: float = 10.0,
    grid: Literal["local", "ray"] = "local",
    run_dir: str | Path | None = None,
    progress: bool = True,
) -> Tuned:
    """Train a random number of trials at random points of `values`, and return the best.

    Best is what the held-out examples say of the last model: they are nobody's in the population.
    The number of trials, and all but the best, are as private as the data.

    Args:
        experiment: what is the same in all of them.
        values: what each dotted key may be; none may bear on what a trial costs.
        law: of the number of trials.
        mean: the number that is expected.
        grid: as in `Experiment.train`.
        run_dir: the folder of all trials and of `tuning.json`; None for `runs/NAME-tuning`.
        progress: show each trial's progress.

    Raises:
        InputError: there is nothing to count, points differ in what they cost, or the folder is of
            another experiment.
        Interrupted: Ctrl-C; the same call goes on.
    """
    trials = Trials(law, mean)
    folder = Path(run_dir or Path("runs") / f"{experiment.config.name}-tuning")
    with saying(beside(progress), "reading the data of each value and computing what it costs"):
        plan = _checked(experiment, values)
    record = _Record.opened(folder, plan)
    call = record.call(trials, values, experiment.config.seed)
    for number in range(len(call["simulation_only"]["points"])):
        record.run(experiment, call, number, grid, progress)
    best, point = record.chosen()
    cost = price(record.tunings(plan), plan.adjacency, _delta(plan))
    if best is not None:
        write_whole(best.path / TUNED, json.dumps(record.told(cost), indent=1) + "\n")
    call["finished"] = True
    record.write()
    return Tuned(best, point, cost)


def _checked(experiment: Experiment, values: Mapping[str, Sequence[Any]]) -> Plan:
    """Return the plan of a trial, which costs the same at every point.

    Raises:
        InputError: it does not, or there is nothing to count.
    """
    config = experiment.config
    if config.privacy is None or config.privacy.noise_multiplier == 0:
        raise InputError("privacy: without privacy there is nothing to count; use fedpriv.sweep")
    if config.runtime.deployment:
        raise InputError("runtime.deployment: trials are simulated; write false")
    if config.privacy.unit == "example" or config.privacy.noise_by == "users":
        raise InputError(
            "privacy: silos, and users with noise of their own, pay for what they took part in; "
            "trials that cost each of them something else have no price; write unit: user with "
            "noise_by: server"
        )
    if not values or not all(values.values()):
        raise InputError("--grid: write at least one value for each key, such as server.lr=0.1,0.2")
    plans = {}
    for key, each in values.items():
        if key.split(".")[0] in ("seed", "trial", "run_dir", "name", "runtime"):
            raise InputError(f"--grid: {key} is no hyper-parameter; leave it out")
        if key.split(".")[0] in ("data", "evaluation"):
            raise InputError(
                f"--grid: {key} bears on who is protected, or on what trials are judged by, which "
                "is the same for all of them; leave it out"
            )
        for value in each:
            trainer = ready_trainer(experiment.with_({key: value}).config, seeded=False)
            _require_public(*trainer)
            plans[f"{key}={value}"] = plan_for(*trainer)
    if any(plan.sampling.kind == "random_allocation" for plan in plans.values()):
        raise InputError(
            "privacy.sampling.kind: random_allocation: nothing prices the best of several trials "
            "whose users are allocated to rounds; tune with poisson"
        )
    costs = {name: (_events(plan), plan.adjacency, _delta(plan)) for name, plan in plans.items()}
    first, *_ = costs
    for name, cost in costs.items():
        if cost != costs[first]:
            raise InputError(
                f"--grid: a trial with {name} costs another ε than one with {first}, and the price "
                "is known of trials that cost the same; tune what does not bear on ε"
            )
    return plans[first]


def _require_public(config: ExperimentConfig, trainer: CohortTrainer) -> None:
    """Check that what chooses the best trial is of nobody in the population.

    Raises:
        InputError: the held-out examples are of users, or nothing says that they are not.
    """
    if (why := not_public(trainer.dataset.facts)) is not None:
        raise InputError(
            f"data: the held-out examples of data.name: {config.data.name}, by which the best "
            f"trial is chosen, are {why}; hold out others' data"
        )


def _events(plan: Plan) -> Events:
    event, paid = plan.mechanism.charged(plan.config.rounds)
    return {event: paid}


def _delta(plan: Plan) -> float:
    assert plan.delta is not None
    return plan.delta


@dataclass
class _Record:
    """`tuning.json`: the tunings in a folder, each with its trials."""

    folder: Path
    document: dict[str, Any]

    @classmethod
    def opened(cls, folder: Path, plan: Plan) -> _Record:
        """Return the record in `folder`, or a new one.

        Raises:
            InputError: it is damaged, or its trials cost something else.
        """
        path = folder / "tuning.json"
        identity = {
            "event": str(_events(plan)),
            "adjacency": plan.adjacency.value,
            "population": plan.sampling.population,
            "delta": _delta(plan),
        }
        if not path.exists():
            return cls(folder, {**identity, "calls": []})
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found = {key: document[key] for key in identity}
            calls = document["calls"]
            for each in calls:
                each["simulation_only"]["labels"]  # records without them numbered their trials
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not the record of a tuning; choose another folder") from None
        if calls and found != identity:
            raise InputError(
                f"{path}: trials there cost something else, or are of other users; choose another "
                "folder"
            )
        return cls(folder, document)

    def call(
        self, trials: Trials, values: Mapping[str, Sequence[Any]], seed: int
    ) -> dict[str, Any]:
        """Return the tuning that is to be done: the last one where it is unfinished, or a new one.

        Raises:
            InputError: the last one is unfinished, and was another.
        """
        calls = self.document["calls"]
        asked = {**asdict(trials), "grid": {key: list(each) for key, each in values.items()}}
        if calls and not calls[-1]["finished"]:
            if {key: calls[-1][key] for key in asked} != json.loads(json.dumps(asked)):
                raise InputError(
                    f"{self.folder}: a tuning with other trials is unfinished there; finish it "
                    "with the same command, or choose another folder"
                )
            unfinished: dict[str, Any] = calls[-1]
            return unfinished
        # Neither the cohorts nor the noise of any trial come from here.
        generator = Randomness.simulation(seed, f"tuning/{self.document['event']}").numpy(
            Purpose.TRIALS, len(calls)
        )
        points = [
            {key: each[int(generator.integers(len(each)))] for key, each in values.items()}
            for _ in range(trials.draw(generator))
        ]
        # The best trial's is released with it. Counted from 1 it would say that there were as many
        # trials at least, which the price does not cover; drawn, it says nothing of them.
        labels = [int(generator.integers(1, _LABELS)) for _ in points]
        private = {"labels": labels, "points": points, "qualities": [None] * len(points)}
        begun = {**asked, "finished": False, "simulation_only": private}
        calls.append(begun)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        return begun

    def run(
        self,
        experiment: Experiment,
        call: dict[str, Any],
        number: int,
        grid: Literal["local", "ray"],
        progress: bool,
    ) -> None:
        """Train one trial to its end, unless that was done, and write down how good it is."""
        private = call["simulation_only"]
        trial = private["labels"][number]
        changed = experiment.with_({**private["points"][number], "trial": trial})
        run = changed._trained_in(self._place(trial), grid, progress)
        quality = run._read.measured.quality
        private["qualities"][number] = None if math.isnan(run.quality) else run.quality
        self.document["quality"] = quality.record()
        self.write()

    def chosen(self) -> tuple[Run | None, Mapping[str, Any] | None]:
        """Return the best trial of all, and its point; of equals the first."""
        better = 1 if self.document.get("quality", {}).get("higher_is_better", True) else -1
        trials = [
            (better * quality, label, point)
            for private in (each["simulation_only"] for each in self.document["calls"])
            for label, point, quality in zip(
                private["labels"], private["points"], private["qualities"], strict=True
            )
            if quality is not None
        ]
        if not trials:
            return None, None
        _, label, point = max(trials, key=lambda each: each[0])
        return Run.open(self._place(label)), point

    def tunings(self, plan: Plan) -> list[tuple[Trials, Events]]:
        """Return each tuning, with the events of the trial that was charged most.

        A round that was drawn afresh counts twice, and of a trial that ended early all that it
        might have had.
        """
        found = []
        for each in self.document["calls"]:
            private = each["simulation_only"]
            charged: Counter[dp_accounting.DpEvent] = Counter()
            for trial in private["labels"]:
                charged |= open_ledger(self._place(trial)).account.events()
            found.append((Trials(each["law"], each["mean"]), charged or _events(plan)))
        return found

    def told(self, cost: Cost) -> dict[str, Any]:
        """Return what the best trial's statement says of all this; no number of trials."""
        return {
            "epsilon": cost.epsilon,
            "delta": cost.delta,
            "quality": self.document["quality"]["name"],
            "tunings": [
                {"law": each["law"], "mean": each["mean"], "keys": sorted(each["grid"])}
                for each in self.document["calls"]
            ],
        }

    def write(self) -> None:
        """Write it durably."""
        write_whole(self.folder / "tuning.json", json.dumps(self.document, indent=1) + "\n")

    def _place(self, trial: int) -> Path:
        return self.folder / "simulation_only" / f"trial-{trial}"
