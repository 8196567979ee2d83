"""The privacy statement of a run: what is promised, to whom, under which assumptions.

It answers what Ponomareva et al. 2023, "How to DP-fy ML" (section 5.3) and NIST SP 800-226 ask of
a claim of differential privacy. Every figure is computed from the ledger alone. A run without
privacy gets a statement too: that it has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby

from fedpriv.privacy.figures import epsilon_text, percent_up
from fedpriv.privacy.ledger import Release
from fedpriv.privacy.sampling import Adjacency
from fedpriv.reporting.attacker import Attacker, strongest_attacker
from fedpriv.reporting.cautions import cautions
from fedpriv.reporting.reader import Run
from fedpriv.reporting.spent import Spent
from fedpriv.reporting.statement_sections import Section, sections_of
from fedpriv.reporting.wording import beside_epsilon, round_ranges, value_range

NO_PRIVACY = "This run has no privacy: nothing bounds what its models reveal about its users."


@dataclass(frozen=True)
class Guarantee:
    """(ε, δ) under one accountant, and what it means.

    Attributes:
        accountant: its name in a config.
        epsilon: ε, finite.
        shown: ε as text, rounded up.
        delta: δ.
        method: what the accountant does, and the library and version that did it.
        attacker: the bounds themselves.
        meaning: what an attacker could do, in a plain sentence.
    """

    accountant: str
    epsilon: float
    shown: str
    delta: float
    method: str
    attacker: Attacker
    meaning: str


@dataclass(frozen=True)
class ReleaseGroup:
    """Releases that are alike but for their round, and for the bound where it adapts.

    Attributes:
        rounds: such as `1–60`.
        count: how many releases.
        sampling: how the cohort was drawn.
        bound: clip bound C, or its least and largest value; `none` where nothing bounded.
        sensitivity: L2 sensitivity of the sum, likewise.
        stddev: σ on each coordinate of the sum, likewise.
        counts: the noisy counts that were released beside the sum, and their noise.
        noise_multiplier: z of the whole release.
    """

    rounds: str
    count: int
    sampling: str
    bound: str
    sensitivity: str
    stddev: str
    counts: str
    noise_multiplier: float


@dataclass(frozen=True)
class Statement:
    """The statement.

    Attributes:
        private: False where there is no guarantee at all.
        seeded: whether whoever knows the seed can draw sampling and noise again.
        headline: the claim in one sentence.
        alarms: contradictions that a reader must see first.
        cautions: what makes the promise weaker than it looks, or the model worse.
        guarantees: one an accountant, the one that decides first; none without privacy, or where
            nothing can be claimed.
        sections: the answers.
        releases: everything that left the aggregator.
    """

    private: bool
    seeded: bool
    headline: str
    alarms: tuple[str, ...]
    cautions: tuple[str, ...]
    guarantees: tuple[Guarantee, ...]
    sections: tuple[Section, ...]
    releases: tuple[ReleaseGroup, ...]


def privacy_statement(run: Run, account: Spent) -> Statement:
    """Return the statement of `run`, whose ledger comes to `account`."""
    guarantees = () if run.unclaimed else _guarantees(run, account)
    return Statement(
        private=run.private,
        seeded=run.seeded,
        headline=_headline(run, account) if run.private else NO_PRIVACY,
        alarms=account.disagreements,
        cautions=cautions(run, account),
        guarantees=guarantees,
        sections=sections_of(run, account),
        releases=release_groups(run.releases),
    )


def release_groups(releases: Iterable[Release]) -> tuple[ReleaseGroup, ...]:
    """Return the releases with those put together that differ only in round, attempt and bound."""

    def alike(release: Release) -> tuple[str, bool, float, str]:
        return (
            release.mechanism.drawn(release),
            release.bound is None,
            release.noise_multiplier,
            _counts(release) + release.noise_shape,
        )

    groups = (list(same) for _, same in groupby(sorted(releases, key=alike), alike))
    return tuple(_group(members) for members in groups)


def _group(members: Sequence[Release]) -> ReleaseGroup:
    first = members[0]
    shape = {"spherical": "", "per_block": ", in proportion to each block's bound"}[
        first.noise_shape
    ]
    return ReleaseGroup(
        rounds=round_ranges([release.round for release in members]),
        count=len(members),
        sampling=first.mechanism.drawn(first),
        bound=value_range([release.bound for release in members]),
        sensitivity=value_range([release.sensitivity for release in members]),
        stddev=value_range([release.stddev for release in members]) + shape,
        counts=_counts(first),
        noise_multiplier=first.noise_multiplier,
    )


def _counts(release: Release) -> str:
    if not release.counts:
        return "none"
    return f"{release.counts}, noise σ {release.count_stddev:.4g}"


def to_markdown(statement: Statement, title: str) -> str:
    """Return the statement as markdown."""
    parts = [f"# Privacy statement: {title}", f"**{statement.headline}**"]
    parts += [f"> **Warning:** {alarm}" for alarm in statement.alarms]
    parts += [f"> **Note:** {caution}" for caution in statement.cautions]
    for each in statement.guarantees:
        known = beside_epsilon(statement.seeded)
        parts.append(
            f"- **ε = {each.shown}** at δ = {each.delta:g}{known}. {each.method} {each.meaning}"
        )
    for section in statement.sections:
        parts += [f"## {section.label}", " ".join(section.sentences)]
        if section.key == "releases":
            parts.append(_markdown_table(statement.releases))
    return "\n\n".join(parts) + "\n"


def _markdown_table(releases: Iterable[ReleaseGroup]) -> str:
    heads = ["rounds", "releases", "cohort", "clip bound C", "sensitivity"]
    heads += ["noise σ of the sum", "counts", "z"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for each in releases:
        cells = [each.rounds, str(each.count), each.sampling, each.bound, each.sensitivity]
        cells += [each.stddev, each.counts, f"{each.noise_multiplier:.6g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# -------------------------------------------------------------------- the guarantee


def _headline(run: Run, account: Spent) -> str:
    bound = f"({epsilon_text(min(account.epsilons.values()))}, {run.delta:g})"
    if run.unclaimed and run.complete:
        return f"Nothing can be claimed: {run.unclaimed}."
    if run.unclaimed:
        return (
            "Nothing can be claimed: lines of the ledger are missing. What is left of it comes to "
            f"{bound}{beside_epsilon(run.seeded)}, which is too little."
        )
    return run.mechanism.headline(f"{bound}-differentially private{beside_epsilon(run.seeded)}")


def _guarantees(run: Run, account: Spent) -> tuple[Guarantee, ...]:
    found = (_guarantee(run, account, name, each) for name, each in account.epsilons.items())
    return tuple(sorted(found, key=lambda each: each.epsilon))


def _guarantee(run: Run, account: Spent, name: str, epsilon: float) -> Guarantee:
    assert run.delta is not None
    attacker = strongest_attacker(account.accountants[name])
    return Guarantee(
        accountant=name,
        epsilon=epsilon,
        shown=epsilon_text(epsilon),
        delta=run.delta,
        method=_METHODS["choice" if run.choice else name]
        + f" (dp-accounting {version('dp-accounting')}).",
        attacker=attacker,
        meaning=_meaning(
            attacker,
            run.adjacency,
            run.header.unit,
            run.mechanism.seen,
            run.mechanism.unknown(run.sampling),
        ),
    )


_METHODS = {
    "rdp": "Rényi differential privacy, composed over all releases and converted to (ε, δ)",
    "choice": "Rényi differential privacy of the best of as many trials as are drawn, composed "
    "over all tunings that chose it and converted to (ε, δ)",
    "pld": "Privacy loss distributions, composed numerically and rounded to the safe side",
}


def _meaning(attacker: Attacker, adjacency: Adjacency, unit: str, seen: str, unknown: str) -> str:
    at_one, at_tenth = (percent_up(share) for share in attacker.true_positives)
    question, found = {
        Adjacency.ADD_OR_REMOVE_ONE: (
            f"whether one given {unit} took part",
            f"{unit}s {'who' if unit == 'user' else 'that'} did",
        ),
        Adjacency.REPLACE_ONE: (
            "which of two given users' data were used",
            "cases of the one that it looks for",
        ),
        Adjacency.ZERO_OUT: (f"whether one given {unit}'s data counted", f"{unit}s whose data did"),
    }[adjacency]
    known = {"user": "everybody else's data", "example": "all other data"}[unit]
    return (
        f"An attacker who sees every {seen} and knows {known}{unknown} guesses "
        f"{question}: allowed 1% false alarms it recognises at most {at_one} of the {found}; "
        f"allowed 0.1%, at most {at_tenth}. Membership advantage: at most "
        f"{percent_up(attacker.advantage)} (0% is guessing, 100% is certainty)."
    )
