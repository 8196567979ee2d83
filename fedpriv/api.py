"""The Python interface: an experiment, the run that it leaves, and tables of several.

    import fedpriv

    experiment = fedpriv.Experiment.load("configs/vit_digits.yaml", rounds=20)
    run = experiment.with_(model=my_model).train(grid="local")
    run.metrics, run.epsilon("pld"), run.delta, run.model(), run.report()
    fedpriv.compare([run, fedpriv.Run.open("runs/vit-digits/...")])
    fedpriv.sweep(experiment, {"privacy.clipping.bound": [0.01, 0.05]}, seeds=[17, 18])
    experiment.evaluate(run.model()), experiment.audit(canaries=200)

It does what the commands do, by the same code: checks, ledger, checkpoints, report.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fedpriv.config import ExperimentConfig
from fedpriv.config_files import config_beside, document_of, parse_config, put
from fedpriv.counting import numbered
from fedpriv.errors import BudgetError, InputError
from fedpriv.reporting import reader
from fedpriv.reporting.spent import Spent, spent
from fedpriv.reporting.terminal import beside, print_lines, saying

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from fedpriv.experiment import Observer
    from fedpriv.federation.plan import Cost
    from fedpriv.reporting.audit import Audit

#: What an axis of a sweep takes: values of its key, or under a name of one's own sets of changes.
Axis: TypeAlias = Sequence[Any] | Mapping[Any, Mapping[str, Any]]


class Experiment:
    """What is to be run: a config, checked. It never changes; `with_` makes another one.

    Sections are those of a config file. Whatever a config names, such as a model, a data set or a
    clipping rule, may also be the object itself.

        fedpriv.Experiment(name="mine", rounds=5, data={"name": "digits", "users": 100}, ...)

    Raises:
        InputError: one line that names the key and says what to write instead.
    """

    def __init__(self, **sections: Any) -> None:
        self._hold(_copied(sections), None)

    def _hold(self, document: Mapping[str, Any], code: Path | None) -> None:
        """Keep what a config says, and check it; `code` is the folder of its file."""
        self._document, self._code = document, code
        copied = _copied(document)  # objects in it become names when it is checked
        self.config: ExperimentConfig = (
            parse_config(copied) if code is None else config_beside(code, copied)
        )

    @classmethod
    def load(
        cls, path: str | Path, changes: Mapping[str, Any] | None = None, **sections: Any
    ) -> Experiment:
        """Read a config file and change it, as `with_` does.

        Raises:
            InputError: missing or unreadable file, bad YAML, unknown key, impossible value.
        """
        return cls._of(document_of(Path(path)), Path(path).absolute().parent, changes, sections)

    @classmethod
    def _of(
        cls,
        document: Mapping[str, Any],
        code: Path | None,
        changes: Mapping[str, Any] | None,
        sections: Mapping[str, Any],
    ) -> Experiment:
        changed = _copied(document)
        for key, value in {**(changes or {}), **sections}.items():
            put(changed, key, _copied(value))
        made = cls.__new__(cls)
        made._hold(changed, code)
        return made

    def with_(self, changes: Mapping[str, Any] | None = None, **sections: Any) -> Experiment:
        """Return this experiment with other settings.

        `changes` are by dotted keys, `{"privacy.clipping.bound": 0.05}`; `sections` are whole
        sections or top-level keys, of which a mapping replaces what was there.

        Raises:
            InputError: an unknown key or an impossible value.
        """
        return self._of(self._document, self._code, changes, sections)

    def planned_cost(self) -> Cost | None:
        """Return what all rounds will cost, as `config validate` says; None without privacy."""
        from fedpriv.preparation import plan_for, ready_trainer

        return plan_for(*ready_trainer(self.config, seeded=False)).planned_cost()

    def train(
        self,
        grid: Literal["local", "ray"] | None = None,
        run_dir: str | Path | None = None,
        progress: bool = True,
    ) -> Run:
        """Train all rounds in a new run directory and return the run.

        Args:
            grid: local trains in this process, ray in actors of a cluster; None as configured.
            run_dir: an empty or absent folder; None as configured, by default a new one in `runs`.
            progress: show a bar and a line an evaluation, on the terminal or in the notebook.

        Raises:
            InputError: the config, its data or the machine do not allow it.
            BudgetError: the privacy budget stopped it; `Run.open` has what was paid for.
            Interrupted: Ctrl-C; `Run.open(...).resume()` continues it.
        """
        from fedpriv import experiment

        config = self._placed(grid, run_dir)
        if config.run_dir is not None:
            from fedpriv.reporting.run_directory import require_empty

            require_empty(config.run_dir)
        prepared = _prepared(config, progress)
        directory = experiment.create(prepared)
        _trained(prepared, directory, progress)
        return Run.open(directory.path)

    def evaluate(self, model: nn.Module | None = None, progress: bool = True) -> dict[str, float]:
        """Return loss and measures of a model on the held-out examples; nothing is trained.

        Args:
            model: such as `Run.model()` of another experiment; None for what training starts from.
            progress: show the pre-training of a seed model that is not there yet.

        Raises:
            InputError: the config or its data do not allow it.
        """
        from fedpriv.tasks.base import BY_CLASS

        prepared = _prepared(self.config, progress)
        trainer = prepared.trainer
        measured = trainer.model if model is None else model.to(trainer.device)
        size = self.config.evaluation.batch_size
        found = trainer.task.measure(measured, prepared.held_out, size)
        return {name: value for name, value in found.items() if name != BY_CLASS}

    def audit(
        self,
        canaries: int | None = None,
        rounds: int | None = None,
        confidence: float = 0.95,
        progress: bool = True,
    ) -> Audit:
        """Measure its privacy from outside, as `fedpriv audit` does, and return what was found.

        Args:
            canaries: how many made-up users join; None for the command's default.
            rounds: how many rounds are run and judged; None for all.
            confidence: of the lower bound on ε.
            progress: show a bar, on the terminal or in the notebook.

        Raises:
            InputError: the config promises nothing to audit, or a setting is impossible.
        """
        from fedpriv import audit
        from fedpriv.experiment import stop_signal
        from fedpriv.reporting.progress import AuditLines

        settings = audit.AuditSettings(audit.CANARIES if canaries is None else canaries)
        settings = replace(settings, rounds=rounds, confidence=confidence)
        audit.check(self.config, settings)
        config = _seeded(self.config, progress)
        told = beside(progress)
        with AuditLines(told) as lines, stop_signal(told.print) as stop:
            return audit.audit(config, settings, lines, stop)

    def _placed(self, grid: str | None, run_dir: str | Path | None) -> ExperimentConfig:
        changes = {"runtime.grid": grid, "run_dir": None if run_dir is None else str(run_dir)}
        return self.with_({k: v for k, v in changes.items() if v is not None}).config

    def _trained_in(
        self, run_dir: Path, grid: str, progress: bool, lines: Observer | None = None
    ) -> Run:
        """Return the run of this experiment in a directory, which is begun or gone on with first.

        `lines` are told of its rounds, in place of lines of its own.

        Raises:
            InputError: there is a run of another experiment.
        """
        from fedpriv import experiment
        from fedpriv.reporting.run_directory import RunDirectory

        # Said anew of each trial it would tell how many there are.
        prepared = _prepared(self._placed(grid, run_dir), progress, saying_so=lines is None)
        if not (run_dir / "config.yaml").is_file():
            directory = experiment.create(prepared)
        else:
            directory = RunDirectory.open(run_dir)
            if directory.config().bearing() != prepared.config.bearing():
                raise InputError(
                    f"run_dir: {run_dir} is a run of another configuration, and only its own "
                    "experiment continues it; choose another folder"
                )
            experiment.restore(prepared, directory)
        if not prepared.finished:
            with suppress(BudgetError):  # it has the rounds that it had
                _trained(prepared, directory, progress, lines)
        return Run.open(run_dir)

    def __repr__(self) -> str:
        """Return what it is called, and how many rounds it has."""
        return f"<Experiment {self.config.name}: {numbered(self.config.rounds, 'round')}>"


@dataclass(frozen=True)
class Run:
    """What a run left in its directory; ε is computed anew from its ledger.

    Attributes:
        path: the run directory.
    """

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Return the run in a directory.

        Raises:
            InputError: no run there, or no finished round yet.
        """
        run = cls(Path(path))
        _ = run._read
        return run

    @cached_property
    def _read(self) -> reader.Run:
        return reader.read_run(self.path)

    @cached_property
    def _spent(self) -> Spent:
        return spent(self._read)

    @property
    def config(self) -> ExperimentConfig:
        """The config, with everything that it was resolved to."""
        return self._read.config

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a round, by round; `simulation_only.` stands before what nobody may publish.

        Of a trial of a tuning it has no ε: none of its rounds has one of its own.
        """
        import pandas as pd

        rows = [_flat(row) for row in self._read.told_rows]
        return pd.DataFrame(rows).set_index("round")

    @cached_property
    def blocks(self) -> pd.DataFrame:
        """One row a round and block of parameters, with the norms that `metrics` sums up."""
        import pandas as pd

        tables = {row["round"]: pd.DataFrame(dict(_by_block(row))) for row in self._read.rows}
        return pd.concat(tables, names=["round", "block"])

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """One row a release that was charged."""
        import pandas as pd

        return pd.DataFrame([vars(release) for release in self._read.releases])

    @property
    def delta(self) -> float | None:
        """δ; None without privacy."""
        return self._read.delta

    def epsilon(self, accountant: str | None = None) -> float | None:
        """Return ε at the run's δ, by "rdp" or "pld", or by the tighter; None without privacy.

        Of a run that `evaluation.stop_after` ended it is that of all the rounds that it might have
        had, which is what was promised; of the best of a tuning it is what the tuning cost.

        Raises:
            InputError: there is none by that accountant, or it is a trial of which nothing says
                what choosing it cost.
        """
        if self._read.private and self._read.trial and self._read.unclaimed:
            raise InputError(f"{self.path}: nobody knows its ε: {self._read.unclaimed}")
        found = self._spent.epsilons
        if accountant is None or not found:
            return min(found.values(), default=None)
        if accountant not in found:
            known = " or ".join(sorted(found))
            reason = f": {self._spent.without_pld}" if accountant == "pld" else ""
            raise InputError(f"no ε by {accountant} here{reason}; write {known}")
        return found[accountant]

    @property
    def quality(self) -> float:
        """The last value of the task's measure; nan where nothing was measured."""
        return self._read.measured.final

    def model(self, which: Literal["last", "best"] | None = None) -> nn.Module:
        """Return a released model, on the CPU; its data set is read for that.

        Args:
            which: last or best; None for the best where `evaluation.keep_best` kept it.

        Raises:
            InputError: there is no such checkpoint, or the data are not there.
        """
        from fedpriv import experiment

        return experiment.reopen_model(self.path, which).server.model.cpu().eval()

    def export(
        self,
        to: str = "safetensors",
        out: str | Path | None = None,
        which: Literal["last", "best"] | None = None,
    ) -> Path:
        """Write the model, adapters merged, into a new folder with its card; return the folder.

        Args:
            to: safetensors, torch, onnx or hf; registry, of a deployment, for an entry of the DP
                Deployments Registry instead of the model.
            out: the folder, which must not be there; None for one in the run's.
            which: as for `model`.

        Raises:
            InputError: there is something, or the model does not go into the format.
        """
        from fedpriv.export import export

        return export(self.path, to, None if out is None else Path(out), which)

    def report(self, output: str | Path | None = None) -> Path:
        """Write the report, by default into the run directory, and return its path."""
        from fedpriv.reporting.report import write_report

        return write_report([self.path], None if output is None else Path(output))

    def resume(self, progress: bool = True) -> Run:
        """Go on with a run that was interrupted, on the same ledger; see `Experiment.train`."""
        from fedpriv import experiment

        directory, prepared = experiment.reopen(self.path)
        _trained(prepared, directory, progress)
        return Run.open(self.path)

    def __repr__(self) -> str:
        """Return where it is."""
        return f"<Run {self.path}>"


def compare(runs: Iterable[Run]) -> pd.DataFrame:
    """Return a table of runs, one row each: what they were, reached and spent."""
    import pandas as pd

    runs = list(runs)
    labels = reader.run_labels([run._read for run in runs])
    rows = [_summed_up(run) for run in runs]
    return pd.DataFrame(rows, index=pd.Index(labels, name="run"))


def sweep(
    experiment: Experiment,
    values: Mapping[str, Axis],
    seeds: Sequence[int] | None = None,
    grid: Literal["local", "ray"] = "local",
    run_dir: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train an experiment with every combination of values and seeds; return `compare`'s table.

        values = {"server.lr": [0.01, 0.02], "privacy": {"none": {"privacy": None}, "as is": {}}}

    Runs that are in the folder already are not trained again, and an interrupted one is resumed, if
    they are of the same experiment.

    Every run has a ledger of its own and says what it cost alone: what choosing among them costs is
    not counted. That is for public data; who publishes the best one after looking at held-out
    results has to count them all, as `fedpriv.tune` does. One that its budget stops stands in the
    table with the rounds that it had.

    Args:
        experiment: what is the same in all of them.
        values: what each dotted key takes in turn. Where several keys change together, a name of
            your own and, by label, the changes of `Experiment.with_`.
        seeds: None for the experiment's own.
        grid: as in `Experiment.train`.
        run_dir: the folder of all runs; None for `runs/NAME-sweep`.
        progress: show each run's progress.

    Raises:
        InputError: an unknown key or an impossible value, before anything is trained; or a run in
            the folder is of another experiment.
    """
    import pandas as pd

    points = _points({**values, **({} if seeds is None else {"seed": list(seeds)})})
    folder = Path(run_dir or Path("runs") / f"{experiment.config.name}-sweep")
    experiments = {name: experiment.with_(changes) for name, (_, changes) in points.items()}
    runs = {}
    for number, (name, each) in enumerate(experiments.items(), 1):
        print_lines(beside(progress), f"run {number} of {len(experiments)}: {name}")
        runs[name] = each._trained_in(folder / name, grid, progress)
    return pd.DataFrame([{**point, **_summed_up(runs[n])} for n, (point, _) in points.items()])


def _points(axes: Mapping[str, Axis]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return, by the name of its folder, each combination: its labels, and what they change.

    Raises:
        InputError: a name of an axis is a column of the results, or two folders would be one.
    """
    named = [key for key, axis in axes.items() if isinstance(axis, Mapping)]
    if taken := sorted(_COLUMNS & set(named)):
        raise InputError(f"{taken[0]} is a column of a sweep's results; give the axis another name")
    steps = [
        [(key, label, changes) for label, changes in axis.items()]
        if isinstance(axis, Mapping)
        else [(key, value, {key: value}) for value in axis]
        for key, axis in axes.items()
    ]
    named_steps = [[(_name(step[1], i), step) for i, step in enumerate(each, 1)] for each in steps]
    points: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for combined in itertools.product(*named_steps):
        name = "-".join(name for name, _ in combined) or "run"
        chosen = [step for _, step in combined]
        if name in points:
            raise InputError(f"{name}: two runs of a sweep would have one folder; change a label")
        changes = {key: value for _, _, each in chosen for key, value in each.items()}
        points[name] = ({key: label for key, label, _ in chosen}, changes)
    return points


def _name(label: Any, number: int) -> str:
    """Return what a folder may be called after a label, or else the label's number."""
    text = re.sub(r"[^\w.+-]+", "_", str(label)).strip("_.")
    plain = label is None or isinstance(label, str | int | float)
    return text if plain and 0 < len(text) <= 40 else f"number-{number}"


#: Of `_summed_up`, beside the measure of the task.
_COLUMNS = {"rounds", "epsilon", "delta", "noise_multiplier", "bound", "cohort", "parameters"}
_COLUMNS |= {"seconds", "run"}


def _summed_up(run: Run) -> dict[str, Any]:
    read = run._read
    measured, last = read.measured, read.releases[-1]
    return {
        "rounds": read.finished_rounds,
        measured.quality.key: measured.final,
        "epsilon": min(run._spent.epsilons.values(), default=math.inf),
        "delta": read.delta,
        "noise_multiplier": last.noise_multiplier if read.private else 0.0,
        "bound": last.bound if read.private else math.inf,
        # Of silos on a schedule it is another in each round.
        "cohort": math.nan if read.mechanism.scheduled else read.sampling.expected_cohort,
        "parameters": read.parameters,
        "seconds": read.seconds,
        "run": run,
    }


def _by_block(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what of a row there is one of a block, with dotted names."""
    for key, value in row.items():
        if isinstance(value, Mapping) and "block" in key:
            yield prefix + key, dict(value)
        elif isinstance(value, Mapping):
            yield from _by_block(value, f"{prefix}{key}.")


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the numbers of a row with dotted names; what there is one of a block is left out."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if "block" in key or key == "quality":
            continue
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            found[prefix + key] = value
    return found


def _copied(document: Any) -> Any:
    """Return a copy of mappings; what else is in them stays the same object."""
    if isinstance(document, Mapping):
        return {key: _copied(value) for key, value in document.items()}
    return document


def _prepared(config: ExperimentConfig, progress: bool, saying_so: bool = True) -> Any:
    from fedpriv import experiment

    seeded = _seeded(config, progress)
    with saying(beside(progress and saying_so), "reading the data and computing ε"):
        return experiment.prepare(seeded)


def _seeded(config: ExperimentConfig, progress: bool) -> ExperimentConfig:
    if config.seed_model is None:
        return config
    from fedpriv.experiment import stop_signal
    from fedpriv.reporting.progress import PretrainingLines
    from fedpriv.seed_model import with_seed_model

    with PretrainingLines(beside(progress)) as lines, stop_signal(lines.say) as stop:
        return with_seed_model(config, lines, stop)


def _trained(prepared: Any, directory: Any, progress: bool, lines: Observer | None = None) -> None:
    from fedpriv import experiment
    from fedpriv.reporting.progress import lines_of

    if lines is not None:
        experiment.train(prepared, directory, lines)
        return
    with lines_of(prepared.config, beside(progress)) as own:
        experiment.train(prepared, directory, own)
