"""What a config says of local training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedpriv.components import Slot
from fedpriv.optimizers.local import LOCAL_OPTIMIZERS, LocalOptimizerOptions
from fedpriv.optimizers.schedules import LocalScheduleConfig
from fedpriv.sections import Positive, Rate, Section
from fedpriv.tasks.spec_augment import SpecAugmentConfig

#: In what matrix products are taken.
Precision = Literal["float32", "tf32", "bfloat16"]


class LocalConfig(Section):
    """What one user does with the parameters it receives."""

    epochs: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Passes over the user's examples; ignored where `steps` is set."
    )
    steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Local steps a user takes, cycling over its examples."
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=10,
        description="Examples a local step; with privacy.unit: example those whose gradients are "
        "taken at once, which bounds memory and changes nothing else.",
    )
    batch_seconds: Positive | None = Field(
        default=None,
        description="Speech: a step takes fewer examples where their number times the longest "
        "would exceed this duration (seconds); null: batch_size alone decides.",
    )
    order: Literal["shuffled", "by_length"] = Field(
        default="shuffled",
        description="shuffled: examples meet at random; by_length: those of like length share a "
        "step, which saves padding; steps come in an order drawn for each round, alike for all.",
    )
    optimizer: Annotated[LocalOptimizerOptions, Slot(LOCAL_OPTIMIZERS, later=True)] = Field(
        default={},
        validate_default=True,
        description="Local optimizer, with options of its own; what it remembers is a user's, of "
        "one round.",
    )
    lr: Rate = Field(default=0.1, description="Local learning rate, before the schedule.")
    multipliers: dict[str, Annotated[float, Field(ge=1e-6, le=1e6)]] = Field(
        default={},
        description="What the learning rate of single parameters is multiplied by, by pattern of "
        "their names, e.g. {'head.*': 10}; where several match, by all.",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="By what the learning rate falls from each numbered layer to the one before "
        "it, from the head down to the embedding; null: not at all.",
    )
    schedule: LocalScheduleConfig = Field(
        default_factory=LocalScheduleConfig,
        description="Learning rate by step of a user's round; each round begins anew.",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Momentum of optimizer sgd."
    )
    max_grad_norm: Positive | None = Field(
        default=None, description="L2 norm to which each local gradient is clipped; null for none."
    )
    proximal_mu: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0,
        description="FedProx (Li et al. 2020): weight μ of μ/2·‖θ − θ_start‖² in the loss.",
    )
    precision: Precision = Field(
        default="float32",
        description="In what matrix products are taken: float32; tf32, on GPUs that have it; or "
        "bfloat16 (automatic mixed precision). Steps, clipping and sums are not rounded.",
    )
    spec_augment: SpecAugmentConfig | None = Field(
        default=None, description="Masking of features, for speech; null for none."
    )

    @model_validator(mode="after")
    def _momentum_is_that_of_sgd(self) -> LocalConfig:
        if self.momentum and self.optimizer.name != "sgd":
            raise ValueError(
                f"momentum is that of optimizer sgd, and {self.optimizer.name} has options of its "
                "own: leave momentum out"
            )
        return self
