"""One line a run, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fedpriv.reporting.reader import Run, read_run, run_labels
from fedpriv.reporting.spent import Spent, spent
from fedpriv.reporting.wording import KNOWN_SEED, rounded_up

# Widths that break no word and leave room for the rest on a terminal of 80 columns.
_WIDTHS = {
    "rounds": 7,
    "held out": 5,
    "ε rdp": 7,
    "ε pld": 6,
    "δ": 5,
    "clip C": 9,
    "noise z": 5,
    "cohort": 6,
}


def summary_table(runs: Sequence[Path]) -> Table:
    """Return a table with one row a run.

    ε is computed anew from each ledger. A run without privacy says so in red and shows no ε; one
    whose metrics contradict its ledger is marked.

    Raises:
        InputError: a directory holds no run, or a damaged one.
    """
    read = [read_run(path) for path in runs]
    # Folded, never cut: a terminal of 80 columns must still say "no privacy".
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("run", overflow="fold")
    for name, width in _WIDTHS.items():
        table.add_column(name, justify="right", overflow="fold", width=width)
    table.add_column("server", overflow="fold")
    labels = run_labels(read)
    for label, run in zip(labels, read, strict=True):
        table.add_row(*_row(label, run))
    table.caption = _known_seeds(labels, read)
    return table


def _known_seeds(labels: Sequence[str], runs: Sequence[Run]) -> str | None:
    """Return what stands beside ε of simulations, in one line below all."""
    seeded = [label for label, run in zip(labels, runs, strict=True) if run.private and run.seeded]
    if not seeded:
        return None
    whose = "" if len(seeded) == len(runs) else f" of {escape(', '.join(seeded))}"
    return f"ε{whose}: {KNOWN_SEED}"


def seed_model_table(measures: Mapping[str, Mapping[str, float]], origin: str) -> Table:
    """Return a table of what a seed model reaches, one row a set of held-out recordings.

    `measures` are as `read_measures` returns them; a file made elsewhere has none. `origin` is what
    is known of it: see `fedpriv.seed_model.Origin`.
    """
    title = {
        "pretrained": "seed model, pre-trained on the data set's public part",
        "outside": "a file from outside: of its training nothing is known",
    }[origin]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title)
    for name in ("measured on", "WER", "CER", "words"):
        table.add_column(name, justify="left" if name == "measured on" else "right")
    for name, found in measures.items():
        rates = [f"{found['wer']:.1%}", f"{found['cer']:.1%}", f"{found['words']:,.0f}"]
        table.add_row(name.replace("_", " "), *rates)
    return table


def _row(label: str, run: Run) -> list[str]:
    account = spent(run)
    marked = " [bold red]contradicts its ledger[/bold red]" if account.disagreements else ""
    return [
        escape(label) + marked,
        f"{run.finished_rounds}/{run.config.rounds}",
        _quality(run),
        *_privacy(run, account),
        f"{run.sampling.expected_cohort:g}",
        escape(run.config.server.optimizer),
    ]


def _quality(run: Run) -> str:
    if math.isnan(run.quality.final):
        return "–"
    return f"{run.quality.final:.1%} {'WER' if run.quality.name != 'accuracy' else ''}".strip()


def _privacy(run: Run, account: Spent) -> list[str]:
    if not run.private:
        return ["[bold red]no privacy[/bold red]", "–", "–", "–", "–"]
    shown = {name: rounded_up(epsilon) for name, epsilon in account.epsilons.items()}
    last = run.releases[-1]
    clipping = run.config.privacy.clipping.kind if run.config.privacy else ""
    return [
        shown.get("rdp", "–"),
        shown.get("pld", "–"),
        f"{run.delta:g}",
        f"{clipping.replace('_', '-')} {last.bound:.4g}",
        f"{last.noise_multiplier:.4g}",
    ]
