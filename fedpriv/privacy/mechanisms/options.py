"""How configs name the mechanism of noise that the server adds, one of your own among them."""

from __future__ import annotations

from pydantic import Field

from fedpriv.components import Kind, Options
from fedpriv.privacy.mechanisms.base import Mechanism


class MechanismOptions(Options):
    """How the noise that the server adds in one round goes with that of other rounds."""

    kind: str = Field(
        default="independent",
        description="independent: each round's noise is drawn anew; correlated: later rounds take "
        "back part of it, and each round draws from one of `bands` groups of users; or "
        "package.module:object for your own.",
    )


#: Mechanisms of noise by the server. A config chooses the others by `unit` and `noise_by`.
SERVER_NOISE = Kind(
    key="privacy.mechanism",
    noun="mechanism",
    registered={
        "independent": "fedpriv.privacy.mechanisms.gaussian:CentralMechanism",
        "correlated": "fedpriv.privacy.mechanisms.correlated:CorrelatedMechanism",
    },
    base="fedpriv.privacy.mechanisms.options:MechanismOptions",
    facts=("sampling", "gaussian", "user_ids", "workload", "begun_with"),
    group="fedpriv.mechanisms",
    name_key="kind",
    default="independent",
)


def require_class(options: MechanismOptions) -> None:
    """Check that the mechanism of a config is the class of one.

    Raises:
        ValueError: it is something else.
    """
    found = SERVER_NOISE.of(options).make
    if not (isinstance(found, type) and issubclass(found, Mechanism)):
        raise ValueError(
            f"mechanism.kind: {options.kind} is not a Mechanism: write a class that extends "
            "CentralMechanism (fedpriv.privacy.mechanisms.gaussian)"
        )


def unproven_with(options: MechanismOptions, what: str) -> bool:
    """Say whether the mechanism has no proof with a sampling, or with a name of `proven_with`."""
    found = SERVER_NOISE.of(options).make
    return what not in {*getattr(found, "samplings", ()), *getattr(found, "proven_with", ())}
