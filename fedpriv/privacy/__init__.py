"""Pure privacy: clipping, mechanisms, sampling, accounting and the ledger.

Nothing here imports Flower, Ray or a model, so the accountants can be used alone. What needs an
accountant is imported when it is asked for: training does not, and starts a second earlier.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpriv.privacy.accounting import ACCOUNTANTS, Accountant, PldAccountant, RdpAccountant
    from fedpriv.privacy.calibration import noise_multiplier_for
    from fedpriv.privacy.charging import Bill, Budget, Cost, affordable, charge
    from fedpriv.privacy.clipping import (
        SPLITS,
        AdaptiveBounds,
        ClippedUpdate,
        ClippingRule,
        GlobalClipping,
        PerLayerClipping,
        Unclipped,
        clip,
        with_bounds,
    )
    from fedpriv.privacy.error_feedback import Dice, ErrorFeedback, Remainder, feed_back
    from fedpriv.privacy.example_level import ExampleLevel
    from fedpriv.privacy.ledger import Header, Ledger, LedgerFile, Release, read_ledger
    from fedpriv.privacy.mechanisms import CountNoise, GaussianMechanism
    from fedpriv.privacy.noise_shares import NoiseShares, multiplier_against_a_node
    from fedpriv.privacy.randomness import Purpose, Randomness
    from fedpriv.privacy.sampling import (
        Adjacency,
        FixedSizeSampling,
        FullParticipation,
        PoissonSampling,
        Sampling,
        build_sampling,
    )
    from fedpriv.privacy.silos import SiloAccounts, SiloCosts, most_charged
    from fedpriv.privacy.user_noise import UserNoise

__all__ = [
    "ACCOUNTANTS",
    "SPLITS",
    "Accountant",
    "AdaptiveBounds",
    "Adjacency",
    "Bill",
    "Budget",
    "ClippedUpdate",
    "ClippingRule",
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
    "NoiseShares",
    "PerLayerClipping",
    "PldAccountant",
    "PoissonSampling",
    "Purpose",
    "Randomness",
    "RdpAccountant",
    "Release",
    "Remainder",
    "Sampling",
    "SiloAccounts",
    "SiloCosts",
    "Unclipped",
    "UserNoise",
    "affordable",
    "build_sampling",
    "charge",
    "clip",
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
    "mechanisms",
    "noise_shares",
    "randomness",
    "sampling",
    "user_noise",
    "accounting",
    "calibration",
    "charging",
    "ledger",
    "silos",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
