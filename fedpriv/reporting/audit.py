"""What an audit found: as a file beside a run, as a table, and as words in a report."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpriv.counting import numbered
from fedpriv.errors import InputError
from fedpriv.privacy.auditing import (
    Membership,
    OneRunBound,
    OneShotEstimate,
    TruePositives,
)
from fedpriv.privacy.figures import epsilon_text
from fedpriv.reporting.run_directory import write_whole
from fedpriv.reporting.statement_sections import Section
from fedpriv.reporting.strict_json import to_json
from fedpriv.reporting.terminal import Column, FittedTable
from fedpriv.reporting.wording import KNOWN_SEED

FILE = "audit.json"


@dataclass(frozen=True)
class Audit:
    """An audit of a config.

    Attributes:
        name: the config's name.
        fingerprint: of the config, which says whether a run is one of the same.
        seed: of the audited run.
        rounds: how many rounds were run and judged.
        planned_rounds: how many the config has.
        population: N, real users, without canaries.
        canaries: how many canaries there were.
        adjacency: the adjacency of ε.
        delta: the δ of every ε here.
        confidence: of both bounds together, and so of the larger; each has a higher one of its own.
        epsilons: ε of the audited rounds by accountant.
        bound: the lower bound from the canaries.
        estimates: of ε, from the canaries; no bounds.
        users: what can be told of the membership of real users; None where it was not measured.
        gaussian: the lower bound from the canaries where every release is an unsampled Gaussian,
            which is taken for granted; None elsewhere.
    """

    name: str
    fingerprint: str
    seed: int
    rounds: int
    planned_rounds: int
    population: int
    canaries: int
    adjacency: str
    delta: float
    confidence: float
    epsilons: dict[str, float]
    bound: OneRunBound
    estimates: tuple[OneShotEstimate, ...]
    users: Membership | None
    gaussian: float | None = None

    @property
    def epsilon(self) -> float:
        """The tightest ε that is claimed."""
        return min(self.epsilons.values())

    @property
    def largest_bound(self) -> float:
        """The larger of the lower bounds from canaries and from real users."""
        users = self.users.bound.epsilon if self.users else 0.0
        return max(self.bound.epsilon, users)

    @property
    def holds(self) -> bool:
        """Whether no lower bound exceeds the ε that is claimed."""
        return self.largest_bound <= self.epsilon

    @property
    def suspicious(self) -> tuple[OneShotEstimate, ...]:
        """The estimates that lie above the claimed ε by more than their own spread."""
        return tuple(each for each in self.estimates if each.low > self.epsilon)


def audit_document(audit: Audit) -> str:
    """Return the audit as one strict JSON document.

    Real users' scores, and the digest that tells data apart, are functions of users' data, which no
    mechanism released.
    """
    fields = asdict(audit)
    private = {name: fields.pop(name) for name in ("fingerprint", "users")}
    return to_json({**fields, "simulation_only": private, "holds": audit.holds})


def write_audit(directory: Path, audit: Audit) -> Path:
    """Write the audit into the directory of a run of the same config.

    Raises:
        InputError: the file cannot be written.
    """
    path = directory / FILE
    write_whole(path, audit_document(audit), "audit")
    return path


def read_audit(directory: Path) -> Audit | None:
    """Return the audit that lies beside a run; None where there is none.

    Raises:
        InputError: the file is not an audit.
    """
    path = directory / FILE
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _parsed(document)
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not an audit; remove it or audit again") from None


def _parsed(document: dict[str, Any]) -> Audit:
    fields = {k: v for k, v in document.items() if k not in ("holds", "simulation_only")}
    private = document["simulation_only"]
    fields["fingerprint"], users = private["fingerprint"], private["users"]
    fields["bound"] = OneRunBound(**fields["bound"])
    fields["estimates"] = tuple(_estimate(each) for each in fields["estimates"])
    fields["users"] = _membership(users) if users else None
    return Audit(**fields)


def _estimate(fields: dict[str, Any]) -> OneShotEstimate:
    moments = {name: tuple(fields[name]) for name in ("observed", "unobserved")}
    return OneShotEstimate(**{**fields, **moments})


def _membership(fields: dict[str, Any]) -> Membership:
    found = tuple(TruePositives(**each) for each in fields["true_positives"])
    bound = OneRunBound(**fields["bound"])
    return Membership(**{**fields, "true_positives": found, "bound": bound})


# ---------------------------------------------------------------- words


def audit_table(audit: Audit) -> FittedTable:
    """Return the audit as a table: what is claimed above what was measured."""
    title = (
        f"{audit.name}: {audit.rounds} of {numbered(audit.planned_rounds, 'round')}, δ = "
        f"{audit.delta:g}, "
        f"{KNOWN_SEED}"
    )
    columns = (Column("what", text=True, kept=True), Column("ε", kept=True))
    table = FittedTable(*columns, Column("from", text=True), title=title)
    for name, epsilon in audit.epsilons.items():
        table.row(f"claimed, by {name}", epsilon_text(epsilon), "the audited run's ledger")
    sure = f"{audit.confidence:.4g}"
    table.row(f"lower bound, confidence {sure}", _down(audit.bound.epsilon), _guesses(audit.bound))
    if audit.gaussian is not None:
        known = "by its curve of a Gaussian (Mahloujifar et al. 2025)"
        table.row(f"the same, confidence {sure}", _down(audit.gaussian), known)
    if audit.users is not None:
        bound = audit.users.bound
        label = f"the same, real users (simulation only; AUC {audit.users.auc:.3f})"
        table.row(label, _down(bound.epsilon), _guesses(bound))
    for each in audit.estimates:
        spread = f"{each.low:.3f} to {each.high:.3f} by bootstrap"
        table.row(f"estimate, {each.statistic}", f"{each.epsilon:.3f}", spread)
    return table


def audit_verdict(audit: Audit) -> str:
    """Return in a sentence whether the claim survived."""
    claimed, sure = epsilon_text(audit.epsilon), f"{audit.confidence:.4g}"
    users = audit.users is not None and audit.largest_bound > audit.bound.epsilon
    whose = " by scores of real users, simulation only," if users else ""
    if not audit.holds:
        return (
            f"THE CLAIM IS REFUTED: ε is at least {_down(audit.largest_bound)}{whose} with "
            f"confidence {sure}, above the ε = {claimed} that is accounted for. Training and "
            "accounting do not fit; do not rely on this configuration's ε."
        )
    sentence = (
        f"The claim survived: the lower bound {_down(audit.largest_bound)}{whose} lies below the "
        f"ε = {claimed} that is accounted for. A lower bound proves nothing more: {audit.canaries} "
        f"canaries could have shown {_down(audit.bound.ceiling)} at most."
    )
    if audit.suspicious:
        most = max(each.low for each in audit.suspicious)
        sentence += (
            f" But an estimate lies above the claim by more than its spread ({most:.3f}). It is no "
            "proof; look for the cause, and audit with more canaries or another seed."
        )
    return sentence


def audit_section(audit: Audit, fingerprint: str) -> Section:
    """Return what a report says of an audit beside a run whose ledger has `fingerprint`."""
    bound, sure = audit.bound, f"{audit.confidence:.4g}"
    claimed = " and ".join(
        f"{epsilon_text(value)} by {name.upper()}" for name, value in audit.epsilons.items()
    )
    sentences = [
        f"A run of {audit.rounds} of {numbered(audit.planned_rounds, 'planned round')} with "
        f"{numbered(audit.canaries, 'canary user')}, each in or out by a fair coin, was attacked "
        f"from outside, with seed {audit.seed}. The accountant's ε of these rounds is {claimed} at "
        f"δ = {audit.delta:g} ({KNOWN_SEED}).",
        f"Measured: ε is at least {_down(bound.epsilon)} with confidence {sure} "
        f"({bound.correct} of {bound.guesses} guesses right; Steinke et al. 2023).",
        *(
            f"Estimated, which is no bound: ε ≈ {each.epsilon:.3f} from the {each.statistic} "
            f"({each.low:.3f} to {each.high:.3f} by bootstrap; Andrew et al. 2023)."
            for each in audit.estimates
        ),
    ]
    if audit.users is not None:
        sentences.append(_users(audit.users, sure))
    sentences.append(audit_verdict(audit))
    if audit.fingerprint != fingerprint:
        sentences.append("The audit was of ANOTHER configuration than this run's.")
    return Section("audit", "Measured from outside", tuple(sentences))


def _users(users: Membership, sure: str) -> str:
    found = ", ".join(
        f"{each.rate:.1%} ({each.low:.1%} to {each.high:.1%}) at {each.false_positive_rate:.0%}"
        for each in users.true_positives
    )
    return (
        f"Real users (simulation only), {users.members} in and {users.others} out by coin, told "
        f"apart by how much training lowered their loss: AUC {users.auc:.3f} ({users.auc_low:.3f} "
        f"to {users.auc_high:.3f}), true positives {found} false positives; ε at least "
        f"{_down(users.bound.epsilon)} with confidence {sure}."
    )


def _guesses(bound: OneRunBound) -> str:
    return f"{bound.correct} of {bound.guesses} guesses right, of {bound.coins} coins"


def _down(value: float) -> str:
    """Return a lower bound with three decimals, rounded down."""
    return f"{math.floor(value * 1000) / 1000:.3f}"
