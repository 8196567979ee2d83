"""Pure privacy: clipping, mechanisms, sampling, accounting and the ledger.

Nothing here imports Flower, Ray or a model, so the accountants can be used alone. What needs an
accountant is imported when it is asked for: training does not, and starts a second earlier.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpriv.privacy.accounting import ACCOUNTANTS, Accountant, PldAccountant, RdpAccountant
    from fedpriv.privacy.accounts import PayerAccounts, PayerCosts, most_charged
    from fedpriv.privacy.calibration import noise_multiplier_for
    from fedpriv.privacy.charging import Bill, Budget, Cost, affordable, charge
    from fedpriv.privacy.clipping import (
        SPLITS,
        AdaptiveBounds,
        ClippedUpdate,
        ClippingRule,
        GlobalClipping,
        PayloadClipping,
        PerLayerClipping,
        Unclipped,
        clip,
        clip_and_sum,
        with_bounds,
    )
    from fedpriv.privacy.error_feedback import Dice, ErrorFeedback, Remainder, feed_back
    from fedpriv.privacy.example_level import ExampleLevel
    from fedpriv.privacy.factorizations import Workload
    from fedpriv.privacy.ledger import Header, Ledger, LedgerFile, Release, read_ledger
    from fedpriv.privacy.mechanisms.base import Mechanism
    from fedpriv.privacy.mechanisms.correlated import CorrelatedMechanism
    from fedpriv.privacy.mechanisms.gaussian import (
        CentralMechanism,
        CountNoise,
        GaussianMechanism,
    )
    from fedpriv.privacy.mechanisms.local import LocalMechanism, UsersNoise
    from fedpriv.privacy.mechanisms.registry import MECHANISMS
    from fedpriv.privacy.mechanisms.shares import (
        NodeShare,
        NoiseShares,
        SharedMechanism,
        multiplier_against_a_node,
    )
    from fedpriv.privacy.mechanisms.silos import SiloMechanism
    from fedpriv.privacy.randomness import Purpose, Randomness
    from fedpriv.privacy.sampling import (
        Adjacency,
        FixedSizeSampling,
        FullParticipation,
        MinSeparationSampling,
        PoissonSampling,
        Sampling,
        build_sampling,
    )

__all__ = [
    "ACCOUNTANTS",
    "MECHANISMS",
    "SPLITS",
    "Accountant",
    "AdaptiveBounds",
    "Adjacency",
    "Bill",
    "Budget",
    "CentralMechanism",
    "ClippedUpdate",
    "ClippingRule",
    "CorrelatedMechanism",
    "Cost",
    "CountNoise",
    "Dice",
    "ErrorFeedback",
    "ExampleLevel",
    "FixedSizeSampling",
    "FullParticipation",
    "GaussianMechanism",
    "GlobalClipping",
    "Header",
    "Ledger",
    "LedgerFile",
    "LocalMechanism",
    "Mechanism",
    "MinSeparationSampling",
    "NodeShare",
    "NoiseShares",
    "PayerAccounts",
    "PayerCosts",
    "PayloadClipping",
    "PerLayerClipping",
    "PldAccountant",
    "PoissonSampling",
    "Purpose",
    "Randomness",
    "RdpAccountant",
    "Release",
    "Remainder",
    "Sampling",
    "SharedMechanism",
    "SiloMechanism",
    "Unclipped",
    "UsersNoise",
    "Workload",
    "affordable",
    "build_sampling",
    "charge",
    "clip",
    "clip_and_sum",
    "feed_back",
    "most_charged",
    "multiplier_against_a_node",
    "noise_multiplier_for",
    "read_ledger",
    "with_bounds",
]

# Those that need no accountant come first.
_MODULES = (
    "clipping",
    "error_feedback",
    "example_level",
    "factorizations",
    "mechanisms.base",
    "mechanisms.correlated",
    "mechanisms.gaussian",
    "mechanisms.local",
    "mechanisms.registry",
    "mechanisms.shares",
    "mechanisms.silos",
    "randomness",
    "sampling",
    "accounting",
    "calibration",
    "charging",
    "ledger",
    "accounts",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
