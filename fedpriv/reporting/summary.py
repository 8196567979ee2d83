"""One line a run, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.text import Text

from fedpriv.privacy.figures import epsilon_text
from fedpriv.reporting.reader import Run, read_run, run_labels
from fedpriv.reporting.spent import Spent, spent
from fedpriv.reporting.terminal import Column, FittedTable
from fedpriv.reporting.wording import CHOSEN, ENDED_EARLY, KNOWN_SEED

# What a narrow terminal has no room for goes from the end.
_COLUMNS = (
    Column("run", text=True, kept=True),
    Column("rounds", kept=True),
    Column("held out", kept=True),
    Column("ε rdp", kept=True),
    Column("ε pld", kept=True),
    Column("δ", kept=True),
    Column("noise z"),
    Column("clip C"),
    Column("cohort"),
    Column("server"),
)


def summary_table(runs: Sequence[Path]) -> FittedTable:
    """Return a table with one row a run.

    ε is computed anew from each ledger. A run without privacy says so in red and shows no ε; one
    whose metrics contradict its ledger is marked.

    Raises:
        InputError: a directory holds no run, or a damaged one.
    """
    read = [read_run(path) for path in runs]
    labels = run_labels(read)
    said = (_known_seeds(labels, read), _ended_early(labels, read), _trials(labels, read))
    table = FittedTable(*_COLUMNS, caption="; ".join(filter(None, said)) or None)
    for label, run in zip(labels, read, strict=True):
        table.row(*_row(label, run))
    return table


def _known_seeds(labels: Sequence[str], runs: Sequence[Run]) -> str | None:
    """Return what stands beside ε of simulations, in one line below all."""
    seeded = [label for label, run in zip(labels, runs, strict=True) if run.private and run.seeded]
    if not seeded:
        return None
    whose = "" if len(seeded) == len(runs) else f" of {', '.join(seeded)}"
    return f"ε{whose}: {KNOWN_SEED}"


def _ended_early(labels: Sequence[str], runs: Sequence[Run]) -> str | None:
    """Return whose ε is not that of the rounds beside it."""
    ended = [label for label, run in zip(labels, runs, strict=True) if run.private and run.ahead]
    return f"{', '.join(ended)} ended early: {ENDED_EARLY}" if ended else None


def _trials(labels: Sequence[str], runs: Sequence[Run]) -> str | None:
    """Return whose ε is that of a tuning, and of whom nothing can be claimed."""
    of_each = list(zip(labels, runs, strict=True))
    chosen = [label for label, run in of_each if run.choice]
    said = [f"{', '.join(chosen)}, the best of several trials: {CHOSEN}"] if chosen else []
    said += [f"{label}: {run.unclaimed}" for label, run in of_each if run.private and run.unclaimed]
    return "; ".join(said) or None


def seed_model_table(measures: Mapping[str, Mapping[str, float]], origin: str) -> FittedTable:
    """Return a table of what a seed model reaches, one row a set of held-out recordings.

    `measures` are as `read_measures` returns them; a file made elsewhere has none. `origin` is what
    is known of it: see `fedpriv.seed_model.Origin`.
    """
    title = {
        "pretrained": "seed model, pre-trained on the data set's public part",
        "outside": "a file from outside: of its training nothing is known",
    }[origin]
    numbers = (Column("WER", kept=True), Column("CER"), Column("words"))
    table = FittedTable(Column("measured on", text=True, kept=True), *numbers, title=title)
    for name, found in measures.items():
        rates = [f"{found['wer']:.1%}", f"{found['cer']:.1%}", f"{found['words']:,.0f}"]
        table.row(name.replace("_", " "), *rates)
    return table


def _row(label: str, run: Run) -> list[str | Text]:
    account = spent(run)
    marked = (" contradicts its ledger", "bold red") if account.disagreements else ""
    return [
        Text.assemble(label, marked),
        f"{run.finished_rounds}/{run.config.rounds}",
        _quality(run),
        *_privacy(run, account),
        run.mechanism.a_round(run.sampling),
        run.config.server_step,
    ]


def _quality(run: Run) -> str:
    short = run.measured.quality.short
    beside = "" if short == "accuracy" or not run.measured.values else short
    return f"{run.measured.told} {beside}".strip()


def _privacy(run: Run, account: Spent) -> list[str | Text]:
    if not run.private:
        return [Text("no privacy", style="bold red"), "–", "–", "–", "–"]
    shown = (
        {}
        if run.unclaimed
        else {name: epsilon_text(epsilon) for name, epsilon in account.epsilons.items()}
    )
    last = run.releases[-1]
    clipping = run.config.privacy.clipping.kind if run.config.privacy else ""
    return [
        shown.get("rdp", "–"),
        shown.get("pld", "–"),
        f"{run.delta:g}",
        f"{last.noise_multiplier:.4g}",
        f"{clipping.replace('_', '-')} {last.bound:.4g}",
    ]
