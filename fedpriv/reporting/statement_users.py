"""What a privacy statement says of what users send beside an update, and of what they keep."""

from __future__ import annotations

from fedpriv.algorithms.registry import cited, make_algorithm
from fedpriv.reporting.reader import Run


def sent_and_kept(run: Run) -> tuple[str, ...]:
    """Return the sentences on error feedback, and on the run's algorithm."""
    return (*_error_feedback(run), *_payloads(run))


def _error_feedback(run: Run) -> tuple[str, ...]:
    feedback = run.config.privacy.error_feedback if run.config.privacy else None
    if feedback is None or feedback.kind == "none":
        return ()
    if feedback.kind != "user":
        raise ValueError(f"no sentence for privacy.error_feedback.kind: {feedback.kind}")
    how = {"remainder": "update and memory as one", "dice": "each alone, C being both bounds' sum"}
    return (
        "Error feedback: each user keeps what clipping cut off and adds it when it takes part "
        f"again, clipped ({how[feedback.variant]}), so C holds whatever is kept. The memory is "
        "never released, and costs nothing under this sampling (docs/privacy.md).",
    )


def _payloads(run: Run) -> tuple[str, ...]:
    """Return what is said of users who send more than an update, or keep something for it."""
    payloads, options = run.releases[-1].payloads, run.config.algorithm
    # For a report no code from outside is imported.
    called = options.name if options.unread else cited(options)
    called = called[:1].upper() + called[1:] if called.startswith("after ") else called
    said = []
    if payloads is not None:
        more = ", ".join(name for name, _, _ in payloads[1:])
        each = ", ".join(f"{name} with C = {b:.4g} and σ = {s:.4g}" for name, b, s in payloads)
        said.append(
            f"{called}: each user sends more than an update ({more}). Each payload is "
            f"clipped and gets noise of its own ({each}); C is the bound on all of them, and z "
            "that of their one release."
        )
    if options.unread:
        said.append(
            f"{called} came from outside: whether its users keep something between rounds was "
            "checked when the run began, and is not checked here."
        )
        return tuple(said)
    algorithm = make_algorithm(options)
    if algorithm.keeps:
        said.append(
            f"{called}: what a user keeps for it between rounds never leaves it and costs "
            "nothing under this sampling (docs/privacy.md)."
        )
    if algorithm.slots > 1:
        said.append(_sums_apart(options.name, called, algorithm.slots))
    if algorithm.scheduled:
        said.append(
            f"{called}: a silo begins with the model as it was when it last sent, and what it "
            "sends is weighted by how old that model has become: post-processing, by public "
            "numbers (docs/privacy.md)."
        )
    return tuple(said)


def _sums_apart(name: str, called: str, slots: int) -> str:
    """Return what is said of users who add to one of several sums: see `Algorithm.slots`."""
    return {
        "hierarchical": (
            f"{called}: each user is in one of {slots} edges, by a public hash of its id. The sums "
            "of all edges are one release: a user adds to the sum of its own edge alone, so that C "
            f"bounds what it adds to all of them. An edge's sum is divided by 1/{slots} of the "
            "expected cohort (docs/privacy.md)."
        ),
        "ofvl_ms": (
            f"{called}: each user is in one of {slots} tasks, by patterns of ids that config.yaml "
            "has: which task a user is in is taken to be public. The sums of all tasks are one "
            "release: a user adds to the sum of its own task alone, so that C bounds what it adds "
            "to all of them. That tasks then count alike is post-processing (docs/privacy.md)."
        ),
    }[name]
