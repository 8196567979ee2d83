"""What a run spent, computed anew from its ledger alone, and whether its metrics agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dp_accounting import NonPrivateDpEvent

from fedpriv.privacy.accounting import ACCOUNTANTS, Accountant
from fedpriv.privacy.accounts import PayerAccounts, PayerCosts, most_charged
from fedpriv.privacy.allocation import NoDistribution
from fedpriv.privacy.charging import pld_epsilon
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.ledger import Release
from fedpriv.reporting.choice import AGREEMENT
from fedpriv.reporting.reader import Run


@dataclass(frozen=True)
class Spent:
    """The account of a run.

    Attributes:
        accountants: by name, each charged with the whole ledger, or with what its worst silo pays
            for; empty for a run without privacy.
        epsilons: by accountant, the finite ε at the run's δ; empty for a run without privacy.
            Where the run ended early by what it had released it is that of all the rounds that
            it might have had: no other was promised. Of the best of a tuning it is what the tuning
            cost, and inf for a trial of which nothing says what choosing it cost.
        without_pld: why there is none by PLD; None where there is, or nobody asked for it.
        charged: where the run ended early, the ε of what it released, which is no promise; empty
            where it did not.
        costs: what those have spent who pay apart, such as silos; None where all users pay.
        disagreements: where metrics, config and ledger contradict each other, a sentence each.
        adversaries: the RDP ε against those who see more than released models, where it is another:
            `node`, where a cohort of fixed size is drawn; where nodes add shares of the noise,
            `node` (missing where nothing protects from it) and `server`.
    """

    accountants: Mapping[str, Accountant]
    epsilons: Mapping[str, float]
    disagreements: tuple[str, ...]
    costs: PayerCosts | None = None
    adversaries: Mapping[str, float] = field(default_factory=dict)
    without_pld: str | None = None
    charged: Mapping[str, float] = field(default_factory=dict)


def spent(run: Run) -> Spent:
    """Charge the accountants of the run's config with its ledger and check the metrics."""
    if not run.private or run.delta is None:
        return Spent({}, {}, _disagreements(run, {}))
    accountants, charged, reason = _epsilons(run, run.releases, run.delta)
    found = _disagreements(run, charged)
    if run.trial:
        return _of_a_trial(run, run.delta, found)
    releases, epsilons = run.releases, charged
    if run.ahead:
        releases = (*run.releases, *run.ahead)
        accountants, epsilons, reason = _epsilons(run, releases, run.delta)
    costs = None
    if run.mechanism.payer is not None:
        costs = _silo_accounts(run, releases).costs(run.delta)
    return Spent(
        accountants=accountants,
        epsilons=epsilons,
        disagreements=found,
        costs=costs,
        adversaries=run.mechanism.adversaries(releases, run.adjacency, run.delta),
        without_pld=reason,
        charged=charged if run.ahead else {},
    )


def _of_a_trial(run: Run, delta: float, disagreements: tuple[str, ...]) -> Spent:
    """Return what the release of a trial cost: what the tunings did that chose it.

    Against those who saw other trials too nothing holds, and of what the median group paid no less
    is known than of the worst.
    """
    chose = () if run.choice is None else run.choice.tunings
    events = Counter(tuning.event() for tuning in chose) or Counter([NonPrivateDpEvent()])
    accountant = ACCOUNTANTS["rdp"](run.adjacency)
    for event, count in events.items():
        accountant.compose(event, count)
    epsilon, costs = accountant.epsilon(delta), None
    if run.mechanism.payer is not None:
        worst = _silo_accounts(run, run.releases).costs(delta).worst_payer
        costs = PayerCosts(epsilon, worst, epsilon)
    _, reason = pld_epsilon(events, run.adjacency, delta, epsilon)
    saw_more = run.mechanism.adversaries(run.releases, run.adjacency, delta)
    return Spent(
        accountants={"rdp": accountant},
        epsilons={"rdp": epsilon},
        disagreements=disagreements,
        costs=costs,
        adversaries=dict.fromkeys(saw_more, math.inf),
        without_pld=reason,
    )


def _epsilons(
    run: Run, releases: Sequence[Release], delta: float
) -> tuple[dict[str, Accountant], dict[str, float], str | None]:
    """Return the accountants of `releases`, their finite ε, and why there is none by PLD."""
    accountants = {"rdp": _charged(run, "rdp", releases)}
    epsilons, reason = {"rdp": accountants["rdp"].epsilon(delta)}, None
    if run.config.privacy and "pld" in run.config.privacy.accountants:
        events = Counter(release.event() for release in most_charged(releases))
        by_pld, reason = pld_epsilon(events, run.adjacency, delta, epsilons["rdp"])
        if by_pld is not None:
            accountants["pld"] = _charged(run, "pld", releases)
            epsilons["pld"] = by_pld
    return accountants, epsilons, reason


def _silo_accounts(run: Run, releases: Iterable[Release]) -> PayerAccounts:
    accounts = PayerAccounts(
        run.adjacency, run.mechanism.accounts_of(run.releases[-1]), run.mechanism.payer
    )
    accounts.charge_all(releases)
    return accounts


def rdp_by_round(run: Run) -> list[float]:
    """Return the RDP ε of the ledger's releases up to each finished round; inf for no privacy.

    Of silos it is that of the worst up to then.
    """
    if run.delta is None or not run.private:
        return [math.inf] * len(run.rows)
    releases = sorted(run.releases, key=lambda release: release.round)
    if run.mechanism.payer is not None:
        return _worst_by_round(run, releases, run.delta)
    accountant = ACCOUNTANTS["rdp"](run.adjacency)
    epsilons, charged = [], 0
    for row in run.rows:
        while charged < len(releases) and releases[charged].round <= row["round"]:
            accountant.compose(releases[charged].event())
            charged += 1
        epsilons.append(accountant.epsilon(run.delta))
    return epsilons


def _worst_by_round(run: Run, releases: Sequence[Release], delta: float) -> list[float]:
    accounts = _silo_accounts(run, ())
    worst, charged = [], 0
    for row in run.rows:
        until = charged
        while until < len(releases) and releases[until].round <= row["round"]:
            until += 1
        accounts.charge_all(releases[charged:until])
        charged = until
        worst.append(accounts.costs(delta).worst)
    return worst


def _disagreements(run: Run, epsilons: Mapping[str, float]) -> tuple[str, ...]:
    """Return all contradictions.

    A metrics line may say more than the ledger charges up to its round (a round that was charged
    before a crash and run again is in every later ε), but never more than the whole ledger, and
    never less than the charges up to its round.
    """
    found = list(run.missing)
    # What came from outside is a part of it, and need not be here.
    if not run.header.outside and (
        run.config.fingerprint(run.header.data) != run.header.fingerprint
    ):
        found.append(
            "config.yaml is not the configuration that the ledger was charged under: either it or "
            "fedpriv has changed since. Every privacy figure here is the ledger's."
        )
    uncharged = {row["round"] for row in run.rows} - {release.round for release in run.releases}
    if uncharged:
        found.append(f"The ledger charges nothing for {len(uncharged)} finished round(s).")
    if run.private != (run.config.privacy is not None and not _noiseless(run)):
        found.append("config.yaml and the ledger contradict each other on whether there is noise.")
    said = run.config.privacy.noise_by if run.config.privacy else "server"
    if said != run.header.noise_by:
        found.append(
            f"config.yaml says that noise is added by {said}, the ledger: by {run.header.noise_by}."
        )
    found += _contradicted_rdp(run, epsilons.get("rdp", math.inf))
    return (*found, *_contradicted_pld(run, epsilons.get("pld", math.inf)))


def _noiseless(run: Run) -> bool:
    return run.config.privacy is not None and run.config.privacy.noise_multiplier == 0


def _contradicted_rdp(run: Run, whole: float) -> list[str]:
    contradicted = [
        (row, low)
        for row, low in zip(run.rows, rdp_by_round(run), strict=True)
        if not _between(low, _said(row, "rdp"), whole)
    ]
    if not contradicted:
        return []
    row, low = contradicted[-1]
    others = len(contradicted) - 1
    more = f" {others} earlier round(s) contradict it too." if others else ""
    return [_contradiction(row, "rdp", low) + more]


def _contradicted_pld(run: Run, whole: float) -> list[str]:
    """Check the last PLD figure only: each costs tenths of a second."""
    rows = [row for row in run.rows if row["epsilon"].get("pld") is not None]
    if not rows:
        return []
    row, low = rows[-1], math.inf
    charged = [release for release in run.releases if release.round <= row["round"]]
    if run.private and run.delta is not None:
        all_charged = len(charged) == len(run.releases)
        try:
            known = all_charged and math.isfinite(whole)
            low = whole if known else _charged(run, "pld", charged).epsilon(run.delta)
        except NoDistribution:
            return []  # where no PLD can be had it says nothing against what another place had
    return [] if _between(low, _said(row, "pld"), whole) else [_contradiction(row, "pld", low)]


def _charged(run: Run, name: str, releases: Sequence[Release]) -> Accountant:
    accountant = ACCOUNTANTS[name](run.adjacency)
    for release in most_charged(releases):
        accountant.compose(release.event())
    return accountant


def _said(row: Mapping[str, Any], accountant: str) -> float:
    epsilon = row["epsilon"].get(accountant)
    return math.inf if epsilon is None else float(epsilon)


def _between(low: float, value: float, high: float) -> bool:
    return _at_most(low, value) and _at_most(value, high)


def _at_most(low: float, high: float) -> bool:
    return low <= high or math.isclose(low, high, rel_tol=AGREEMENT)


def _contradiction(row: Mapping[str, Any], accountant: str, from_ledger: float) -> str:
    said, right = (
        f"ε = {epsilon_text(value, 6)}" if math.isfinite(value) else "no privacy"
        for value in (_said(row, accountant), from_ledger)
    )
    return (
        f"By {accountant.upper()} metrics.jsonl says {said} after round {row['round']}, but the "
        f"ledger alone gives {right}."
    )
