"""What a running experiment shows, on standard error: a line an evaluation, and a bar."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fedpriv.counting import numbered
from fedpriv.data.federated import notes_of
from fedpriv.privacy.figures import epsilon_text
from fedpriv.reporting.terminal import fitting, one_line, print_lines
from fedpriv.reporting.wording import (
    beside_epsilon,
    missing_text,
    smallest,
    spent_parts,
    spent_text,
)
from fedpriv.tasks.quality import WORD_ERROR_RATE, quality_of

if TYPE_CHECKING:
    from fedpriv.config import ExperimentConfig
    from fedpriv.experiment import Experiment


# What stands on a bar's line beside how far it is spent, in columns.
_BESIDE_STATUS = 44
# What an audit does before its first round, and after its last.
_DRAWING = "reading the data and drawing canaries"
_JUDGING = "computing ε and its lower bound"


class ProgressLines:
    """Prints what a run says of itself while it runs.

    Only a terminal gets a moving bar; a file or pipe gets the lines alone. There is a line for each
    round that was measured or lacked a node, and with `verbose` for all others too.
    """

    def __init__(self, console: Console, verbose: bool = False) -> None:
        self._console = console
        self._verbose = verbose
        self._seeded = False
        self._rounds = 0
        self._budget: float | None = None
        self._tight = False
        self._who = "users"
        #: What stands beside ε.
        self._known = ""
        self._thresholds = [0.5, 0.75, 0.9, 0.95]
        self._progress = _bar(console, "round")
        self._task = self._progress.add_task("run", total=None, status="starting workers")

    def __enter__(self) -> ProgressLines:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, experiment: Experiment) -> None:
        """Say what is about to be run and what it will cost."""
        config, plan = experiment.config, experiment.plan
        mechanism = plan.mechanism
        self._rounds = config.rounds
        self._budget = plan.budget
        self._tight = bool(config.privacy and "pld" in config.privacy.accountants)
        self._who = mechanism.members
        self._progress.update(self._task, total=config.rounds, completed=experiment.finished_rounds)
        deployed, dataset = config.runtime.deployment, experiment.trainer.dataset
        self._seeded = not deployed
        self._known = beside_epsilon(not deployed)
        about = "users at the nodes" if deployed else dataset.description
        self._print(Text.assemble((config.name, "bold"), f": {about}"))
        if dataset.sizes and not deployed:
            self._print(f"simulation only: {dataset.sizes}")
        for sentence in () if deployed else notes_of(dataset, config.data.users):
            self.say(f"simulation only: {sentence}")
        self._print(
            f"model {config.model.name} with {plan.layout.total:,} parameters in "
            f"{numbered(len(plan.layout.names), 'block')}; server {config.server.optimizer}; "
            f"{numbered(config.rounds, 'round')} of {mechanism.a_round(plan.sampling)} "
            f"{self._who} {'on a schedule' if mechanism.scheduled else 'expected'}"
        )
        if experiment.engine is not None:
            self._print(experiment.engine)
        planned = plan.planned_cost()
        if planned is None or math.isinf(planned.epsilon):
            warning = "WITHOUT PRIVACY: nothing bounds what this run reveals"
            self._print(Text(warning, style="bold red"))
        else:
            self._print(
                f"noise multiplier {mechanism.gaussian.noise_multiplier:.4f}, clip bound "
                f"{mechanism.gaussian.clipping.bound:g}, {plan.adjacency.value}: all rounds "
                f"will cost ε = {epsilon_text(planned.epsilon)} by "
                f"{planned.accountant.upper()} at δ = {plan.delta:g}{self._known}"
                + mechanism.for_whom
            )
        for sentence in plan.advice():
            self.say(sentence)
        if mechanism.trust is not None:
            self._print(mechanism.trust)
        if (sizes := experiment.memory_sizes()) is not None:
            self._print(sizes.sentence())
        affordable = plan.affordable_rounds()
        if affordable < config.rounds:
            when = "can stop the run as early as" if mechanism.for_whom else "will stop the run"
            self.say(
                f"the budget of ε = {plan.budget:g} {when} after round "
                f"{affordable} of {config.rounds}"
            )
        if experiment.over:
            self._print(f"ended after round {experiment.finished_rounds}: nothing is left to train")
        elif experiment.finished:
            self._print(f"nothing is left to train: {numbered(config.rounds, 'round')} finished")
        elif experiment.finished_rounds:
            self._print(f"resuming after round {experiment.finished_rounds}")

    def _print(self, line: str | Text) -> None:
        if self._console.is_terminal:
            # Broken between words, of which a number is one.
            text = line if isinstance(line, Text) else Text(one_line(line))
            self._console.print(text, overflow="fold")
        else:
            print_lines(self._console, line)

    def finished(self, row: dict[str, Any]) -> None:
        """Print the line of a finished round where there is one, and move the bar."""
        # By PLD, which is tighter, where a run has it: at evaluations.
        if "pld" in row["epsilon"] or not self._tight:
            self._warn_of_budget(smallest(row)[0])
        if self._verbose or "held_out" in row or missing_text(row):
            self._print(self._line(row))
        status = spent_parts(row, self._seeded)[0]
        room = self._console.width - _BESIDE_STATUS
        self._progress.update(
            self._task, completed=row["round"], status=status if len(status) <= room else ""
        )

    def _line(self, row: dict[str, Any]) -> Text:
        """Return all there is to say of a round, or on a narrow terminal what fits on a line."""
        private = smallest(row)[0] is not None
        style, missing, seen = "" if private else "red", missing_text(row), list[Text]()
        head = [Text(f"round {row['round']:>{len(str(self._rounds))}}/{self._rounds}")]
        if "held_out" in row:
            head.append(Text(quality_of(row).text(row["held_out"]), style="bold"))
        lost = [Text(missing, style="yellow")] if missing else []
        if "simulation_only" in row:
            seen = self._seen_parts(row["simulation_only"])
        spent = Text(spent_text(row) + self._known * private, style=style)
        told = [Text("simulation only: ") + Text(", ").join(seen)] if seen else []
        whole = Text("  ").join([*head, spent, *lost, *told])
        if not self._console.is_terminal or whole.cell_len <= self._console.width:
            return whole
        short, *rest = (Text(part, style=style) for part in spent_parts(row, self._seeded))
        if seen:
            seen[0] = Text("simulation only: ") + seen[0]
        kept = [*head, short, *lost]
        return fitting([*kept, *rest, *seen], self._console.width, len(kept))

    def _seen_parts(self, seen: dict[str, Any]) -> list[Text]:
        """Return what users' own values say of a round, which no mechanism released."""
        loss = "nobody trained" if seen["loss"] is None else f"loss {seen['loss']:.3f}"
        counted = (
            (seen["non_finite"], self._who.removesuffix("s"), "", "contributed nothing"),
            (seen["skipped"], "example", "", "skipped"),
            (seen.get("memory_reset"), "memory", "memories", "reset"),
        )
        return [
            Text(f"cohort {seen['cohort']}, {loss}"),
            Text(f"{seen['users_per_second']:.0f} {self._who}/s"),
            *(Text(f"{numbered(n, *of)} {what}", style="yellow") for n, *of, what in counted if n),
        ]

    def _warn_of_budget(self, epsilon: float | None) -> None:
        """Say once when each threshold of the budget is passed."""
        while (
            self._budget is not None
            and epsilon is not None
            and self._thresholds
            and epsilon >= self._thresholds[0] * self._budget
        ):
            self.say(f"{self._thresholds.pop(0):.0%} of the budget of ε = {self._budget:g} spent")

    def say(self, sentence: str) -> None:
        """Print a sentence."""
        self._print(Text(one_line(sentence), style="yellow"))


class TrialLines:
    """Shows how far a tuning is, and nothing of how good or how private its trials are.

    How many there are is as private as the data, and so is all that one of them says.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._trial = "simulation only: one of several trials"
        self._progress = _bar(console, "round")
        self._task = self._progress.add_task("tuning", total=None, status=self._trial)

    def __enter__(self) -> TrialLines:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def next(self, number: int, trials: int) -> None:
        """Say which trial comes, counted from 1."""
        self._trial = f"simulation only: trial {number} of {trials}"
        self._progress.update(self._task, completed=0, status=self._trial)
        if not self._console.is_terminal:
            print_lines(self._console, self._trial)

    def begin(self, experiment: Experiment) -> None:
        """Move the bar to where the trial goes on."""
        done, rounds = experiment.finished_rounds, experiment.config.rounds
        self._progress.update(self._task, total=rounds, completed=done)

    def finished(self, row: dict[str, Any]) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=row["round"])

    def say(self, sentence: str) -> None:
        """Print a sentence on a trial."""
        print_lines(self._console, Text(one_line(f"{self._trial}: {sentence}"), style="yellow"))


def lines_of(
    config: ExperimentConfig, console: Console, verbose: bool = False
) -> ProgressLines | TrialLines:
    """Return what shows how far a run is: of a trial of a tuning neither quality nor ε."""
    return TrialLines(console) if config.trial else ProgressLines(console, verbose)


class AuditLines:
    """Shows how far an audit is: a bar on a terminal, elsewhere a line a tenth of the rounds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rounds = 0
        self._progress = _bar(console, "audited round")
        self._task = self._progress.add_task("audit", total=None, status=_DRAWING)

    def __enter__(self) -> AuditLines:
        self._progress.start()
        self._say(_DRAWING)
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, rounds: int) -> None:
        """Say how many rounds there will be."""
        self._rounds = rounds
        self._progress.update(self._task, total=rounds, status="")
        self._say(f"auditing {numbered(rounds, 'round')}")

    def finished(self, round_: int) -> None:
        """Move the bar; after the last round, say what is left to do."""
        over = round_ == self._rounds
        self._progress.update(self._task, completed=round_, status=_JUDGING if over else "")
        if over or round_ % math.ceil(self._rounds / 10) == 0:
            self._say(f"audited round {round_:>{len(str(self._rounds))}}/{self._rounds}")
        if over:
            self._say(_JUDGING)

    def _say(self, line: str) -> None:
        """Print a line where no bar says it."""
        if not self._console.is_terminal:
            print_lines(self._console, line)


class PretrainingLines:
    """Prints what a pre-training says of itself: a bar, and a line a measurement."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = _bar(console, "pre-training step")
        self._task = self._progress.add_task("pretrain", total=None, status="", visible=False)

    def __enter__(self) -> PretrainingLines:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, steps: int, done: int, what: str) -> None:
        """Say what is about to be trained."""
        resumed = f", going on after step {done}" if done else ""
        self.say(f"pre-training the seed model without privacy on {what}{resumed}")
        self._progress.update(self._task, total=steps, completed=done, visible=True)

    def step(self, step: int, loss: float) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, status=f"loss {loss:.3f}")

    def measured(self, step: int, measures: dict[str, float]) -> None:
        """Print how far it is."""
        measured = WORD_ERROR_RATE.text(measures)
        print_lines(self._console, f"step {step}: {measured} on public held-out recordings")

    def say(self, sentence: str) -> None:
        """Print a sentence."""
        print_lines(self._console, Text(one_line(sentence), style="yellow"))


def _bar(console: Console, what: str) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn(what),
        MofNCompleteColumn(),
        BarColumn(bar_width=max(4, min(40, console.width - 74))),
        TextColumn("{task.fields[status]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
