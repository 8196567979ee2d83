"""What a privacy statement says where the unit is an example and each silo pays for itself.

A silo trusts nobody but itself, so most answers differ from those of a run whose unit is a user:
`silo_sentences` gives them, by the keys of the statement's sections.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedpriv.privacy.ledger import Release
from fedpriv.privacy.sampling import Adjacency
from fedpriv.privacy.silos import SiloCosts
from fedpriv.reporting.data_statement import an_example
from fedpriv.reporting.reader import Run
from fedpriv.reporting.wording import drawn_anew, worst_and_median


def silo_sentences(run: Run, costs: SiloCosts, clipping: str) -> Mapping[str, tuple[str, ...]]:
    """Return the sentences of the sections that differ, by key.

    Args:
        run: a private run whose releases are those of silos.
        costs: what its silos have spent.
        clipping: how a gradient is bounded, in words.
    """
    return {
        "unit": _unit(run, costs),
        "adjacency": _adjacency(run),
        "trust": _TRUST,
        "mechanism": _mechanism(run, clipping),
        "sampling": _sampling(run),
        "delta": _delta(run),
    }


def _unit(run: Run, costs: SiloCosts) -> tuple[str, ...]:
    return (
        f"{an_example(run)} of one of {run.header.population:,} silos. Each silo "
        "spends an ε of its own, for the rounds in which it was drawn.",
        worst_and_median(costs, "silo"),
        "NOT protected: a person with several examples in a silo, whose ε grows with their number; "
        "a person with examples in several silos, who pays in each of them; and the silo itself: "
        "that it takes part, when, and what all its examples have in common.",
    )


def _adjacency(run: Run) -> tuple[str, ...]:
    moves = "The sum of a step then moves by up to C"
    if run.releases[-1].counts:
        moves += ", and each of its counts, of ±1/2 for each example, by 1/2"
    if run.adjacency is Adjacency.ZERO_OUT:
        return (
            "Zero out: one example of one silo, of known size, that is replaced by one that adds "
            "nothing.",
            f"{moves}. How many examples each silo has is public.",
        )
    if run.adjacency is not Adjacency.ADD_OR_REMOVE_ONE:
        raise ValueError(f"no sentences for {run.adjacency.value} of examples")
    return (
        "Add or remove one: two silos that differ in the presence of one example.",
        f"{moves}. How many examples a silo has is not public: the sum is divided by a number "
        "from the config.",
    )


_TRUST = (
    "Each silo trusts itself alone. What it sends has been private since its first local step; "
    "the server adds no noise and need not be trusted with the examples.",
    "The guarantee of a silo covers everything that it sent in rounds that were finished, here or "
    "after a resume, and every model made from it.",
    "In this simulation the silos of a node run in one process and their changes are added up "
    "there, which is post-processing.",
)


def _mechanism(run: Run, clipping: str) -> tuple[str, ...]:
    last = run.releases[-1]
    return (
        f"DP-SGD (Abadi et al. 2016) inside each silo: {last.steps} steps a round, {clipping} so "
        "that an example adds a gradient of L2 norm at most C; one that is NaN or infinite adds "
        "zero.",
        f"Gaussian noise N(0, σ²), {_stddev(run)}, is added to the sum of each step, also "
        f"where a sample is empty. {_denominator(run)}",
        *_counts(last),
        "A silo sends the change of its parameters. Momentum, the average over the expected number "
        f"of silos, and the server optimizer ({run.config.server.optimizer}) are post-processing.",
    )


def _stddev(run: Run) -> str:
    last = run.releases[-1]
    if not last.counts or last.bound is None:
        return f"σ = {last.stddev:.4g}"
    return f"σ = {last.stddev / last.bound:.4g}·C"


def _counts(release: Release) -> tuple[str, ...]:
    if not release.counts:
        return ()
    return (
        "Counts of a step's examples within their bound are released with its sum, with noise of "
        "their own; z is that of both together, so the counts are paid for. A silo's bounds follow "
        "them from step to step, and a round starts from the bounds that the silos of the round "
        "before ended with, in geometric mean: post-processing. C and σ on record are those of a "
        "round's first step.",
    )


def _denominator(run: Run) -> str:
    example = run.config.privacy.example if run.config.privacy else None
    if example is None or example.silo_size is None:
        return "It is divided by q·N, N being the silo's public number of examples."
    return (
        f"It is divided by q·N = {example.sampling_rate * example.silo_size:g}, of public numbers "
        "alone, never by how many examples were drawn."
    )


def _sampling(run: Run) -> tuple[str, ...]:
    last = run.releases[-1]
    return (
        f"In each step a silo draws each of its examples independently with probability "
        f"q = {last.sampling_rate:g}. Amplification by this sampling holds against those who do "
        "not know what was drawn.",
        f"{drawn_anew(run.sampling, 'silo')} Who was drawn is "
        "public, so no amplification is claimed for it; a silo that was drawn pays, whether or not "
        "it answered.",
    )


def _delta(run: Run) -> tuple[str, ...]:
    return (
        f"δ = {run.delta:g} holds for each silo alone and lies below one over its public number of "
        "examples.",
    )
