"""fedpriv: a simulator of differentially private federated learning.

From Python: `fedpriv.Experiment`, `fedpriv.Run`, `fedpriv.compare`, `fedpriv.sweep`,
`fedpriv.tune`; see `fedpriv.api` and `fedpriv.tuning`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Experiment", "Run", "__version__", "compare", "sweep", "tune"]

if TYPE_CHECKING:
    from fedpriv.api import Experiment, Run, compare, sweep
    from fedpriv.tuning import tune


def __getattr__(name: str) -> Any:
    """Import the interface when it is first asked for: it takes seconds."""
    if name in __all__:
        from fedpriv import api, tuning

        return getattr(tuning if name == "tune" else api, name)
    raise AttributeError(f"module 'fedpriv' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what is public."""
    return __all__
