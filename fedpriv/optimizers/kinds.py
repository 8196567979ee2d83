"""Server optimizers from outside; those of the two libraries are in the registry."""

from fedpriv.components import Kind

OPTIMIZERS = Kind(
    key="server.optimizer",
    noun="optimizer",
    registered={},
    base="fedpriv.components:Options",
    facts=("params", "lr"),
    group="fedpriv.optimizers",
)
