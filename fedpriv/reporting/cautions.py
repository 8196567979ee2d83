"""What makes a run's promise weaker than it looks, or its model worse: a sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpriv.counting import numbered
from fedpriv.privacy.advice import delta_advice, epsilon_advice
from fedpriv.reporting.reader import Run
from fedpriv.reporting.spent import Spent
from fedpriv.reporting.wording import CHOSEN, beside_epsilon, round_ranges


def cautions(run: Run, account: Spent) -> tuple[str, ...]:
    """Return them, those on privacy first; contradictions are not among them."""
    return (*_of_privacy(run, account), *_of_rounds(run))


def _of_privacy(run: Run, account: Spent) -> tuple[str, ...]:
    if not run.private or run.delta is None or run.unclaimed:
        return ()
    protected = _protected(run)
    of_delta = delta_advice(run.delta, *protected) if protected else None
    of_epsilon = epsilon_advice(min(account.epsilons.values()), beside_epsilon(run.seeded))
    chosen = "It is the best of several trials: " + CHOSEN if run.choice else None
    return tuple(f"{said}." for said in (of_delta, of_epsilon, chosen) if said)


def _protected(run: Run) -> tuple[int, str] | None:
    """Return among how many δ promises something, and what they are; None where nobody knows."""
    if run.header.unit == "user":
        return run.header.population, "population"
    example = run.config.privacy.example if run.config.privacy else None
    size = example.silo_size if example else None
    return None if size is None else (size, "silo_size")


def _of_rounds(run: Run) -> tuple[str, ...]:
    silent = [row for row in run.rows if row.get("noise_only")]
    lost = [row for row in run.rows if row.get("nodes_lost") and not row.get("noise_only")]
    planned, found = run.config.rounds, list[str]()
    if silent:
        found.append(
            f"{_so_many(silent, run)} released noise alone, since too few nodes answered: at the "
            "cost of any other round, and the model learnt nothing."
        )
    if lost:
        found.append(
            f"{_so_many(lost, run)} lost nodes. Their users contributed zero; what is charged "
            "stays as it is."
        )
    if run.ended_early:
        found.append(
            f"The run ended early, after round {run.finished_rounds:,} of {planned:,}, since no "
            "evaluation brought a better model."
            + " Its ε is that of all the rounds that it might have had."
            * bool(run.ahead)
        )
    elif run.finished_rounds < planned:
        found.append(
            f"Finished: {run.finished_rounds:,} of {numbered(planned, 'planned round')}; the run "
            "was stopped or interrupted, or it is still going on."
            + " Should what was released have been the reason, as where a model diverges, what "
            "may be claimed is the ε of all planned rounds alone." * run.private
        )
    return tuple(found)


def _so_many(rows: Sequence[Mapping[str, Any]], run: Run) -> str:
    rounds = round_ranges([row["round"] for row in rows])
    return f"{len(rows):,} of {numbered(len(run.rows), 'round')} ({rounds})"
