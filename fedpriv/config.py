"""The experiment's schema: strict, typed, one place.

`config_files` reads one and checks everything that can be known without the data;
`check_population` does the rest once N is known. Sections stand beside what they are options of.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedpriv import yaml_text
from fedpriv.algorithms.registry import ALGORITHMS, AlgorithmOptions, make_algorithm
from fedpriv.components import Named, Slot, slots
from fedpriv.data.options import DataOptions
from fedpriv.data.registry import DATASETS
from fedpriv.errors import InputError
from fedpriv.models.options import ModelOptions
from fedpriv.models.registry import MODELS
from fedpriv.named_files import files_named
from fedpriv.optimizers.kinds import OPTIMIZERS
from fedpriv.optimizers.normalize import NORMALIZERS
from fedpriv.optimizers.schedules import ScheduleConfig
from fedpriv.optimizers.server import ServerConfig
from fedpriv.privacy.error_feedback import ErrorFeedbackConfig
from fedpriv.privacy.mechanisms.options import unproven_with
from fedpriv.privacy.options import PrivacyConfig
from fedpriv.runtime import RuntimeConfig
from fedpriv.sections import NO_BEARING, KeptPath, Positive, Rate, Section, UserPath
from fedpriv.tasks.registry import TASKS, TaskOptions
from fedpriv.tasks.spec_augment import SpecAugmentConfig
from fedpriv.trackers.registry import TRACKERS, TrackerOptions
from fedpriv.training.options import LocalConfig


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


def _listed(patterns: Any) -> Any:
    if isinstance(patterns, str):
        raise ValueError(f"write a list: [{patterns}]")
    return patterns


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
    reinitialize: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=(),
        description="Patterns of parameters that begin anew, such as [head.*] for a new output "
        "layer; the file, or the model, may lack them, or have them in other shapes.",
    )

    @model_validator(mode="after")
    def _can_be_found(self) -> SeedModelConfig:
        if self.path is None and self.pretrain is None:
            raise ValueError("write path, an existing file, or pretrain, how to make one")
        return self


class EvaluationConfig(Section):
    """When the model is measured on the held-out examples."""

    every: Annotated[int, Field(ge=1)] = Field(default=5, description="Rounds between evaluations.")
    keep_best: Annotated[bool, NO_BEARING] = Field(
        default=False,
        description="Keep the best model by the task's measure, which export, predict and "
        "Run.model() then take; held-out data must be public.",
    )
    stop_after: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Evaluations in a row without a better one after which the run ends; null: "
        "all rounds are run. Held-out data must be public.",
    )
    held_out: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None,
        description="The file of `fedpriv config held-out`, which is all that a deployment's "
        "server needs of the data; null: it needs the data set in data.path.",
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(default=500, description="Examples a batch.")
    decoder: Literal["greedy", "beam"] = Field(
        default="greedy",
        description="Speech: greedy, the best path; beam, the best prefixes (slow).",
    )
    beam: Annotated[int, Field(ge=1)] = Field(
        default=8, description="Speech, decoder beam: prefixes that are kept."
    )


class AppConfig(Section):
    """A Flower app of somebody's own, whose strategy `fedpriv.flower.PrivateStrategy` wraps."""

    strategy: str = Field(description="Its strategy.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="What was given to that, and to its nodes."
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
    trial: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Which trial of `fedpriv tune` it is, which fills it in: trials share neither "
        "cohorts nor noise.",
    )
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
    tracker: Annotated[TrackerOptions | None, Slot(TRACKERS, optional=True), NO_BEARING] = Field(
        default=None,
        description="Where the numbers of each round also go; null: only to the run's directory.",
    )
    app: AppConfig | None = Field(
        default=None,
        description="Filled in by fedpriv.flower: the run is of an app with code of its own, which "
        "decides data, model, local training and the server's step; its config has no such keys.",
    )

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
                "runtime.deployment, whose server may not know who the users are; write "
                "mechanism: {kind: independent}"
            )
        feedback = self.privacy and self.privacy.error_feedback
        if self.privacy and deployed and self.privacy.sampling.kind == "random_allocation":
            raise ValueError(
                "privacy.sampling.kind: random_allocation does not go with runtime.deployment, "
                "whose server draws anew after a restart and has forgotten who was allocated to "
                "which round: write poisson"
            )
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
    def _users_are_somewhere(self) -> ExperimentConfig:
        if self.evaluation.held_out is not None and not self.runtime.deployment:
            raise ValueError(
                "evaluation.held_out: a file without users is for runtime.deployment: true, where "
                "they are at the nodes; write null"
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
        if algorithm.scheduled and self.runtime.deployment:
            raise ValueError(
                f"algorithm.name: {self.algorithm.name} does not go with runtime.deployment: its "
                "schedule is of virtual time, and what a step takes in a real silo may tell of its "
                "data; write fedavg"
            )
        if (reason := algorithm.refuses_beside(self.server, privacy)) is not None:
            raise ValueError(f"algorithm.name: {self.algorithm.name} does not go with {reason}")
        bounded = algorithm.payloads[1:] if privacy else ()
        if tuple(self.algorithm.bounds) != bounded:
            raise ValueError(
                f"algorithm.bounds: write a bound for each payload beside the update "
                f"({', '.join(bounded) or 'there are none'}), and for no other"
            )
        if privacy is None:
            return self
        several, own = bool(bounded) or algorithm.keeps, not algorithm.sends_as_is
        silos = privacy.unit == "example"
        refused = {
            "unit: example": silos
            and (several or own or (bool(algorithm.shared) and not algorithm.scheduled)),
            f"noise_by: {privacy.noise_by}": several and privacy.noise_by != "server",
            f"sampling.kind: {privacy.sampling.kind}": algorithm.keeps
            and privacy.sampling.kind in ("fixed_size", "random_allocation"),
            "clipping.kind: adaptive": several and privacy.clipping.kind == "adaptive",
            "error_feedback: user": (several or own) and privacy.error_feedback.kind != "none",
            "mechanism.kind: correlated": several and privacy.mechanism.kind != "independent",
            "noise: per_block": several and privacy.noise != "spherical",
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
    def _noise_is_known(self) -> ExperimentConfig:
        options, privacy = self.server.normalize, self.privacy
        if options is None or options.unread or privacy is None:
            return self
        if not getattr(NORMALIZERS.of(options).make, "knows_noise", False):
            return self
        if not self.algorithm.unread and not make_algorithm(self.algorithm).adds_slots:
            raise ValueError(
                f"server.normalize.name: {options.name} takes the noise's variance from what it "
                f"normalises, and algorithm.name: {self.algorithm.name} divides by norms in which "
                "there is noise too, so that nobody knows the variance: write normalize: null"
            )
        if privacy.unit == "example" or privacy.noise_by == "users":
            raise ValueError(
                f"server.normalize.name: {options.name} takes the noise's variance from what it "
                "normalises, and how much noise there is depends on how many silos or users were "
                "drawn, who add their own: write noise_by: server or nodes, with unit: user"
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
        if self.model.lora is not None and self.model.lora.variant == "dora":
            raise ValueError(
                "model.lora.variant: dora does not go with privacy.unit: example: Opacus has no "
                "gradients of its single examples; write lora, rslora, pissa or eva"
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

    def evaluates(self, round_: int) -> bool:
        """Whether the model is measured after a round."""
        return round_ % self.evaluation.every == 0 or round_ == self.rounds

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

    def begun_with(self, frozen: str | None, start: str | None) -> ExperimentConfig:
        """Return this config for a model whose frozen part, and whose start, have these digests."""
        digests = {"frozen_sha256": frozen, "start_sha256": start}
        return self.model_copy(update={"model": self.model.model_copy(update=digests)})

    def fingerprint(self, data: str) -> str:
        """Return the SHA-256 of everything that bears on what a run releases.

        `data` is the digest of the users' data (`FederatedDataset.digest`), and the fingerprint
        then a function of private data. A deployment, whose noise comes from the operating system,
        has none: "".
        """
        kept: dict[str, Any] = {
            "options": self.bearing(),
            "components": {
                key: [each.name, each.version] for key, each in slots(self, bearing=True)
            },
            "users": data,
        }
        if named := files_named(self):
            kept["files"] = named
        if self.privacy is not None and self.privacy.noise_by == "nodes":
            # Runs with other numbers of nodes add up other shares, and must not have them from one
            # seed: what one run shows of the noise would be missing in the other.
            kept["nodes"] = self.runtime.workers
        document = json.dumps(kept, sort_keys=True, default=str)
        return hashlib.sha256(document.encode()).hexdigest()

    @property
    def server_step(self) -> str:
        """What moves the model by the average, in a word."""
        return self.server.optimizer if self.app is None else self.app.strategy

    def document(self) -> dict[str, Any]:
        """Return what the resolved config says, in the schema's order."""
        document = self.model_dump(mode="json")
        if self.app is None:
            return {key: value for key, value in document.items() if key != "app"}
        document["data"] = {"users": self.data.users}
        return {key: value for key, value in document.items() if key not in _OF_THE_APP}

    def to_yaml(self) -> str:
        """Return the resolved config as YAML."""
        return yaml_text.dump(self.document())


# What an app's own code decides.
_OF_THE_APP = ("model", "task", "seed_model", "local", "server", "algorithm", "cohort", "code")


def _check_cohort(key: str, cohort: float | None, population: int) -> None:
    if cohort is not None and cohort > population:
        raise InputError(f"{key} must be at most the population of {population}, got {cohort:g}")
