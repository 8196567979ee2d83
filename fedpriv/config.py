"""The experiment's schema: strict, typed, one place.

A config is YAML. `load_config` reads it, applies `key=value` overrides, and checks everything
that can be known without the data; `check_population` does the rest once N is known.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fedpriv import yaml_text
from fedpriv.algorithms.registry import ALGORITHMS, AlgorithmOptions, make_algorithm
from fedpriv.components import LookUp, Named, Slot, slots
from fedpriv.data.options import DataOptions
from fedpriv.data.registry import DATASETS
from fedpriv.errors import InputError
from fedpriv.models.options import ModelOptions
from fedpriv.models.registry import MODELS
from fedpriv.optimizers.kinds import OPTIMIZERS
from fedpriv.optimizers.schedules import ScheduleConfig
from fedpriv.optimizers.server import ServerConfig
from fedpriv.privacy.clipping import GlobalClipping
from fedpriv.privacy.clipping_rules import CLIPPING, AdaptiveOptions, ClippingOptions
from fedpriv.privacy.error_feedback import ErrorFeedbackConfig
from fedpriv.privacy.example_level import ExampleConfig, ExampleLevel
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.privacy.mechanisms.options import SERVER_NOISE, MechanismOptions, unproven_with
from fedpriv.privacy.sampling import Adjacency, build_sampling
from fedpriv.privacy.sampling_options import SAMPLINGS, SamplingOptions
from fedpriv.sections import NO_BEARING, KeptPath, Positive, Rate, Section, UserPath, kept_path
from fedpriv.tasks.registry import TASKS, TaskOptions
from fedpriv.tasks.spec_augment import SpecAugmentConfig
from fedpriv.training.local import Precision


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
    optimizer: Literal["sgd"] = Field(default="sgd", description="Local optimizer.")
    lr: Rate = Field(default=0.1, description="Local learning rate.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Local SGD momentum."
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
                "clipping.kind: per_layer without normalize, or adaptive with adapts: per_layer"
            )
        if "rdp" not in self.accountants:
            raise ValueError("accountants must include rdp, which has a proof for every event")
        return self

    @model_validator(mode="after")
    def _example_goes_with_unit(self) -> PrivacyConfig:
        if (self.unit == "example") != (self.example is not None):
            raise ValueError(
                "unit: example and the section example go together: write example.sampling_rate, "
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
    def _mechanism_has_a_proof(self) -> PrivacyConfig:
        if self.mechanism.kind == "independent" or self.mechanism.unread:
            return self
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


class RuntimeConfig(Section):
    """Where and how the run is carried out."""

    grid: Annotated[Literal["ray", "local"], NO_BEARING] = Field(
        default="ray",
        description="ray: each node is a Ray actor; local: nodes answer one after another in this "
        "process. The results are the same. A deployment has Flower's own grid.",
    )
    workers: Annotated[int, Field(ge=1), NO_BEARING] = Field(
        default=2, description="Simulated nodes."
    )
    threads_per_worker: Annotated[int, Field(ge=1), NO_BEARING] = Field(
        default=1, description="Torch threads each."
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), NO_BEARING] = Field(
        default="auto", description="auto, cpu, cuda or cuda:n."
    )
    gpus_per_worker: Annotated[float, Field(ge=0), NO_BEARING] = Field(
        default=0.0, description="Ray GPU share of a worker; 0.25 puts four workers on one GPU."
    )
    engine: Literal["stacked", "sequential"] = Field(
        default="stacked",
        description="stacked: many users in one forward and backward pass, where the model's "
        "layers allow it, and on a GPU nothing is dropped; sequential: one user after another. "
        "Equal up to rounding. A deployment is always sequential.",
    )
    stack: Annotated[int, Field(ge=1)] | Literal["measure"] | None = Field(
        default=None,
        description="stacked: users at once; null: chosen by the size of model and examples, the "
        "same in every run; measure: the fastest of a short trial at the start, written into the "
        "run's config, since the rounding of sums depends on it.",
    )
    stack_mib: Annotated[int, Field(ge=1), NO_BEARING] = Field(
        default=1024,
        description="stacked: memory for parameters and gradients of the users of a stack (MiB), "
        "which limits the number that is chosen.",
    )
    fast_products: bool = Field(
        default=True,
        description="On CPUs: multiply float32 matrices with oneDNN, where a check at the start "
        "finds that it keeps float32's exactness.",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="On GPUs: record the training of a stack whose shapes come again, and replay "
        "it, where users take equally many steps and nothing is drawn in the forward pass.",
    )
    cache_mib: Annotated[int, Field(ge=0), NO_BEARING] = Field(
        default=1024,
        description="Memory in which a worker keeps prepared users (MiB); 0 keeps none.",
    )
    ray_address: Annotated[str | None, NO_BEARING] = Field(
        default=None, description="An existing Ray cluster to join; null starts a private one."
    )
    profile: Annotated[bool, NO_BEARING] = Field(
        default=False,
        description="Record where the time goes: a table at the end, and trace.json for a trace "
        "viewer. The same as fedpriv run --profile.",
    )
    round_timeout: Annotated[Positive, NO_BEARING] = Field(
        default=3600.0,
        description="Seconds to wait for nodes in a round; a late node is a dropout.",
    )
    deployment: bool = Field(
        default=False,
        description="Nodes host users of their own, and sampling and noise are seeded from the "
        "operating system instead of `seed`.",
    )

    @model_validator(mode="after")
    def _gpus_are_rays_to_give(self) -> RuntimeConfig:
        share = self.gpus_per_worker
        if share > 1 and share != int(share):
            raise ValueError(f"gpus_per_worker: above 1 only whole GPUs can be given, got {share}")
        if share and self.device.startswith("cuda:"):
            raise ValueError(
                "device: with gpus_per_worker a worker sees no GPU but its own, got "
                f"{self.device}; write cuda"
            )
        if self.grid == "local" and (share or self.ray_address):
            key = "gpus_per_worker" if share else "ray_address"
            raise ValueError(f"{key}: belongs to Ray, and grid: local does without; write one")
        return self


class PretrainConfig(Section):
    """A central training on the data set's public part, without privacy, before all rounds."""

    steps: Annotated[int, Field(ge=1)] = Field(description="Optimizer steps.")
    batch_size: Annotated[int, Field(ge=1)] = Field(default=16, description="Examples a step.")
    optimizer: Annotated[str, Named(OPTIMIZERS)] = Field(
        default="adamw", description="As for server.optimizer."
    )
    lr: Rate = Field(default=0.001, description="Learning rate, before the schedule.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the optimizer, e.g. betas."
    )
    schedule: ScheduleConfig = Field(
        default_factory=ScheduleConfig, description="Learning rate by step; rounds mean steps."
    )
    max_grad_norm: Positive | None = Field(
        default=1.0, description="L2 norm to which each gradient is clipped; null for none."
    )
    spec_augment: SpecAugmentConfig | None = Field(
        default=None, description="Masking of features; from_round counts steps."
    )
    every: Annotated[int, Field(ge=1)] = Field(
        default=100, description="Steps between measurements and checkpoints."
    )


class SeedModelConfig(Section):
    """The model that the private training starts from, trained on public data alone."""

    path: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None,
        description="Its safetensors file; null: seed-<digest>.safetensors in runs/<name>, named "
        "after all that it depends on.",
    )
    sha256: str | None = Field(
        default=None,
        description="Digest of its numbers: another file is refused. A run fills it in.",
    )
    pretrain: Annotated[PretrainConfig | None, NO_BEARING] = Field(
        default=None, description="How to make the file where it is missing; null: it must exist."
    )

    @model_validator(mode="after")
    def _can_be_found(self) -> SeedModelConfig:
        if self.path is None and self.pretrain is None:
            raise ValueError("write path, an existing file, or pretrain, how to make one")
        return self


class EvaluationConfig(Section):
    """When the model is measured on the held-out examples."""

    every: Annotated[int, Field(ge=1)] = Field(default=5, description="Rounds between evaluations.")
    batch_size: Annotated[int, Field(ge=1)] = Field(default=500, description="Examples a batch.")
    decoder: Literal["greedy", "beam"] = Field(
        default="greedy",
        description="Speech: greedy, the best path; beam, the best prefixes (slow).",
    )
    beam: Annotated[int, Field(ge=1)] = Field(
        default=8, description="Speech, decoder beam: prefixes that are kept."
    )


class CheckpointConfig(Section):
    """What is kept to resume from."""

    keep: Annotated[int, Field(ge=1)] = Field(
        default=2, description="Newest checkpoints that are kept."
    )


class ExperimentConfig(Section):
    """One experiment, whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), NO_BEARING] = Field(
        description="Name of the experiment; its runs lie in runs/<name>/."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="Seed of everything."
    )
    rounds: Annotated[int, Field(ge=1)] = Field(description="Rounds of federated training.")
    run_dir: Annotated[UserPath | None, NO_BEARING] = Field(
        default=None, description="Default: runs/<name>/<time>."
    )
    cohort: Positive | None = Field(
        default=None,
        description="Expected users a round without privacy (`privacy: null`); null for all.",
    )
    data: Annotated[DataOptions, Slot(DATASETS)] = Field(
        default={}, validate_default=True, description="The users' data, with options of its own."
    )
    code: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None,
        description="Folder of modules that are not installed, from which components are named; "
        "null: the folder of this file.",
    )
    model: Annotated[ModelOptions, Slot(MODELS)] = Field(
        default={}, validate_default=True, description="The model, with options of its own."
    )
    task: Annotated[TaskOptions, Slot(TASKS)] = Field(
        default={}, validate_default=True, description="What is learnt, with options of its own."
    )
    seed_model: SeedModelConfig | None = Field(
        default=None, description="null starts from random parameters."
    )
    local: LocalConfig = LocalConfig()
    server: ServerConfig = ServerConfig()
    algorithm: Annotated[AlgorithmOptions, Slot(ALGORITHMS)] = Field(
        default={},
        validate_default=True,
        description="What users compute, keep and send, with options of its own.",
    )
    privacy: PrivacyConfig | None = Field(
        description="null trains without privacy, and every report says so."
    )
    runtime: RuntimeConfig = RuntimeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: Annotated[CheckpointConfig, NO_BEARING] = CheckpointConfig()

    @model_validator(mode="after")
    def _cohort_is_said_once(self) -> ExperimentConfig:
        if self.privacy is not None and self.cohort is not None:
            raise ValueError("cohort is for privacy: null; write privacy.sampling.expected_cohort")
        return self

    @model_validator(mode="after")
    def _memories_have_a_place(self) -> ExperimentConfig:
        deployed = self.privacy and self.runtime.deployment
        if self.privacy and deployed and unproven_with(self.privacy.mechanism, "deployment"):
            raise ValueError(
                f"privacy.mechanism.kind: {self.privacy.mechanism.kind} does not go with "
                "runtime.deployment, such as where the server does not know who users are; write "
                "mechanism: {kind: independent}"
            )
        feedback = self.privacy and self.privacy.error_feedback
        if feedback and feedback.kind == "user" and self.runtime.deployment:
            raise ValueError(
                "privacy.error_feedback: user keeps memories in the run directory of a simulation; "
                "a deployment's nodes have no store for them: write error_feedback: none"
            )
        if feedback and feedback.kind == "user" and self.runtime.ray_address:
            raise ValueError(
                "runtime.ray_address: privacy.error_feedback: user keeps memories in the run "
                "directory, which the other machines of a cluster do not see: write ray_address: "
                "null or error_feedback: none"
            )
        return self

    @model_validator(mode="after")
    def _algorithm_has_a_proof(self) -> ExperimentConfig:
        if self.algorithm.unread:  # it was checked when the run began
            return self
        algorithm, privacy = make_algorithm(self.algorithm), self.privacy
        if algorithm.keeps and self.runtime.deployment:
            raise ValueError(
                f"algorithm.name: {self.algorithm.name} has users keep something in the run "
                "directory of a simulation; a deployment's nodes have no store for it: write fedavg"
            )
        bounded = algorithm.payloads[1:] if privacy else ()
        if tuple(self.algorithm.bounds) != bounded:
            raise ValueError(
                f"algorithm.bounds: write a bound for each payload beside the update "
                f"({', '.join(bounded) or 'there are none'}), and for no other"
            )
        if privacy is None or not (bounded or algorithm.keeps or algorithm.shared):
            return self
        refused = {
            "unit: example": privacy.unit == "example",
            f"noise_by: {privacy.noise_by}": privacy.noise_by != "server",
            "sampling.kind: fixed_size": algorithm.keeps and privacy.sampling.kind == "fixed_size",
            "clipping.kind: adaptive": privacy.clipping.kind == "adaptive",
            "error_feedback: user": privacy.error_feedback.kind != "none",
            "mechanism.kind: correlated": privacy.mechanism.kind != "independent",
            "noise: per_block": privacy.noise != "spherical",
        }
        for written, found in refused.items():
            if found:
                raise ValueError(
                    f"algorithm.name: {self.algorithm.name} has no proof with privacy.{written}: "
                    "what users keep is free where each is drawn by a coin of its own, or "
                    "everybody is in every round, and payloads are one release of fixed bounds "
                    "with noise that the server adds; write algorithm.name: fedavg"
                )
        return self

    @model_validator(mode="after")
    def _silos_can_take_their_steps(self) -> ExperimentConfig:
        if self.privacy is None or self.privacy.unit != "example":
            return self
        if self.local.steps is None:
            raise ValueError(
                "local.steps is needed with privacy.unit: example: how many steps a silo takes "
                "must not depend on how many examples it has"
            )
        if self.local.precision == "bfloat16":
            raise ValueError(
                "local.precision: bfloat16 does not go with privacy.unit: example, whose gradients "
                "are bounded as they are written out, in float32; write float32"
            )
        for key in ("batch_seconds", "order", "max_grad_norm"):
            if getattr(self.local, key) != LocalConfig.model_fields[key].default:
                raise ValueError(
                    f"local.{key} does not go with privacy.unit: example, where every example is "
                    "sampled by a coin and its gradient is clipped alone; remove it"
                )
        if self.runtime.deployment:
            raise ValueError(
                "privacy.unit: example runs in a simulation only: in a deployment each silo must "
                "keep a ledger of its own, durably before it sends, and nodes have none; write "
                "runtime.deployment: false"
            )
        return self

    @model_validator(mode="after")
    def _one_example_decides_for_itself(self) -> ExperimentConfig:
        if self.privacy is None or self.privacy.unit != "example":
            return self
        for key, cap in self.data.caps().items():
            if cap is not None:
                raise ValueError(
                    f"data.{key} does not go with privacy.unit: example: one example more would "
                    "decide which others of its silo are kept; write null, and fewer local.steps "
                    "or a smaller privacy.example.sampling_rate"
                )
        return self

    @model_validator(mode="after")
    def _population_is_public(self) -> ExperimentConfig:
        privacy = self.privacy
        if privacy is None or privacy.unit != "user" or privacy.noise_by == "users":
            return self
        if privacy.adjacency == "add_or_remove_one" and self.data.users is None:
            raise ValueError(
                "privacy.adjacency: add_or_remove_one hides how many users there are, and "
                "data.users: null takes that number from the data, for sampling, ledger and "
                "average: write data.users, a public number of at least all users, or adjacency: "
                "zero_out, under which the number is known"
            )
        return self

    @model_validator(mode="after")
    def _some_node_is_left(self) -> ExperimentConfig:
        if self.privacy is None or self.privacy.noise_by != "nodes":
            return self
        if self.privacy.lost_nodes >= self.runtime.workers:
            raise ValueError(
                f"privacy.lost_nodes must be below runtime.workers ({self.runtime.workers}), got "
                f"{self.privacy.lost_nodes}: those that are left add all the noise there is"
            )
        return self

    @model_validator(mode="after")
    def _batches_can_be_filled(self) -> ExperimentConfig:
        most = self.data.most_examples
        if most is not None and self.local.batch_size > most:
            raise ValueError(
                f"local.batch_size is {self.local.batch_size}, but data.examples_per_user lets a "
                f"user have {most} at most; write at most {most}"
            )
        return self

    @property
    def kept(self) -> ErrorFeedbackConfig:
        """How what users keep between rounds is stored."""
        return self.privacy.error_feedback if self.privacy else ErrorFeedbackConfig()

    def check_population(self, population: int) -> None:
        """Check what depends on the number of users.

        Raises:
            InputError: δ or the cohort is too large for the population.
        """
        if self.privacy is None:
            _check_cohort("cohort", self.cohort, population)
            return
        # With unit: example δ is held against the size of a silo, by what samples there.
        if self.privacy.unit == "user" and self.privacy.delta >= 1 / population:
            raise InputError(
                f"privacy.delta must be below 1/population ({1 / population:.3g} for "
                f"{population} users), got {self.privacy.delta:g}"
            )
        cohort = self.privacy.sampling.cohort
        _check_cohort("privacy.sampling.expected_cohort", cohort, population)

    def fingerprint(self, data: str) -> str:
        """Return the SHA-256 of everything that bears on what a run releases.

        `data` is the digest of the users' data (`FederatedDataset.digest`), and the fingerprint
        then a function of private data. A deployment, whose noise comes from the operating system,
        has none: "".
        """
        kept: dict[str, Any] = {
            "options": self.bearing(),
            "components": {key: [each.name, each.version] for key, each in slots(self)},
            "users": data,
        }
        if self.privacy is not None and self.privacy.noise_by == "nodes":
            # Runs with other numbers of nodes add up other shares, and must not have them from one
            # seed: what one run shows of the noise would be missing in the other.
            kept["nodes"] = self.runtime.workers
        document = json.dumps(kept, sort_keys=True, default=str)
        return hashlib.sha256(document.encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved config as YAML, in the schema's order."""
        return yaml_text.dump(self.model_dump(mode="json"))


def _check_adjacency(kind: str, adjacency: str | None) -> None:
    """Raise ValueError, with the reason, where the pair has no proof."""
    build_sampling(kind, 1, 1, Adjacency(adjacency) if adjacency else None)


def _check_cohort(key: str, cohort: float | None, population: int) -> None:
    if cohort is not None and cohort > population:
        raise InputError(f"{key} must be at most the population of {population}, got {cohort:g}")


def load_config(
    path: Path, overrides: Sequence[str] = (), reading: bool = False
) -> ExperimentConfig:
    """Read a YAML config and apply `key.sub=value` overrides (values are YAML too).

    With `reading` it is only read, as that of a run whose code need not be there: see `LookUp`.

    Raises:
        InputError: missing or unreadable file, bad YAML, unknown key, impossible value.
    """
    document = document_of(path)
    for override in overrides:
        _apply(document, override)
    folder = path.absolute().parent
    if reading:
        return parse_config(document, LookUp(_code(document) or folder, reading=True))
    return config_beside(folder, document)


def config_beside(folder: Path, document: dict[str, Any]) -> ExperimentConfig:
    """Return the validated config of a document from a file in `folder`.

    Raises:
        InputError: one line that names the key and what is wrong with it.
    """
    config = parse_config(document, LookUp(_code(document) or folder))
    if config.code is None and any(each.origin and each.origin.folder for _, each in slots(config)):
        # For whoever goes on with the run, whose own config lies elsewhere.
        return config.model_copy(update={"code": folder})
    return config


def document_of(path: Path) -> dict[str, Any]:
    """Return what a YAML config says, unchecked.

    Raises:
        InputError: missing or unreadable file, bad YAML, or no mapping.
    """
    try:
        document = yaml_text.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the config ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: a config is a mapping of keys, such as 'rounds: 60'")
    return document


def parse_config(document: dict[str, Any], look_up: LookUp | None = None) -> ExperimentConfig:
    """Return the validated config; `look_up` says where its components are looked for.

    Without one it is the document's own `code`, and whatever it names may be imported.

    Raises:
        InputError: one line that names the key and what is wrong with it.
    """
    look_up = look_up or LookUp(_code(document))
    try:
        return ExperimentConfig.model_validate(document, context=look_up)
    except ValidationError as error:
        raise InputError(_one_line(error, document)) from None


def _code(document: dict[str, Any]) -> Path | None:
    """Return the folder of modules that a config names; what is no path is told later."""
    code = document.get("code")
    try:
        return kept_path(Path(code)) if isinstance(code, str | Path) else None
    except ValueError:
        return None


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set takes key=value, such as privacy.delta=1e-6; got {override!r}")
    try:
        value = yaml_text.load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"--set {key}: {text!r} is not a YAML value") from None
    put(document, key, value, "--set ")


def put(document: dict[str, Any], key: str, value: Any, who: str = "") -> None:
    """Put a value at a dotted key; sections that are missing are made.

    Raises:
        InputError: a part of the key is a value; the error begins with `who`.
    """
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        child = section.get(parent)
        if child is None:
            child = section[parent] = {}
        if not isinstance(child, dict):
            raise InputError(f"{who}{key}: {parent} is a value, not a section")
        section = child
    section[last] = value


def _one_line(error: ValidationError, document: dict[str, Any]) -> str:
    problems = error.errors()
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"]) or "config"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(first['loc'], document)}{more}"
    if first["type"] == "missing":
        return f"{key}: this key is needed{more}"
    if first["type"] == "model_type":
        return f"{key}: {_no_section(first, document)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "component":  # which has said what it got
        return f"{key}: {message}{more}"
    message = message[0].lower() + message[1:]
    shown = "" if isinstance(first["input"], dict | BaseModel) else f", got {first['input']!r}"
    return f"{key}: {message}{shown}{more}"


def _no_section(error: ErrorDetails, document: dict[str, Any]) -> str:
    """Say what to write where a section has another value."""
    *parents, last = error["loc"]
    annotation = _section_at(parents, document).model_fields[str(last)].annotation
    nothing = f", or {last}: null" if type(None) in get_args(annotation) else ""
    return f"write a section of keys{nothing}, got {error['input']!r}"


def _suggestion(location: tuple[int | str, ...], document: dict[str, Any]) -> str:
    section, key = _section_at(location[:-1], document), str(location[-1])
    if (slot := _slot_at(location[:-1], document)) is not None and (owners := slot.with_key(key)):
        return f"; it goes with {slot.kind.name_key}: {' or '.join(owners)}"
    near = difflib.get_close_matches(key, section.model_fields, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known keys here: {', '.join(section.model_fields)}"


def _section_at(location: Sequence[int | str], document: Any) -> Any:
    """Return the class of the section at `location` of the document."""
    section: Any = ExperimentConfig
    for part in location:
        about = section.model_fields[str(part)]
        document = document.get(part) if isinstance(document, dict) else None
        slot = next((each for each in about.metadata if isinstance(each, Slot)), None)
        section = slot.options_of(document) if slot else _section_type(about.annotation)
    return section


def _slot_at(location: Sequence[int | str], document: Any) -> Slot | None:
    """Return the slot that a section is in; None for a section that is no component's."""
    if not location:
        return None
    about = _section_at(location[:-1], document).model_fields[str(location[-1])]
    return next((each for each in about.metadata if isinstance(each, Slot)), None)


def _section_type(annotation: Any) -> Any:
    """Return the section class inside an annotation such as `PrivacyConfig | None`."""
    if isinstance(annotation, type):
        return annotation
    return next(part for part in annotation.__args__ if part is not type(None))
