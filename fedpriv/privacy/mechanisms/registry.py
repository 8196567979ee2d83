"""The mechanisms by name, and which one a ledger is of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpriv.privacy.mechanisms.allocated import AllocatedMechanism
from fedpriv.privacy.mechanisms.base import Mechanism
from fedpriv.privacy.mechanisms.correlated import CorrelatedMechanism
from fedpriv.privacy.mechanisms.gaussian import CentralMechanism
from fedpriv.privacy.mechanisms.local import LocalMechanism
from fedpriv.privacy.mechanisms.scheduled import ScheduledSilos
from fedpriv.privacy.mechanisms.shares import SharedMechanism
from fedpriv.privacy.mechanisms.silos import SiloMechanism

if TYPE_CHECKING:
    from fedpriv.privacy.ledger import Header

#: Each kind of mechanism by its name in ledgers.
MECHANISMS: dict[str, type[Mechanism]] = {
    each.kind: each
    for each in (
        CentralMechanism,
        SharedMechanism,
        LocalMechanism,
        SiloMechanism,
        ScheduledSilos,
        CorrelatedMechanism,
        AllocatedMechanism,
    )
}


def mechanism_of(header: Header) -> type[Mechanism]:
    """Return the kind of mechanism of a ledger's run.

    Raises:
        ValueError: the header says of units and noise what no mechanism does.
    """
    for mechanism in MECHANISMS.values():
        if all(getattr(header, name) == said for name, said in mechanism.header.items()):
            return mechanism
    raise ValueError(f"no mechanism has noise by {header.noise_by} and unit {header.unit}")
