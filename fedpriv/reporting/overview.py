"""What a reader sees first of a run: how good, how private, for whom, and in which sense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fedpriv.counting import numbered
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.sampling import Adjacency
from fedpriv.reporting.reader import Run
from fedpriv.reporting.spent import Spent
from fedpriv.reporting.statement import NO_PRIVACY, Guarantee, Statement
from fedpriv.reporting.wording import KNOWN_SEED
from fedpriv.selection import not_public
from fedpriv.tasks.base import BY_CLASS
from fedpriv.tasks.intervals import CONFIDENCE, wilson
from fedpriv.tasks.quality import WORD_ERROR_RATE

# Beyond this e^ε says nothing to anybody.
_LARGEST_FACTOR = 1e6


@dataclass(frozen=True)
class Overview:
    """The head of a report.

    Attributes:
        badge: in which sense ε holds: a simulation with a known seed, or a deployment.
        quality: the last held-out measure as people read it.
        sure: how far it may be off, or why nobody knows.
        epsilon: ε by the accountant that decides; `none` without privacy, `unknown` where nothing
            can be claimed.
        decides: that accountant's guarantee; None where there is none.
        delta: δ.
        unit: whom or what ε protects.
        plain: all of it in plain sentences.
    """

    badge: str
    quality: str
    sure: str
    epsilon: str
    decides: Guarantee | None
    delta: str
    unit: str
    plain: tuple[str, ...]


def overview(run: Run, statement: Statement) -> Overview:
    """Return the head of the report of `run`."""
    decides = statement.guarantees[0] if statement.guarantees else None
    promised = "none" if not run.private else decides.shown if decides else "unknown"
    return Overview(
        badge=KNOWN_SEED if run.seeded else "deployment",
        quality=run.measured.told,
        sure=_sure(run),
        epsilon=promised,
        decides=decides,
        delta=f"{run.delta:g}" if run.private else "–",
        unit=_unit(run) if run.private else "nobody",
        plain=(_trained(run), _measured(run), *_promised(run, decides), _sense(run)),
    )


def interval_of(run: Run) -> tuple[float, float] | None:
    """Return the 95% interval of the last held-out measure; None where none is recorded."""
    row = _last_measured(run)
    if row is None or math.isnan(run.measured.final):
        return None
    held_out, quality = row["held_out"], run.measured.quality
    if quality.key == WORD_ERROR_RATE.key and "wer_low" in held_out:
        return held_out["wer_low"], held_out["wer_high"]
    if quality.key == "accuracy" and held_out.get("examples"):
        return wilson(run.measured.final * held_out["examples"], held_out["examples"])
    return None


def _last_measured(run: Run) -> dict[str, Any] | None:
    last = run.measured.rounds[-1:]
    return next((row for row in run.rows if (row["round"],) == last), None)


def _sure(run: Run) -> str:
    interval, number = interval_of(run), run.measured.quality.number
    if interval is None:
        return "how sure is not recorded"
    return f"{CONFIDENCE:.0%} interval {number(interval[0])} to {number(interval[1])}"


def _unit(run: Run) -> str:
    what = {"user": "one user", "example": "one example of a silo"}[run.header.unit]
    whose = "silo" if run.header.unit == "example" else "user"
    return f"{what}, of {numbered(run.header.population, whose)}"


# -------------------------------------------------------------------- plain sentences


def _trained(run: Run) -> str:
    sampling = run.sampling
    everybody = numbered(sampling.population, run.mechanism.members.removesuffix("s"))
    all_of_them = "all" if sampling.kind == "all" else ""
    some = run.mechanism.scheduled or all_of_them or f"about {sampling.expected_cohort:,.4g}"
    return (
        f"A model ({run.config.model.name}) was trained for "
        f"{numbered(run.finished_rounds, 'round')}, each with {some} of {everybody}."
    )


def _measured(run: Run) -> str:
    row, quality = _last_measured(run), run.measured.quality
    if row is None:
        return "It has not been measured yet."
    count, interval = row["held_out"].get("examples"), interval_of(run)
    seen = numbered(count, "held-out example") if count else "held-out examples"
    said = f"On {seen} its {quality.name} is "
    said += run.measured.told
    if interval is None:
        return f"{said}; what would tell how far chance may have moved it was not recorded."
    by = {
        "accuracy": "Wilson's, as if no example had to do with another",
        WORD_ERROR_RATE.key: "by a bootstrap over utterances, as if none had to do with another",
    }[quality.key]
    low, high = (quality.number(end) for end in interval)
    return f"{said}, with a {CONFIDENCE:.0%} interval of {low} to {high} ({by})."


def _promised(run: Run, decides: Guarantee | None) -> tuple[str, ...]:
    if not run.private:
        return (NO_PRIVACY,)
    if decides is None and run.complete:
        return (f"Nobody knows what it has cost: {run.unclaimed}.",)
    if decides is None:
        return ("Lines of its ledger are missing, so that nobody knows what it has cost.",)
    unit = run.header.unit
    given = {
        Adjacency.ADD_OR_REMOVE_ONE: f"Whether one given {unit} took part",
        Adjacency.REPLACE_ONE: f"Exchanging one {unit}'s data for any other's",
        Adjacency.ZERO_OUT: f"Whether one given {unit}'s data counted",
    }[run.adjacency]
    payer = run.mechanism.payer
    of = {"silo": "what a silo sent", "user": "what a user sent"}.get(
        payer or "", "what was released"
    )
    return (
        f"{given} makes no outcome of {of} more than {_factor(decides)} times as likely, except "
        f"with probability δ = {decides.delta:g}: that is the promise of ε = {decides.shown}, by "
        f"{decides.accountant.upper()}"
        + (", for all trials of the tuning that chose it" if run.choice else "")
        + (f", to the worst {payer}" if payer else "")
        + (f" ({KNOWN_SEED})." if run.seeded else "."),
    )


def _factor(guarantee: Guarantee) -> str:
    """Return e^ε in three digits, rounded up, as far as it says anything."""
    factor = math.exp(min(guarantee.epsilon, 700))
    if factor > _LARGEST_FACTOR:
        return f"e^{guarantee.shown}"
    scale = 10.0 ** max(0, math.floor(math.log10(factor)) - 2)
    return f"{math.ceil(factor / scale) * scale:,.0f}" if factor >= 100 else f"{_up(factor):g}"


def _up(value: float) -> float:
    return math.ceil(value * 10) / 10


def _sense(run: Run) -> str:
    if run.seeded:
        return (
            f"It is a simulation, and its seed ({run.config.seed}) is known: whoever has it can "
            "take the noise away. So this run protects nobody"
            + (
                ", and its ε is what the same recipe costs when it is seeded secretly."
                if run.private
                else "."
            )
        )
    return "It is a deployment: its seeds came from operating systems, and were never stored."


# -------------------------------------------------------------------- classes


@dataclass(frozen=True)
class ClassRow:
    """How well one class is told.

    Attributes:
        number: the class.
        examples: how many of the held-out examples are of it.
        right: the share of them that was told, and its 95% interval.
        precise: the share of right ones among all answers that named it; None where none did.
    """

    number: int
    examples: int
    right: tuple[float, float, float]
    precise: float | None


def class_rows(run: Run) -> list[ClassRow]:
    """Return the classes as last measured, the worst first; none where they were not recorded.

    They are recorded of public held-out data alone, which is looked at once more here.
    """
    row = _last_measured(run)
    if row is None or BY_CLASS not in row or not (run.deployed or not_public(run.facts) is None):
        return []
    counted = row[BY_CLASS]
    each = zip(counted["examples"], counted["right"], counted["answers"], strict=True)
    rows = [
        ClassRow(
            number,
            examples,
            (right / examples, *wilson(right, examples)),
            right / answers if answers else None,
        )
        for number, (examples, right, answers) in enumerate(each)
        if examples
    ]
    return sorted(rows, key=lambda one: (one.right[0], one.number))


def no_classes(run: Run) -> str:
    """Return why there is no table of classes."""
    if not run.deployed and (why := not_public(run.facts)) is not None:
        return f"Single classes are not shown: the held-out examples are {why.partition(':')[0]}."
    return "Nothing was recorded of single classes."


def epsilon_of_the_median(run: Run, account: Spent) -> tuple[str, str] | None:
    """Return who pays apart, and the median one's ε by RDP; None where all pay alike."""
    if account.costs is None or run.unclaimed or run.mechanism.payer is None:
        return None
    return run.mechanism.payer, epsilon_text(account.costs.median)
