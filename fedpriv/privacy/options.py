"""What a config says of privacy, and which combinations have a proof."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedpriv.components import Slot
from fedpriv.privacy.clipping import GlobalClipping
from fedpriv.privacy.clipping_rules import CLIPPING, AdaptiveOptions, ClippingOptions
from fedpriv.privacy.error_feedback import ErrorFeedbackConfig
from fedpriv.privacy.example_level import ExampleConfig, ExampleLevel
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.privacy.mechanisms.options import (
    SERVER_NOISE,
    MechanismOptions,
    require_class,
    unproven_with,
)
from fedpriv.privacy.sampling import Adjacency, build_sampling
from fedpriv.privacy.sampling_options import SAMPLINGS, SamplingOptions
from fedpriv.sections import Positive, Section


class BudgetConfig(Section):
    """Where the run must stop."""

    epsilon: Positive | None = Field(
        default=None, description="The round that would exceed this ε is not run; null: no budget."
    )


class PrivacyConfig(Section):
    """Differential privacy for users, or for examples within silos."""

    unit: Literal["user", "example"] = Field(
        default="user",
        description="user: one user's whole data, noise at the server; example: one example of a "
        "silo (each user of the data set is one, such as a hospital), by DP-SGD inside it.",
    )
    example: ExampleConfig | None = Field(
        default=None, description="What unit: example needs; null with unit: user."
    )
    delta: Annotated[float, Field(ge=1e-300, lt=1)] = Field(
        description="δ at which ε is reported; must be below 1/population, with unit: example "
        "below 1/N of a silo's examples."
    )
    noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="z: noise standard deviation on the sum, divided by the clip bound C; with "
        "unit: example on the sum of each local step.",
    )
    target_epsilon: Positive | None = Field(
        default=None,
        description="Instead of noise_multiplier: calibrate z so that all rounds cost this; with "
        "unit: example for a silo that takes part in every round.",
    )
    adjacency: Literal["add_or_remove_one", "replace_one", "zero_out"] | None = Field(
        default=None,
        description="Which two populations must be hard to tell apart; null: add_or_remove_one "
        "where data.users says how many users there are, zero_out where the data say it, "
        "replace_one with fixed_size sampling.",
    )
    sampling: Annotated[SamplingOptions, Slot(SAMPLINGS)] = Field(
        description="How a round's cohort is drawn."
    )
    clipping: Annotated[ClippingOptions, Slot(CLIPPING)] = Field(
        description="How a user's contribution is bounded, with options of the rule's own."
    )
    error_feedback: ErrorFeedbackConfig = ErrorFeedbackConfig()
    noise: Literal["spherical", "per_block"] = Field(
        default="spherical",
        description="spherical: the same noise everywhere; per_block: in proportion to each "
        "tensor's own bound, at the same cost.",
    )
    noise_by: Literal["server", "nodes", "users"] = Field(
        default="server",
        description="unit: user. server: the noise is added once, to the sum; nodes: each node "
        "adds a share of it, for where nobody sees more than the nodes' sum; users: each adds all "
        "of it to its own contribution (local differential privacy).",
    )
    mechanism: Annotated[MechanismOptions, Slot(SERVER_NOISE)] = Field(
        default={}, validate_default=True, description="noise_by: server: how noise is made."
    )
    lost_nodes: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="noise_by: nodes: how many nodes may fail in a round; the shares of the others "
        "have the full noise. Where more fail, noise alone is released.",
    )
    accountants: tuple[Literal["rdp", "pld"], ...] = Field(
        default=("rdp", "pld"),
        min_length=1,
        description="rdp: every round; pld: tighter, at evaluations. target_epsilon and budget are "
        "held against the smallest ε that one of them proves. pld has a proof for Poisson sampling "
        "and for everybody in every round, not for fixed_size.",
    )
    budget: BudgetConfig = BudgetConfig()

    @model_validator(mode="after")
    def _noise_is_given_once(self) -> PrivacyConfig:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("write exactly one of noise_multiplier and target_epsilon")
        if self.noise_multiplier and not 1e-6 <= self.noise_multiplier <= 1e6:
            raise ValueError("noise_multiplier must be 0 (no privacy) or from 1e-6 to 1e6")
        if self.unit == "user" and self.noise_by != "users":
            _check_adjacency(self.sampling.kind, self.adjacency)
        if self.noise == "per_block" and not self.clipping.bounds_each_block:
            raise ValueError(
                "noise: per_block has no proof unless every tensor is bounded on its own: write "
                "clipping.kind: per_layer without normalize and undo, or adaptive with adapts: "
                "per_layer"
            )
        if "rdp" not in self.accountants:
            raise ValueError("accountants must include rdp, which has a proof for every event")
        return self

    @model_validator(mode="after")
    def _example_goes_with_unit(self) -> PrivacyConfig:
        if (self.unit == "example") != (self.example is not None):
            raise ValueError(
                "unit: example and the section example go together: write example.sampling_rate "
                "and example.silo_size, or unit: user without example"
            )
        if self.example is None:
            return self
        if (
            isinstance(self.clipping, AdaptiveOptions)
            and self.clipping.count_noise is None
            and self.example.silo_size is None
        ):
            raise ValueError(
                "clipping.count_noise is needed where silos have sizes of their own and "
                "clipping.kind is adaptive: its default follows example.silo_size; write either"
            )
        if self.error_feedback.kind != "none":
            raise ValueError(
                "error_feedback: user keeps what a user's clipping cut off; a silo would keep that "
                "of all its examples, which costs privacy: write none with unit: example"
            )
        mechanism = GaussianMechanism(1.0, GlobalClipping(self.clipping.bound))
        adjacency = Adjacency(self.adjacency or "add_or_remove_one")
        # Its own checks give the reasons.
        ExampleLevel(mechanism, self.example.sampling_rate, 1, adjacency, self.example.silo_size)
        return self

    @model_validator(mode="after")
    def _noise_is_added_where_it_can_be(self) -> PrivacyConfig:
        if self.lost_nodes and self.noise_by != "nodes":
            raise ValueError("lost_nodes goes with noise_by: nodes only")
        if self.noise_by == "server":
            return self
        if self.unit == "example":
            raise ValueError(
                f"noise_by: {self.noise_by} goes with unit: user: with unit: example silos add "
                "noise of their own in every step; remove noise_by"
            )
        if self.clipping.kind == "adaptive":
            raise ValueError(
                "clipping.kind: adaptive counts users within their bound, and the noise on these "
                f"counts is the server's: write global or per_layer with noise_by: {self.noise_by}"
            )
        if self.noise_by == "users":
            self._check_local()
        return self

    @model_validator(mode="after")
    def _multipliers_can_be_undone(self) -> PrivacyConfig:
        if self.clipping.undoes and (self.unit == "example" or self.error_feedback.kind != "none"):
            raise ValueError(
                "clipping.undo divides what a user sends by the multipliers of its learning rates; "
                "the gradients of examples are not multiplied by them, and what error_feedback "
                "keeps of an update is not divided: write undo: false"
            )
        return self

    @model_validator(mode="after")
    def _mechanism_has_a_proof(self) -> PrivacyConfig:
        if self.sampling.kind == "min_separation" and self.mechanism.kind == "independent":
            raise ValueError(
                "sampling.kind: min_separation goes with mechanism.kind: correlated, which charges "
                "each group for its own rounds; write mechanism: {kind: correlated, bands: 1} for "
                "noise that is drawn anew in each round"
            )
        if self.sampling.kind == "random_allocation":
            self._check_allocation()
        if self.mechanism.kind == "independent" or self.mechanism.unread:
            return self
        require_class(self.mechanism)
        unproven = partial(unproven_with, self.mechanism)
        refused = {
            "unit: example": self.unit == "example",
            f"noise_by: {self.noise_by}": self.noise_by != "server",
            f"sampling.kind: {self.sampling.kind}": unproven(self.sampling.kind),
            "clipping.kind: adaptive": self.clipping.kind == "adaptive" and unproven("adaptive"),
            "error_feedback: user": self.error_feedback.kind != "none" and unproven("memories"),
        }
        for written, found in refused.items():
            if found:
                raise ValueError(
                    f"mechanism.kind: {self.mechanism.kind} has no proof with {written}; write "
                    "mechanism: {kind: independent}"
                )
        return self

    def _check_allocation(self) -> None:
        refused = {
            "unit: example": (self.unit == "example", "silos pay for the rounds that draw them"),
            f"noise_by: {self.noise_by}": (
                self.noise_by != "server",
                "its blocks of rounds are charged for noise that the server adds",
            ),
            f"mechanism.kind: {self.mechanism.kind}": (
                self.mechanism.kind != "independent",
                "its proof takes the noise of each round to be drawn anew",
            ),
            "error_feedback: user": (
                self.error_feedback.kind != "none",
                "a memory carries into a block in which round a user was before, for which nobody "
                "has written a proof down",
            ),
        }
        for written, (found, reason) in refused.items():
            if found:
                raise ValueError(
                    f"sampling.kind: random_allocation has no proof with {written}: {reason}; "
                    "write sampling.kind: poisson"
                )

    def _check_local(self) -> None:
        if self.error_feedback.kind != "none":
            raise ValueError(
                "error_feedback: user makes a message depend on all earlier rounds of its user, "
                "for which local noise has no proof here; write none with noise_by: users"
            )
        if self.adjacency not in (None, "replace_one"):
            raise ValueError(
                f"adjacency: {self.adjacency} does not go with noise_by: users: that a user takes "
                "part is no secret from whoever receives its message; write replace_one"
            )

    @model_validator(mode="after")
    def _error_feedback_has_a_proof(self) -> PrivacyConfig:
        if self.error_feedback.kind == "none":
            return self
        if self.sampling.kind == "fixed_size":
            raise ValueError(
                "error_feedback: user has no proof with fixed_size sampling, where who else is "
                "sampled depends on a user's own past, which its memory carries on; write "
                "sampling.kind: poisson, or error_feedback: none"
            )
        if self.error_feedback.variant == "dice" and self.clipping.kind == "adaptive":
            raise ValueError(
                "error_feedback: dice has two bounds, and clipping.kind: adaptive counts users "
                "within one; write error_feedback: user, or clipping.kind: per_layer"
            )
        return self


def _check_adjacency(kind: str, adjacency: str | None) -> None:
    """Raise ValueError, with the reason, where the pair has no proof."""
    build_sampling(kind, 1, 1, Adjacency(adjacency) if adjacency else None, separation=1)
