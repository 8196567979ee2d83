"""The algorithms by name: a new one is a file with a class, and one line in `ALGORITHMS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

from pydantic import Field

from fedpriv.components import Kind, Options

if TYPE_CHECKING:  # configs are checked where torch is not imported
    from fedpriv.algorithms.base import Algorithm


class AlgorithmOptions(Options):
    """What users compute, keep and send, and what the server does with it."""

    name: str = Field(
        default="fedavg",
        description="name of the algorithm, or package.module:object for your own",
    )
    bounds: dict[str, Annotated[float, Field(ge=1e-20, le=1e20)]] = Field(
        default={},
        description="Largest L2 norm of each payload beside the update, by name; of scaffold's "
        "control it is about the update's, divided by local steps times local.lr.",
    )


ALGORITHMS = Kind(
    key="algorithm",
    noun="algorithm",
    registered={
        "fedavg": "fedpriv.algorithms.fedavg:FedAvg",
        "fedavg_m": "fedpriv.algorithms.fedavg_m:FedAvgM",
        "fedcompass": "fedpriv.algorithms.fedcompass:FedCompass",
        "fednova": "fedpriv.algorithms.fednova:FedNova",
        "fedprox": "fedpriv.algorithms.fedprox:FedProx",
        "fedspeed": "fedpriv.algorithms.fedspeed:FedSpeed",
        "hidenseek": "fedpriv.algorithms.hidenseek:HideNseek",
        "hierarchical": "fedpriv.algorithms.hierarchical:Hierarchical",
        "ofvl_ms": "fedpriv.algorithms.ofvl_ms:OfvlMs",
        "scaffold": "fedpriv.algorithms.scaffold:Scaffold",
        "scaffold_m": "fedpriv.algorithms.scaffold_m:ScaffoldM",
    },
    base="fedpriv.algorithms.registry:AlgorithmOptions",
    group="fedpriv.algorithms",
    default="fedavg",
)


def make_algorithm(options: AlgorithmOptions) -> Algorithm:
    """Return the algorithm that `options` are of.

    Raises:
        InputError: it cannot be made so.
    """
    component = ALGORITHMS.of(options)
    if component.origin is None:
        return cast("Algorithm", component.build(options))
    from fedpriv.algorithms.outside import OutsideAlgorithm

    return OutsideAlgorithm(component.name, lambda: cast("Algorithm", component.build(options)))


def cited(options: AlgorithmOptions) -> str:
    """Return what statements call the algorithm."""
    found = ALGORITHMS.of(options)
    return cast(str, getattr(found.make, "cite", None) or found.told())
