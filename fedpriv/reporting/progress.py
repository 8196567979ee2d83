"""What a running experiment shows: a line a round and a progress bar, on standard error."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from fedpriv.experiment import Experiment
from fedpriv.reporting.noise_statement import TRUST_MODELS
from fedpriv.reporting.wording import beside_epsilon


class ProgressLines:
    """Prints what a run says of itself while it runs.

    Only a terminal gets a moving bar; a file or pipe gets the lines alone.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rounds = 0
        self._held_out: dict[str, float] | None = None
        self._budget: float | None = None
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
        payer = "silo" if config.privacy and config.privacy.unit == "example" else "user"
        self._rounds = config.rounds
        self._budget = plan.budget
        self._who = f"{payer}s"
        self._progress.update(self._task, total=config.rounds, completed=experiment.finished_rounds)
        say = partial(self._console.print, soft_wrap=True)
        deployed, dataset = config.runtime.deployment, experiment.trainer.dataset
        self._known = beside_epsilon(not deployed)
        about = "users at the nodes" if deployed else dataset.description
        say(f"[bold]{config.name}[/bold]: {about}")
        if dataset.sizes and not deployed:
            say(f"simulation only: {dataset.sizes}")
        say(
            f"model {config.model.name} with {plan.layout.total:,} parameters in "
            f"{len(plan.layout.names)} blocks; server {config.server.optimizer}; "
            f"{config.rounds} rounds of {plan.sampling.expected_cohort:g} "
            f"{self._who} expected"
        )
        planned = plan.planned_epsilon()
        if planned is None or math.isinf(planned):
            say("[bold red]WITHOUT PRIVACY: nothing bounds what this run reveals[/bold red]")
        else:
            say(
                f"noise multiplier {plan.mechanism.noise_multiplier:.4f}, clip bound "
                f"{plan.mechanism.clipping.bound:g}, {plan.adjacency.value}: all rounds "
                f"will cost ε = {planned:.3f} at δ = {plan.delta:g}{self._known}"
                + (f", a {payer} that takes part in each" if plan.level else "")
            )
        if config.privacy and config.privacy.noise_by != "server":
            say(TRUST_MODELS[config.privacy.noise_by])
        if (sizes := experiment.memory_sizes()) is not None:
            say(sizes.sentence())
        affordable = plan.affordable_rounds()
        if affordable < config.rounds:
            when = "can stop the run as early as" if plan.level else "will stop the run"
            say(
                f"[yellow]the budget of ε = {plan.budget:g} {when} after round "
                f"{affordable} of {config.rounds}[/yellow]"
            )
        if experiment.finished_rounds:
            say(f"resuming after round {experiment.finished_rounds}")

    def finished(self, row: dict[str, Any]) -> None:
        """Print the line of a finished round."""
        self._held_out = row.get("held_out", self._held_out)
        seen = row.get("simulation_only")
        parts = [f"round {row['round']:>{len(str(self._rounds))}}/{self._rounds}"]
        if "held_out" in row:
            parts.append(f"[bold]{quality_text(row['held_out'])}[/bold]")
        private = row["epsilon"]["rdp"] is not None
        parts.append(epsilon_text(row) + (self._known if private else ""))
        self._warn_of_budget(row["epsilon"]["rdp"])
        if row["nodes_lost"]:
            parts.append(f"[yellow]{row['nodes_lost']} nodes lost[/yellow]")
        if seen:
            parts.append(f"simulation only: {self._seen_text(seen)}")
        self._console.print("  ".join(parts), highlight=False, soft_wrap=True)
        quality = f"{quality_text(self._held_out)}  " if self._held_out else ""
        self._progress.update(
            self._task, completed=row["round"], status=quality + epsilon_text(row)
        )

    def _seen_text(self, seen: dict[str, Any]) -> str:
        """Return what users' own values say of a round, which no mechanism released."""
        parts = [
            f"cohort {seen['cohort']}, loss {seen['loss']:.3f}, "
            f"{seen['users_per_second']:.0f} {self._who}/s"
        ]
        if seen["non_finite"]:
            parts.append(f"[yellow]{seen['non_finite']} {self._who} contributed nothing[/yellow]")
        if seen["skipped"]:
            parts.append(f"[yellow]{seen['skipped']} examples skipped[/yellow]")
        if seen.get("memory_reset"):
            parts.append(f"[yellow]{seen['memory_reset']} memories reset[/yellow]")
        return ", ".join(parts)

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
        self._console.print(f"[yellow]{sentence}[/yellow]")


class AuditLines:
    """Shows how far an audit is: a bar on a terminal, and nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        self._progress = _bar(console, "audited round")
        self._task = self._progress.add_task("audit", total=None, status="drawing canaries")

    def __enter__(self) -> AuditLines:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, rounds: int) -> None:
        """Say how many rounds there will be."""
        self._progress.update(self._task, total=rounds, status="")

    def finished(self, round_: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=round_)


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
        self._console.print(
            f"step {step}: {quality_text(measures)} on public held-out recordings",
            highlight=False,
            soft_wrap=True,
        )

    def say(self, sentence: str) -> None:
        """Print a sentence."""
        self._console.print(f"[yellow]{sentence}[/yellow]", soft_wrap=True)


def _bar(console: Console, what: str) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn(what),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def quality_text(measures: dict[str, float]) -> str:
    """Return the measure of the task in a few words."""
    if "wer" in measures:
        return f"WER {measures['wer']:.1%}"
    return f"accuracy {measures['accuracy']:.3f}"


def epsilon_text(row: dict[str, Any]) -> str:
    """Return ε and δ of a metrics row in a few words."""
    epsilon = row["epsilon"]["rdp"]
    if epsilon is None:
        return "[red]no privacy[/red]"
    for payer in ("silo", "user"):
        if f"{payer}s" in row:
            return (
                f"ε of the worst {payer} {epsilon:.3f}, of the median one "
                f"{row[f'{payer}s']['median']:.3f} δ {row['delta']:g}"
            )
    tight = f" (pld {row['epsilon']['pld']:.3f})" if "pld" in row["epsilon"] else ""
    return f"ε {epsilon:.3f}{tight} δ {row['delta']:g}"
