"""The server's step: optimizers by name, learning-rate schedules, layer-wise normalisation."""

from fedpriv.optimizers.normalize import NORMALIZERS, layer_norm_l2, normalizer
from fedpriv.optimizers.registry import (
    STATE_TYPES,
    UNSUITABLE,
    available_optimizers,
    optimizer_options,
    server_optimizer,
)
from fedpriv.optimizers.schedules import ScheduleConfig, factor, scale_learning_rates

__all__ = [
    "NORMALIZERS",
    "STATE_TYPES",
    "UNSUITABLE",
    "ScheduleConfig",
    "available_optimizers",
    "factor",
    "layer_norm_l2",
    "normalizer",
    "optimizer_options",
    "scale_learning_rates",
    "server_optimizer",
]
