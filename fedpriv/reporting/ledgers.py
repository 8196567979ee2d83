"""Ledgers shown, verified and merged, without ever changing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedpriv.counting import numbered
from fedpriv.errors import InputError
from fedpriv.privacy.advice import delta_advice, epsilon_advice
from fedpriv.privacy.charging import Bill
from fedpriv.privacy.composition import Account, Merged, grouped
from fedpriv.privacy.composition import Group as Releases
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.ledger import Header, Release, read_ledger
from fedpriv.privacy.mechanisms.registry import mechanism_of
from fedpriv.reporting.budget import cost_text
from fedpriv.reporting.choice import UNTOLD, read_choice
from fedpriv.reporting.completeness import NO_EVIDENCE, Evidence, read_evidence
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.run_directory import RunDirectory, newest_below
from fedpriv.reporting.spent import spent
from fedpriv.reporting.terminal import Column, FittedTable, one_line
from fedpriv.reporting.wording import CHOSEN, ENDED_EARLY, KNOWN_SEED, beside_epsilon, round_ranges
from fedpriv.selection import releases_ahead


@dataclass(frozen=True)
class Opened:
    """A ledger as it was found.

    Attributes:
        path: the ledger file.
        run: the run directory that it lies in; None for a ledger alone.
        account: what it holds.
        torn: whether its last line was never finished, and so charges nothing.
        evidence: what lies beside it and shows what was finished.
        missing: what the ledger lacks by that evidence, a sentence each.
        trial: the label of the trial of a tuning that it is of; 0 for none.
    """

    path: Path
    run: Path | None
    account: Account
    torn: bool
    evidence: Evidence
    missing: tuple[str, ...]
    trial: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know, a sentence each."""
        notes = [f"{self.path}: {sentence}" for sentence in self.missing]
        if self.torn:
            notes.append(
                f"{self.path}: the last line is torn; it was never used and charges nothing"
            )
        if self.account.tunings:
            notes.append(f"{self.path}: its run is the best of several trials; {CHOSEN}")
        elif self.account.ahead:
            notes.append(f"{self.path}: its run ended early; {ENDED_EARLY}; {self._charged}")
        if outside := self.account.header.outside:
            notes.append(
                f"{self.path}: not fedpriv's own, and not checked: {one_line(', '.join(outside))}"
            )
        return tuple(notes)

    @property
    def _charged(self) -> str:
        """What the releases come to that were made."""
        made = replace(self.account, ahead=()).bill(self.account.header.delta).first
        return f"what was released comes to {cost_text(made)}, which was no promise"

    def require_complete(self) -> None:
        """Raise InputError where lines are missing: what it costs would be too little."""
        if self.missing:
            raise InputError(f"{self.path} IS NOT COMPLETE: {' '.join(self.missing)}")

    def require_priced(self) -> None:
        """Raise InputError for a trial of which nothing says what choosing it cost."""
        if self.trial and not self.account.tunings:
            raise InputError(
                f"{self.path}: nobody knows what it cost: {UNTOLD}; name the folder of the run "
                "that fedpriv tune says is best"
            )


def open_ledger(path: Path) -> Opened:
    """Read the ledger at `path`, a file or a folder with a `ledger.jsonl`; nothing is written.

    Raises:
        InputError: no ledger there, or one with an edited, dropped or reordered line.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; name a run directory or a ledger.jsonl")
    file = path / "ledger.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"{path}: there is no ledger.jsonl in it; name a run directory{newest_below(path)}"
        )
    # Before the ledger, which may grow meanwhile. Beside a copy of another name lies another's.
    evidence = read_evidence(file.parent) if file.name == "ledger.jsonl" else NO_EVIDENCE
    read = read_ledger(file)
    folder = file.parent if (file.parent / "config.yaml").is_file() else None
    config = RunDirectory(folder).config() if folder else None
    ahead, missing = tuple[Release, ...](), evidence.unpaid(read.releases, read.hashes)
    if config is not None and config.evaluation.stop_after:
        # Whether it ended early, and so what it costs, only the metrics of all rounds say.
        rows = RunDirectory(file.parent).read_metrics()
        ahead = releases_ahead(config, rows, read.releases)
        missing = evidence.missing(read.releases, read.hashes) or _unmeasured(rows, read.releases)
    account = Account(str(path), read.header, read.releases, ahead)
    # Earlier ledgers do not say it themselves.
    trial = read.header.trial or (config.trial if config else 0)
    if file.name == "ledger.jsonl":
        choice = read_choice(file.parent, read.header, trial, account.own_events())
        account = replace(account, tunings=choice.tunings if choice else ())
    return Opened(file, folder, account, read.torn_bytes > 0, evidence, missing, trial)


def _unmeasured(rows: Sequence[Mapping[str, Any]], releases: Sequence[Release]) -> tuple[str, ...]:
    """Return that rounds before the last charged one, which was perhaps not finished, lack rows."""
    last = max((release.round for release in releases), default=0)
    if last <= (rows[-1]["round"] if rows else 0) + 1:
        return ()
    return (
        f"metrics.jsonl lacks rounds that came before round {last}, which is charged: without "
        "them nobody knows whether evaluation.stop_after has ended the run, and what it costs.",
    )


@dataclass(frozen=True)
class Verified:
    """A ledger whose every line is intact and which its run's metrics do not contradict.

    Attributes:
        opened: the ledger.
        bill: what it costs, from the file alone.
        compared: whether there were metrics to compare with.
    """

    opened: Opened
    bill: Bill
    compared: bool


def verify(path: Path) -> Verified:
    """Check the ledger at `path`, and the metrics of its run against it.

    Lines cut off at the end leave a shorter chain that is intact in itself: they are found by
    checkpoints, memories and metrics of finished rounds, and so only in a run directory.

    Raises:
        InputError: an edited, dropped or reordered line, by its number, or metrics that say
            something else than the ledger.
    """
    opened = open_ledger(path)
    opened.require_complete()
    opened.require_priced()
    compared = opened.run is not None and bool(opened.evidence.finished)
    if compared and opened.run is not None:
        disagreements = spent(read_run(opened.run)).disagreements
        if disagreements:
            raise InputError(f"{opened.run} CONTRADICTS ITS LEDGER: {' '.join(disagreements)}")
    return Verified(opened, opened.account.bill(opened.account.header.delta), compared)


# -------------------------------------------------------------------- documents


def ledger_document(opened: Opened, bill: Bill) -> dict[str, Any]:
    """Return a ledger, its groups of releases and what they cost, as a document for JSON."""
    account = opened.account
    return {
        "path": str(opened.path),
        "header": {"noise_by": account.header.noise_by, **account.header.fields()},
        "releases": len(account.releases),
        "releases_ahead": len(account.ahead),
        "tunings": [each.document() for each in account.tunings],
        "torn_last_line": opened.torn,
        "randomness": _known(opened).strip(" ()") or None,
        "missing": opened.missing,
        "completeness": opened.evidence.sentence() if not opened.missing else None,
        **_cost(bill),
        "groups": [_group_document(group) for group in grouped(account.releases)],
    }


def _cost(bill: Bill) -> dict[str, Any]:
    return asdict(bill.first)


def _group_document(group: Releases) -> dict[str, Any]:
    first, bounds = group.releases[0], group.bounds
    return {
        "releases": len(group.releases),
        "repeated": group.repeated,
        "rounds": round_ranges(group.rounds),
        "sampling": first.sampling,
        "population": first.population,
        "expected_cohort": first.expected_cohort,
        "noise_multiplier": first.noise_multiplier,
        "smallest_bound": bounds[0] if bounds else None,
        "largest_bound": bounds[1] if bounds else None,
        "event": str(first.event()),
        # Of silos on a schedule that of the most steps: each has had as many as its turns say.
        "event_at_most": bool(first.mechanism.scheduled),
    }


def verified_document(verified: Verified) -> dict[str, Any]:
    """Return the result of a verification as a document for JSON."""
    account = verified.opened.account
    return {
        "path": str(verified.opened.path),
        "intact": True,
        "metrics_agree": True if verified.compared else None,
        "torn_last_line": verified.opened.torn,
        "randomness": _known(verified.opened).strip(" ()") or None,
        "completeness": verified.opened.evidence.sentence(),
        "complete": True if verified.opened.evidence.independent else None,
        "releases": len(account.releases),
        "releases_ahead": len(account.ahead),
        "tunings": [each.document() for each in account.tunings],
        "rounds": round_ranges([release.round for release in account.releases]),
        "population": account.header.population,
        "unit": account.header.unit,
        "adjacency": account.header.adjacency,
        "noise_by": account.header.noise_by,
        **_cost(verified.bill),
    }


def merged_document(merged: Merged) -> dict[str, Any]:
    """Return several ledgers as one, as a document for JSON."""
    header = merged.accounts[0].header
    return {
        "population": header.population,
        "unit": header.unit,
        "adjacency": header.adjacency,
        "noise_by": header.noise_by,
        "releases": sum(len(account.releases) for account in merged.accounts),
        **_cost(merged.total),
        "runs": [
            {"path": account.name, "releases": len(account.releases), **_cost(bill)}
            for account, bill in zip(merged.accounts, merged.bills, strict=True)
        ],
    }


# -------------------------------------------------------------------- tables


def ledger_table(opened: Opened, bill: Bill) -> RenderableType:
    """Return a ledger's groups of releases and what they cost."""
    header = opened.account.header
    heading = (
        f"{one_line(str(opened.path))}: {header.population:,} {mechanism_of(header).members}, "
        f"unit {header.unit}, {header.adjacency} adjacency{_label(header)}"
    )
    table = FittedTable(
        Column("rounds", kept=True),
        Column("releases", kept=True),
        Column("repeated"),
        Column("cohort"),
        Column("clip C"),
        Column("noise z", kept=True),
        Column("sampling"),
    )
    for group in grouped(opened.account.releases):
        table.row(*_group_row(group))
    missing = [Text(each, style="bold red") for each in opened.missing]
    return Group(Text(heading), table, *_whose(header), *missing, cost_line(bill, _known(opened)))


def _label(*headers: Header) -> str:
    """Return what names the mechanism, where it is not noise that the server adds."""
    labels = dict.fromkeys(mechanism_of(header).label for header in headers)
    return "".join(f", {label}" for label in labels if label)


def _whose(header: Header) -> tuple[Text, ...]:
    """Say whose ε it is, where not everybody's."""
    whose = mechanism_of(header).whose
    return (Text(whose),) if whose else ()


def _group_row(group: Releases) -> list[str]:
    first = group.releases[0]
    everybody = first.mechanism.scheduled or "all"
    cohort = everybody if first.expected_cohort is None else f"{first.expected_cohort:,.15g}"
    return [
        round_ranges(group.rounds),
        f"{len(group.releases):,}",
        f"{group.repeated:,}",
        cohort,
        _bounds(group),
        f"{first.noise_multiplier:.4g}",
        first.sampling,
    ]


def _bounds(group: Releases) -> str:
    if group.bounds is None:
        return "unbounded"
    low, high = group.bounds
    return f"{low:.4g}" if low == high else f"{low:.4g}–{high:.4g}"


def _known(opened: Opened) -> str:
    """Return what stands beside ε: a ledger of before modes were recorded may not say."""
    mode = opened.account.header.mode
    if mode or opened.run is None:
        return beside_epsilon(mode == "simulation")
    return beside_epsilon(not RunDirectory(opened.run).config().runtime.deployment)


def cost_line(bill: Bill, known: str = "") -> Text:
    """Return ε by each accountant in one line, with what stands beside it."""
    cost = bill.first
    if cost.delta is None:
        red = ("no privacy", "bold red")
        return Text.assemble(red, ": nothing is bounded and noisy")
    reason = f" ({bill.without_pld})" if bill.without_pld else ""
    return Text(f"ε = {cost_text(cost)}, at δ = {cost.delta:g}{reason}{known}")


def verified_lines(verified: Verified) -> RenderableType:
    """Return what a verification found, line by line."""
    opened = verified.opened
    rounds = round_ranges([release.round for release in opened.account.releases]) or "none"
    metrics = "metrics.jsonl agrees with it" if verified.compared else "no metrics to compare with"
    return Group(
        Text(f"{one_line(str(opened.path))}: intact"),
        Text(f"{numbered(len(opened.account.releases), 'release')}, rounds {rounds}"),
        Text(metrics),
        Text(verified.opened.evidence.sentence()),
        *_whose(opened.account.header),
        cost_line(verified.bill, _known(opened)),
    )


def merged_table(merged: Merged) -> RenderableType:
    """Return what each run costs and what all cost together."""
    header = merged.accounts[0].header
    total = merged.total.first
    count = sum(len(account.releases) for account in merged.accounts)
    table = FittedTable(
        Column("run", text=True, kept=True, footer="all together"),
        Column("ε", kept=True, footer=epsilon_text(total.epsilon)),
        Column("ε by RDP", kept=True, footer=epsilon_text(total.epsilon_rdp)),
        Column("ε by PLD", kept=True, footer=epsilon_text(total.epsilon_pld)),
        Column("releases", footer=f"{count:,}"),
    )
    for account, bill in zip(merged.accounts, merged.bills, strict=True):
        cost = bill.first
        costs = (cost.epsilon, cost.epsilon_rdp, cost.epsilon_pld)
        releases = f"{len(account.releases):,}"
        table.row(one_line(account.name), *map(epsilon_text, costs), releases)
    same = "the same people in every run"
    if mechanism_of(header).payer is not None:
        same = "the same in every run, and so is the one that has spent most"
    heading = (
        f"{header.population:,} {mechanism_of(header).members}, taken to be {same}; "
        f"unit {header.unit}, {header.adjacency} adjacency"
        f"{_label(*(account.header for account in merged.accounts))}, δ = {total.delta:g}"
    )
    return Group(Text(heading), table)


def merge_notes(opened: Sequence[Opened], merged: Merged) -> tuple[str, ...]:
    """Return what the reader of a merge should know, a sentence each."""
    notes = [note for each in opened for note in each.notes]
    notes += [f"{each.path}: {KNOWN_SEED}" for each in opened if _known(each)]
    notes += bill_notes(opened[0], merged.total)
    return (*notes, merged.total.without_pld) if merged.total.without_pld else tuple(notes)


def bill_notes(opened: Opened, bill: Bill) -> tuple[str, ...]:
    """Return what to know of a δ or an ε that promises little."""
    header, cost = opened.account.header, bill.first
    of_delta = None
    # Of silos the population is not that of the examples, which a ledger does not know.
    if cost.delta is not None and header.unit == "user":
        of_delta = delta_advice(cost.delta, header.population)
    return tuple(filter(None, (of_delta, epsilon_advice(cost.epsilon))))
