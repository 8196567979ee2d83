"""For an app of Flower's own: user-level privacy by changing a few lines of it.

On the server the app's strategy is wrapped, on the client a mod is added:

    from fedpriv.flower import PrivateStrategy, clipping_mod

    strategy = PrivateStrategy(FedAdam(), population=100, run_dir="runs/mine", privacy={...})
    app = ClientApp(mods=[clipping_mod])

`PrivacyAccountant` is for who stays with Flower's own wrappers.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["PrivacyAccountant", "PrivateStrategy", "clipping_mod"]

if TYPE_CHECKING:
    from fedpriv.federation.clipping_mod import clipping_mod
    from fedpriv.flower.accountant import PrivacyAccountant
    from fedpriv.flower.strategy import PrivateStrategy


def __getattr__(name: str) -> Any:
    """Import what is asked for alone: a client process starts anew for each message."""
    if name == "clipping_mod":
        from fedpriv.federation.clipping_mod import clipping_mod

        return clipping_mod
    if name == "PrivateStrategy":
        from fedpriv.flower.strategy import PrivateStrategy

        return PrivateStrategy
    if name == "PrivacyAccountant":
        from fedpriv.flower.accountant import PrivacyAccountant

        return PrivacyAccountant
    raise AttributeError(f"module 'fedpriv.flower' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what is public."""
    return __all__
