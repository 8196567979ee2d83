"""What a mechanism from outside must be for a ledger to charge what its noise is worth.

A ledger rebuilds the event of a release from the recorded numbers, using only fedpriv's own code
for the kind that they name. So who is drawn and who pays must be as that kind says, and the noise
must be Gaussian and at least as large as recorded. The first is checked here. The second cannot be:
`noise_trial.py` draws some noise and looks at it. Deliberately malicious code is not stopped.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedpriv.errors import InputError
from fedpriv.failures import told_as
from fedpriv.privacy.charging import charge
from fedpriv.privacy.ledger import Release
from fedpriv.privacy.mechanisms.base import Mechanism, NoiseSource
from fedpriv.privacy.mechanisms.correlated import CorrelatedMechanism
from fedpriv.privacy.mechanisms.gaussian import CentralMechanism, GaussianMechanism
from fedpriv.privacy.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor

# What only the kind decides, not a mechanism from outside: who is in a round and who pays.
_OF_THE_KIND = (
    "accounts",
    "accounts_of",
    "affordable",
    "as_begun",
    "asks_all_nodes",
    "charged",
    "cohort",
    "event_of",
    "groups",
    "in_sums",
    "matrix",
    "most_rounds",
    "needed",
    "paid",
    "payer",
    "payers",
    "sampling_of",
)
# Fields of the record that follow from the config and not from the mechanism.
_GIVEN = (
    "sampling",
    "adjacency",
    "population",
    "expected_cohort",
    "bound",
    "sensitivity",
    "counts",
    "payloads",
)


def told(mechanism: Mechanism) -> AbstractContextManager[None]:
    """Return what tells in one line whatever a mechanism of somebody's own raises in a body.

    What one of fedpriv's own raises is a fault of fedpriv, which is shown whole.
    """
    made = type(mechanism)
    if made.__module__.partition(".")[0] == "fedpriv":
        return nullcontext()
    return told_as(f"privacy.mechanism: {made.__name__} fails")


@dataclass(frozen=True)
class ToldSource:
    """Noise of a mechanism of somebody's own, of which whatever it raises is told in one line."""

    source: NoiseSource
    mechanism: Mechanism

    def draw(self, round_: int, attempt: int, gaussian: GaussianMechanism) -> Tensor:
        """Return the noise at (round, attempt).

        Raises:
            InputError: the code from outside failed.
        """
        with told(self.mechanism):
            return self.source.draw(round_, attempt, gaussian)


def require_recorded(mechanism: Mechanism, sampling: Sampling, gaussian: GaussianMechanism) -> None:
    """Check that a ledger charges what a mechanism of somebody's own says that it costs.

    `sampling` and `gaussian` are what it was made with.

    Raises:
        InputError: the ledger would charge something else, or somebody else.
    """
    name = type(mechanism).__name__
    with told(mechanism):
        payers = mechanism.payers(1, np.zeros(0, dtype=np.int64))
        recorded, event = Release.of(1, 0, mechanism, "", payers), mechanism.event()
    if recorded.payers != payers:
        raise InputError(
            f"privacy.mechanism: {name} does not record who pays, as CorrelatedMechanism records "
            "a group"
        )
    charged, claimed = (
        charge({event: 1}, mechanism.adjacency, [1e-6], ("rdp",)).first.epsilon
        for event in (recorded.event(), event)
    )
    if charged < claimed or not math.isclose(charged, claimed, rel_tol=1e-6):
        raise InputError(
            f"privacy.mechanism: {name} says that a round costs ε = {claimed:.6g}, but what it "
            f"records costs {charged:.6g} (at δ = 1e-6): record and event must agree"
        )
    _require_its_kind(mechanism, recorded, sampling, gaussian)


def _require_its_kind(
    mechanism: Mechanism, recorded: Release, sampling: Sampling, gaussian: GaussianMechanism
) -> None:
    """Check that it takes part and pays as the kind does by whose code its ledger is read.

    Raises:
        InputError: it does not, or is recorded with other bounds or samples than it was given.
    """
    name, kind = type(mechanism).__name__, recorded.mechanism
    if not isinstance(mechanism, CentralMechanism | CorrelatedMechanism):
        raise InputError(
            f"privacy.mechanism: {name} extends neither CentralMechanism nor CorrelatedMechanism, "
            "by whose rules its ledger is read; extend one of them and override noise alone"
        )
    other = next(
        (e for e in _OF_THE_KIND if hasattr(kind, e) and not _same(type(mechanism), kind, e)),
        None if dict(mechanism.header) == dict(kind.header) else "header",
    )
    if other is not None or not isinstance(mechanism, kind):
        raise InputError(
            f"privacy.mechanism: {name} overrides {other or 'record'}, but its ledger is read by "
            f"the rules of {kind.__name__}, which decides who is drawn and who pays; a mechanism "
            "from outside may only change how the server's noise is drawn"
        )
    given = kind.record(mechanism, recorded.payers)
    changed = [each for each in _GIVEN if getattr(recorded, each) != given[each]]
    if changed or mechanism.sampling != sampling or mechanism.gaussian != gaussian:
        raise InputError(
            f"privacy.mechanism: {name} records or draws with another "
            f"{changed[0] if changed else 'sampling or bound'} than the config's"
        )


def _same(mechanism: type[Mechanism], kind: type[Mechanism], name: str) -> bool:
    one, other = getattr(mechanism, name), getattr(kind, name)
    return bool(getattr(one, "__func__", one) == getattr(other, "__func__", other))
