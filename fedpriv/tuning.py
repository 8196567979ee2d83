"""Tuning that is counted: trials of which only the best is released, at a price that is known.

    fedpriv.tune(experiment, {"server.lr": [0.01, 0.02]}, "geometric", mean=10)

How many trials there are, and which, is drawn from the seed and written down before anything is
trained, in `tuning.json`; so an interrupted tuning goes on with the same trials, and a second one
in the same folder is a second line of it, which adds to the price (docs/privacy.md, "Tuning").
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import dp_accounting

from fedpriv.api import Experiment, Run
from fedpriv.config import ExperimentConfig
from fedpriv.counting import numbered
from fedpriv.disk import write_whole
from fedpriv.errors import Diverged, InputError
from fedpriv.federation.plan import Plan, build_plan
from fedpriv.preparation import plan_for, ready_trainer
from fedpriv.privacy.charging import Cost, charge
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.randomness import Purpose, Randomness
from fedpriv.privacy.trials import Trials, Tuning, price
from fedpriv.reporting.choice import Choice
from fedpriv.reporting.ledgers import open_ledger
from fedpriv.reporting.progress import TrialLines
from fedpriv.reporting.run_directory import TUNED, take
from fedpriv.reporting.terminal import beside, one_line, saying
from fedpriv.selection import not_public
from fedpriv.tasks.quality import quality_of
from fedpriv.training.cohort import CohortTrainer

Events = Mapping[dp_accounting.DpEvent, int]
Point = Mapping[str, Any]

# Labels of trials are drawn below it: two alike among 10,000 are one in 10^11 tunings.
_LABELS = 2**62
# What a point says of one key, in letters.
_LONGEST_TEXT = 60
# How far two ways of writing the same charges may lie apart; a round more is more than that.
_ROUNDING = 1e-8


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
        progress: show how far it is, for whoever may know how many trials there are.

    Raises:
        InputError: there is nothing to count, points differ in what they cost, the folder is of
            another experiment or another process is tuning there, or all trials have diverged.
        Interrupted: Ctrl-C; the same call goes on.
    """
    trials = Trials(law, mean)
    folder = Path(run_dir or Path("runs") / f"{experiment.config.name}-tuning")
    with saying(beside(progress), "reading the data of each value and computing what it costs"):
        plan = _checked(experiment, values)
    with _taken(folder):
        record = _Record.opened(folder, plan)
        call = record.call(trials, values, experiment.config.seed)
        with TrialLines(beside(progress)) as lines:
            for number in range(len(call["simulation_only"]["points"])):
                record.run(experiment, call, number, grid, progress, lines)
        tunings = record.tunings(plan)
        cost = price(tunings, plan.adjacency, _delta(plan))
        best = record.best()
        if best is not None:
            told = record.choice(tunings).document(best.label, plan.adjacency, _delta(plan))
            write_whole(best.path / TUNED, json.dumps(told, indent=1) + "\n")
        call["finished"] = True
        record.write()
    if best is None and call["simulation_only"]["points"]:
        raise InputError(
            f"--grid: the held-out measure of no trial is a number, so there is nothing to release "
            f"from {folder}; it costs ε = {epsilon_text(cost.epsilon)} at δ = {cost.delta:g} all "
            "the same, and another tuning there adds to it: write values that a model can be "
            "trained with, such as a lower server.lr"
        )
    if best is None:
        return Tuned(None, None, cost)
    return Tuned(Run.open(best.path), best.point, cost)


@contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """Take the folder of a tuning for this process, and make it where it is not there.

    Raises:
        InputError: another process is tuning there, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take(
            folder, "another process is tuning there; wait for it, or choose another folder"
        )
    except OSError as error:
        raise InputError(f"run_dir: cannot write {folder} ({error.strerror})") from None
    with lock:
        yield


# -------------------------------------------------------------------- what may be tuned

_NO_HYPER_PARAMETER = ("seed", "trial", "run_dir", "name", "runtime", "tracker")
#: What bears on no privacy plan, and so need not be looked at in all combinations.
_FREE = ("local", "model")
_MOST_COMBINATIONS = 1000


def _checked(experiment: Experiment, values: Mapping[str, Sequence[Any]]) -> Plan:
    """Return the plan of a trial, which costs the same at every point.

    Each value is looked at with its data and model, and whatever may bear on the plan in all
    combinations: what costs the same alone may not do so together.

    Raises:
        InputError: it does not, or there is nothing to count.
    """
    _require_keys(values)
    first = {key: each[0] for key, each in values.items()}
    together = list(_combinations(values, first))
    plan, trainer = _plan_at(experiment, first)
    for key, each in values.items():
        for value in each[1:]:
            changed = {**first, key: value}
            _require_same_cost((first, plan), (changed, _plan_at(experiment, changed)[0]))
    for point in together:
        config = experiment.with_(point).config
        _require_private(config, point)
        other = build_plan(
            config, plan.sampling.population, plan.layout, "", trainer.dataset.user_ids
        )
        _require_priced(other, point)
        _require_same_cost((first, plan), (point, other))
    return plan


def _require_keys(values: Mapping[str, Sequence[Any]]) -> None:
    """Check that what is tried can be tried, and written down.

    Raises:
        InputError: some of it cannot.
    """
    if not values or not all(values.values()):
        raise InputError("--grid: write at least one value for each key, such as server.lr=0.1,0.2")
    for key, each in values.items():
        section = key.split(".")[0]
        if section in _NO_HYPER_PARAMETER:
            raise InputError(f"--grid: {key} is no hyper-parameter; leave it out")
        if section in ("data", "evaluation"):
            raise InputError(
                f"--grid: {key} bears on who is protected, or on what trials are judged by, which "
                "is the same for all of them; leave it out"
            )
        try:
            json.dumps(list(each))
        except (TypeError, ValueError):
            raise InputError(
                f"--grid: {key} has values that cannot be written down before the trials; write "
                "numbers, texts, lists or mappings"
            ) from None


def _combinations(values: Mapping[str, Sequence[Any]], first: Point) -> Iterator[Point]:
    """Yield the points of all combinations of what may bear on the plan; the rest is as in `first`.

    Raises:
        InputError: there are too many.
    """
    bearing = {
        key: each
        for key, each in values.items()
        if key.split(".")[0] not in _FREE and key != "server.lr" and len(each) > 1
    }
    if (count := math.prod(map(len, bearing.values()))) > _MOST_COMBINATIONS:
        raise InputError(
            f"--grid: {count:,} combinations of {', '.join(bearing)} would have to cost the same, "
            f"and at most {_MOST_COMBINATIONS:,} are checked; write fewer values of them"
        )
    for chosen in itertools.product(*bearing.values()):
        yield {**first, **dict(zip(bearing, chosen, strict=True))}


def _plan_at(experiment: Experiment, point: Point) -> tuple[Plan, CohortTrainer]:
    """Return the plan of a trial at a point, and what it trains with.

    Raises:
        InputError: there is nothing to count, or no price.
    """
    changed = experiment.with_(point).config
    _require_private(changed, point)
    config, trainer = ready_trainer(changed, seeded=False)
    _require_public(config, trainer)
    plan = plan_for(config, trainer)
    _require_priced(plan, point)
    return plan, trainer


def _require_private(config: ExperimentConfig, point: Point) -> None:
    """Check what can be checked of a point without its data.

    Raises:
        InputError: there is nothing to count, or no price.
    """
    at, privacy = f"(with {_named(point)})", config.privacy
    if privacy is None or privacy.noise_multiplier == 0:
        raise InputError(
            f"privacy: without privacy there is nothing to count {at}; use fedpriv.sweep"
        )
    if config.runtime.deployment:
        raise InputError("runtime.deployment: trials are simulated; write false")
    if config.tracker is not None:
        raise InputError(
            "tracker: it would be told of all trials, which must stay as private as the data; "
            "write null"
        )
    if privacy.unit == "example" or privacy.noise_by == "users":
        raise InputError(
            "privacy: silos, and users with noise of their own, pay for what they took part in; "
            f"trials that cost each of them something else have no price {at}; write unit: user "
            "with noise_by: server"
        )
    if privacy.noise_by == "nodes":
        raise InputError(
            "privacy.noise_by: nodes add noise where a server is not trusted, and whoever tunes "
            f"sees every trial {at}; write server"
        )


def _require_priced(plan: Plan, point: Point) -> None:
    """Check that trials of a plan have a price, and something to be judged by.

    Raises:
        InputError: they do not.
    """
    if plan.sampling.kind == "random_allocation":
        raise InputError(
            "privacy.sampling.kind: random_allocation: nothing prices the best of several trials "
            f"whose users are allocated to rounds (with {_named(point)}); tune with poisson"
        )
    had = plan.affordable_rounds()
    if not any(plan.config.evaluates(round_) for round_ in range(1, had + 1)):
        raise InputError(
            f"privacy.budget.epsilon: allows {numbered(had, 'round')}, and no model that could be "
            f"measured (with {_named(point)}); write a larger one, or null"
        )


def _require_same_cost(one: tuple[Point, Plan], other: tuple[Point, Plan]) -> None:
    """Check that trials at two points cost the same.

    Raises:
        InputError: they do not.
    """
    costs = [(_events(plan), plan.adjacency, _delta(plan)) for _, plan in (one, other)]
    if costs[0] != costs[1]:
        raise InputError(
            f"--grid: a trial with {_named(other[0])} costs another ε than one with "
            f"{_named(one[0])}, and the price is known of trials that cost the same; tune what "
            "does not bear on ε"
        )


def _named(point: Point) -> str:
    """Return a point in words."""
    texts = {key: one_line(str(value)) for key, value in point.items()}
    return ", ".join(
        f"{key}={text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + '…'}"
        for key, text in texts.items()
    )


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
    """Return what the rounds cost that a trial has, of those planned, within its budget."""
    event, paid = plan.mechanism.charged(plan.affordable_rounds())
    return {event: paid}


def _delta(plan: Plan) -> float:
    assert plan.delta is not None
    return plan.delta


# -------------------------------------------------------------------- what is recorded


@dataclass(frozen=True)
class _Best:
    """The best trial: its label, its run directory, and its point."""

    label: int
    path: Path
    point: Point


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
                each["simulation_only"]["done"]  # records without it are of another version
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
        private = {
            "labels": labels,
            "points": points,
            "qualities": [None] * len(points),
            "done": [False] * len(points),
        }
        # Released, and so of no draw that says how many trials there are.
        source = Randomness.simulation(seed, f"source of tuning/{self.document['event']}")
        number = int(source.numpy(Purpose.TRIALS, len(calls)).integers(1, _LABELS))
        begun = {**asked, "source": number, "finished": False, "simulation_only": private}
        calls.append(begun)
        self.write()
        return begun

    def run(
        self,
        experiment: Experiment,
        call: dict[str, Any],
        number: int,
        grid: Literal["local", "ray"],
        progress: bool,
        lines: TrialLines,
    ) -> None:
        """Train one trial to its end, unless that was done, and write down how good it is.

        One whose model has diverged is the worst of all, and is not tried again: that it has is a
        function of what it released, so the price has to hold for it too.
        """
        private = call["simulation_only"]
        if private["done"][number]:
            return
        lines.next(number + 1, len(private["points"]))
        trial = private["labels"][number]
        changed = experiment.with_({**private["points"][number], "trial": trial})
        place, quality = self._place(trial), None
        try:
            run = changed._trained_in(place, grid, progress, lines)
        except Diverged:
            if not (place / "ledger.jsonl").is_file():
                raise  # nothing was released: it is a mistake in the config
        else:
            self.document["quality"] = run._read.measured.quality.record()
            quality = _quality(run)
        private["qualities"][number], private["done"][number] = quality, True
        self.write()

    def best(self) -> _Best | None:
        """Return the best trial of all, the first of equals; None where none has a quality."""
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
            return None
        _, label, point = max(trials, key=lambda each: each[0])
        return _Best(label, self._place(label), point)

    def tunings(self, plan: Plan) -> tuple[Tuning, ...]:
        """Return each tuning, with what a trial of it is charged: as planned, whoever ended early.

        Only where a trial was charged more, for a round that was drawn afresh, is it what that one
        was charged.
        """
        return tuple(
            Tuning(
                Trials(each["law"], each["mean"]),
                self._most_charged(each["simulation_only"]["labels"], plan),
                each["source"],
            )
            for each in self.document["calls"]
        )

    def _most_charged(self, labels: Sequence[int], plan: Plan) -> Events:
        most: Events = _events(plan)
        for label in labels:
            found = open_ledger(self._place(label)).account.own_events()
            both = Counter(most) | found if set(found) <= set(most) else found
            # A ledger has what is planned in other digits, or in parts.
            if _epsilon(both, plan) > _epsilon(most, plan) * (1 + _ROUNDING):
                most = both
        return most

    def choice(self, tunings: tuple[Tuning, ...]) -> Choice:
        """Return what the best trial's statement says of all this; no number of trials."""
        keys = tuple(tuple(sorted(each["grid"])) for each in self.document["calls"])
        return Choice(self.document["quality"]["name"], tunings, keys)

    def write(self) -> None:
        """Write it durably."""
        write_whole(self.folder / "tuning.json", json.dumps(self.document, indent=1) + "\n")

    def _place(self, trial: int) -> Path:
        return self.folder / "simulation_only" / f"trial-{trial}"


def _quality(run: Run) -> float | None:
    """Return what the held-out examples say of the last measured model; None for no number."""
    measured = [row for row in run._read.rows if row.get("held_out")]
    value = measured[-1]["held_out"].get(quality_of(measured[-1]).key) if measured else None
    return float(value) if value is not None and math.isfinite(value) else None


def _epsilon(events: Events, plan: Plan) -> float:
    """Return what one trial costs that is charged `events`."""
    return charge(events, plan.adjacency, [_delta(plan)], ("rdp",)).first.epsilon
