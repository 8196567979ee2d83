"""A node's policy: what whoever runs a node lets a server ask of it. A server is not trusted.

The policy is a YAML file on the node, which `--node-config` names by the key `policy`, or the
environment by FEDPRIV_POLICY. Whatever a message asks for is held against it, and against what no
node with users of its own ever does, before anything of the message is used. A refusal is one
sentence that says nothing of the data.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from flwr.app import Context
from pydantic import BaseModel, Field, ValidationError, model_validator

from fedpriv.config import ExperimentConfig
from fedpriv.config_files import document_of
from fedpriv.data.partition import PartitionConfig
from fedpriv.errors import InputError
from fedpriv.federation.messages import Work
from fedpriv.federation.node_ledger import Limits, NodeLedger, Participation
from fedpriv.federation.simulated import simulated_node
from fedpriv.models.parameters import Layout
from fedpriv.privacy.clipping import bounds_of
from fedpriv.privacy.clipping_rules import AdaptiveOptions
from fedpriv.privacy.options import PrivacyConfig
from fedpriv.sections import KeptPath, Positive, Section
from fedpriv.training.cohort import CohortTrainer

# What numbers that went through a calculation may be off by.
_ROUNDING = 1e-9
_FEWEST, _MOST = 1e-6, 1e6  # of a noise multiplier, as in a config
# Paths of a config that belong to the server: a node does not look at them, nor at data.path where
# it has a folder of its own.
_OF_THE_SERVER = frozenset(
    {"run_dir", "code", "seed_model.path", "data.path", "evaluation.held_out"}
)

Count = Annotated[int, Field(ge=1)]
#: Who adds noise: silos are those of `privacy.unit: example`.
NoiseBy = Literal["server", "nodes", "users", "silos"]


class NotAllowed(InputError):  # noqa: N818 - no error: a refusal
    """What a node does not do, in one sentence that says nothing of its data."""


class WorkLimits(Section):
    """How much work a server may ask for: more than honest configs ask, less than would block."""

    steps: Count = Field(default=10_000, description="Largest local.steps.")
    rounds: Count = Field(default=100_000, description="Largest rounds of a config.")
    epochs: Count = Field(default=100, description="Largest local.epochs.")
    batch_size: Count = Field(default=4096, description="Largest local.batch_size.")
    threads: Count = Field(default=64, description="Largest runtime.threads_per_worker.")
    cache_mib: Count = Field(default=16_384, description="Largest runtime.cache_mib.")
    parameters: Count = Field(default=10**9, description="Most parameters of a model.")
    model: Count = Field(
        default=65_536,
        description="Largest number among a model's options, such as a width or a depth.",
    )

    def check(self, config: ExperimentConfig) -> None:
        """Raise NotAllowed where `config` asks for more."""
        asked = {
            "rounds": (config.rounds, self.rounds),
            "local.steps": (config.local.steps or 0, self.steps),
            "local.epochs": (config.local.epochs, self.epochs),
            "local.batch_size": (config.local.batch_size, self.batch_size),
            "runtime.threads_per_worker": (config.runtime.threads_per_worker, self.threads),
            "runtime.cache_mib": (config.runtime.cache_mib, self.cache_mib),
        }
        for key, (found, most) in asked.items():
            _require(found <= most, f"{key} is {found}, and it allows {most}")
        largest = max(map(abs, _numbers(config.model.model_dump())), default=0)
        _require(
            largest <= self.model,
            f"model has an option of {largest:.4g}, and it allows {self.model}",
        )


class NodePolicy(Section):
    """What a node does at most for any server."""

    unit: Literal["user", "example"] = Field(
        default="user", description="privacy.unit: whom the node's ledger charges."
    )
    noise_by: tuple[NoiseBy, ...] = Field(
        default=("server", "nodes", "users"),
        min_length=1,
        description="Who may add the noise. users: whatever leaves has it; nodes: a share of it "
        "leaves with each sum; server: the server promises it; silos: unit: example.",
    )
    smallest_z: Annotated[float, Field(ge=_FEWEST, le=_MOST)] = Field(
        description="The smallest noise multiplier; with unit: example of each local step."
    )
    largest_bound: Positive = Field(
        description="The largest C, of all that a user sends together; with unit: example that of "
        "an example's gradient."
    )
    rounds: Count = Field(description="The most rounds in which a user takes part, in all runs.")
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="The largest share of a run's rounds, as its config has them, in which a user "
        "takes part; a run that is started anew is another. null: any.",
    )
    epsilon: Positive | None = Field(
        default=None,
        description="The largest ε of a user in all runs, by RDP and without amplification by the "
        "sampling of users; null: rounds alone decide.",
    )
    delta: Annotated[float, Field(ge=1e-300, lt=1)] | None = Field(
        default=None, description="The δ of epsilon."
    )
    adjacency: Literal["zero_out", "replace_one"] = Field(
        default="zero_out",
        description="Of epsilon with unit: user. zero_out: whether a user contributed (C); "
        "replace_one: also what (2C).",
    )
    data: str | None = Field(default=None, description="The only data.name; null: any.")
    data_path: KeptPath | None = Field(
        default=None, description="The folder of the users' data; null: node-config data-path."
    )
    users: dict[str, Any] = Field(
        default={},
        description="By key of the config's data, what decides who a user is, such as "
        "user: writer, where that is not the data set's default.",
    )
    population: Count | None = Field(
        default=None, description="The only data.users, N over all nodes; null: any."
    )
    components: tuple[str, ...] | None = Field(
        default=None,
        description="What it may import that is not fedpriv's own; null: node-config components.",
    )
    ledger: KeptPath | None = Field(
        default=None, description="The node's ledger; null: <name of this file>.ledger beside it."
    )
    limits: WorkLimits = WorkLimits()

    @model_validator(mode="after")
    def _go_together(self) -> NodePolicy:
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("epsilon and delta go together; write both, or neither")
        if (self.unit == "example") != (self.noise_by == ("silos",)):
            raise ValueError("unit: example and noise_by: [silos] go together; write both")
        return self

    def check(self, config: ExperimentConfig, nodes: int) -> None:
        """Check what a server wants to train against this policy of one node of so many.

        Raises:
            NotAllowed: it does not go with it.
        """
        privacy = config.privacy
        if privacy is None:
            raise NotAllowed("privacy: null trains without privacy")
        _require(
            self.data in (None, config.data.name),
            f"data.name is {config.data.name:.50}, and it allows {self.data} alone",
        )
        _require(
            self.population in (None, config.data.users),
            f"data.users is {config.data.users}, and it knows of {self.population}",
        )
        _require(
            privacy.unit == self.unit,
            f"privacy.unit is {privacy.unit}, and its ledger charges each {self.unit}",
        )
        noise_by = _noise_by(privacy)
        _require(
            noise_by in self.noise_by,
            f"noise by {noise_by}, and it allows {', '.join(self.noise_by)} alone",
        )
        shares = config.runtime.workers - privacy.lost_nodes
        _require(
            noise_by != "nodes" or shares <= nodes,
            f"a share of the noise for {shares} nodes, and it knows of {nodes}",
        )
        self._check_bounds((privacy.clipping.bound, *config.algorithm.bounds.values()))
        if privacy.noise_multiplier is not None:
            self._check_multiplier(privacy.noise_multiplier)
        elif noise_by == "server":
            raise NotAllowed(
                "privacy.target_epsilon does not say how much noise the server adds; write "
                "privacy.noise_multiplier"
            )
        self.limits.check(config)

    def check_work(self, work: Work) -> None:
        """Check a round's own numbers: see `check`."""
        if work.own_noise is not None:
            self._check_multiplier(work.own_noise.noise_multiplier)
        if work.bounds:
            self._check_bounds(work.bounds)

    def _check_multiplier(self, found: float) -> None:
        _require(
            found >= self.smallest_z * (1 - _ROUNDING),
            f"a noise multiplier of {found:.4g}, and it demands {self.smallest_z:g}",
        )

    def _check_bounds(self, found: Sequence[float]) -> None:
        norm = math.hypot(*found)
        _require(
            norm <= self.largest_bound * (1 + _ROUNDING),
            f"a clip bound of {norm:.4g}, and it allows {self.largest_bound:g}",
        )

    def users_may(self, rounds: int) -> Limits:
        """Return what a user may take part in, by a run of so many rounds."""
        exchanged = self.unit == "user" and self.adjacency == "replace_one"
        share = None if self.share is None else self.share * (1 - _ROUNDING)
        in_run = None if share is None else math.ceil(share * rounds)
        return Limits(self.rounds, self.epsilon, self.delta or 0.0, exchanged, in_run)


def read_policy(path: Path) -> NodePolicy:
    """Return the policy in a file, with a place for its ledger.

    Raises:
        InputError: it cannot be read, or is none; one line.
    """
    document = document_of(path, "policy", "smallest_z: 1.0")
    try:
        policy = NodePolicy.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "policy"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = NodePolicy if len(first["loc"]) == 1 else WorkLimits
            near = difflib.get_close_matches(str(first["loc"][-1]), known.model_fields, n=1)
            message = f"unknown key; {f'did you mean {near[0]}?' if near else 'remove it'}"
        raise InputError(f"{path}: {key}: {' '.join(message.split())}") from None
    ledger = policy.ledger or path.absolute().with_name(path.name + ".ledger")
    return policy.model_copy(update={"ledger": ledger})


@dataclass(frozen=True)
class NodeTerms:
    """On what terms a node works: its policy, if it has one, and its own settings.

    Attributes:
        policy: the policy; None for none.
        folder: the folder of its users' data; None for a share of the config's data set.
        components: names from outside that it may import.
        nodes: how many nodes there are, as it knows; 0 where it does not.
        run: Flower's number of the run, for the ledger.
        simulated: whether the node itself is simulated, and so hosts nobody.
    """

    policy: NodePolicy | None
    folder: Path | None
    components: frozenset[str]
    nodes: int
    run: int
    simulated: bool

    @classmethod
    def of(cls, context: Context) -> Self:
        """Return the terms of the node that `context` is about.

        Raises:
            InputError: its policy cannot be read.
        """
        own = context.node_config
        named = own.get("policy") or os.environ.get("FEDPRIV_POLICY")
        policy = read_policy(Path(str(named))) if named else None
        folder = Path(str(own["data-path"])) if own.get("data-path") else None
        listed = own.get("components") or os.environ.get("FEDPRIV_COMPONENTS", "")
        components = frozenset(str(listed).replace(",", " ").split())
        if policy is not None:
            folder = policy.data_path or folder
            if policy.components is not None:
                components = frozenset(policy.components)
        nodes = int(own.get("num-partitions", 0))
        simulated = simulated_node(context)
        return cls(policy, folder, components, nodes, context.run_id, simulated)

    def check(self, config: ExperimentConfig, data: str) -> None:
        """Check the experiment of a message, whose data have the digest `data`.

        Raises:
            NotAllowed: this node takes no part in it.
        """
        if not config.runtime.deployment:
            _require(
                self.simulated and self.policy is None and self.folder is None,
                "runtime.deployment: false draws from a seed that the server knows, and this node "
                "is real; write runtime.deployment: true",
            )
            return
        _require(
            not data and config.runtime.ray_address is None,
            "whether its data are those of a digest, or of a cluster, it does not say",
        )
        if not self.simulated or self.policy is not None or self.folder is not None:
            for key, _ in _paths(config):
                own_data = key != "data.path" or self.folder is not None
                _require(
                    key in _OF_THE_SERVER and own_data,
                    f"{key:.50} names a file or folder, and none is looked at that a server names",
                )
            self._check_who_users_are(config)
        dealt = getattr(config.data, "partition", None)
        if self.folder is not None and isinstance(dealt, PartitionConfig):
            _require(
                dealt.kind == "natural",
                f"data.partition.kind: {dealt.kind} would make users of parts of several people; "
                "write natural",
            )
        if self.policy is not None:
            self.policy.check(config, self.nodes)
        elif config.privacy is not None and config.privacy.unit == "example":
            raise NotAllowed(
                "privacy.unit: example needs a node with a policy, whose ledger it charges before "
                "a silo sends"
            )

    def _check_who_users_are(self, config: ExperimentConfig) -> None:
        """Raise NotAllowed where a server decides it: one person could be any number of users."""
        said = self.policy.users if self.policy else {}
        plain = config.data.model_dump(mode="json")
        for key in config.data.decides_users():
            _require(
                key in said and said[key] == plain[key],
                f"data.{key} decides who a user is, or what is public, which this node's own "
                f"policy has to say; its operator can add users: {{{key}: ...}}",
            )

    def check_size(self, parameters: int) -> None:
        """Check the size of a model before it is built.

        Raises:
            NotAllowed: this node trains none so large.
        """
        if self.policy is not None:
            most = self.policy.limits.parameters
            _require(
                parameters <= most, f"a model of {parameters} parameters, and it allows {most}"
            )

    def check_work(self, config: ExperimentConfig, work: Work, trainer: CohortTrainer) -> None:
        """Check what a message of an experiment asks for.

        Raises:
            NotAllowed: this node does not do it.
        """
        _check_users(work.users)
        if not config.runtime.deployment:
            return
        _require(
            all(user < trainer.dataset.population for user in work.users),
            "users whom it does not host",
        )
        _require(
            type(work.round) is int and 1 <= work.round <= config.rounds, "a round that is none"
        )
        _require(
            work.memories is None and work.journal is None,
            "a message names files, and none is looked at that a server names",
        )
        _check_own_noise(config, work)
        _check_round_bounds(config, work, trainer)
        _check_parameters(work, trainer)
        if self.policy is not None:
            self.policy.check_work(work)

    def charged(self, config: ExperimentConfig, work: Work, ids: Sequence[str]) -> list[int]:
        """Return those of the work's users whom the policy lets take part, and charge them.

        `ids` are those of all users here. When this returns, the charge is on the disk. Somebody
        who may take part no more is left out alone: what others send does not depend on it.

        Raises:
            NotAllowed: nobody is left.
        """
        policy, privacy = self.policy, config.privacy
        if policy is None or privacy is None or not work.users:
            return work.users
        assert policy.ledger is not None
        multiplier = work.own_noise.noise_multiplier if work.own_noise else privacy.noise_multiplier
        assert multiplier is not None
        example = privacy.example
        participation = (
            Participation(float(multiplier))
            if example is None
            else Participation(float(multiplier), example.sampling_rate, config.local.steps)
        )
        allowed = NodeLedger(policy.ledger, policy.unit).charge(
            [ids[user] for user in work.users],
            participation,
            policy.users_may(config.rounds),
            run=self.run,
            round=work.round,
            bound=math.hypot(*work.bounds) if work.bounds else privacy.clipping.bound,
        )
        _require(bool(allowed), "its users take part in no more, by their rounds or ε")
        return [work.users[place] for place in allowed]


def _require(holds: bool, else_refused: str) -> None:
    if not holds:
        raise NotAllowed(else_refused)


def _numbers(options: Any) -> Iterator[float]:
    """Yield all numbers in the options of a component, however deep."""
    if isinstance(options, dict | list | tuple):
        for inner in options.values() if isinstance(options, dict) else options:
            yield from _numbers(inner)
    elif isinstance(options, int | float):
        yield options


def _noise_by(privacy: PrivacyConfig) -> NoiseBy:
    return "silos" if privacy.unit == "example" else privacy.noise_by


def _paths(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Yield each path of a config, with its key."""
    values = {name: getattr(section, name) for name in type(section).model_fields}
    for name, value in {**values, **(section.model_extra or {})}.items():
        for each in value.values() if isinstance(value, dict) else [value]:
            for one in each if isinstance(each, list | tuple) else [each]:
                if isinstance(one, BaseModel):
                    yield from _paths(one, f"{prefix}{name}.")
                elif isinstance(one, Path):
                    yield f"{prefix}{name}", one


def _check_users(users: list[int]) -> None:
    _require(
        isinstance(users, list) and all(type(user) is int and user >= 0 for user in users),
        "users that are no numbers",
    )
    _require(len(set(users)) == len(users), "a user twice, who would then add up to 2C")


def _check_own_noise(config: ExperimentConfig, work: Work) -> None:
    """Raise NotAllowed unless the noise of nodes, users or silos is asked for as configured."""
    own, privacy = work.own_noise, config.privacy
    if privacy is None or _noise_by(privacy) == "server":
        _require(own is None, "noise that its config does not have")
        return
    if own is None:
        raise NotAllowed("no noise where it adds the noise")
    _require(type(own.attempt) is int and own.attempt >= 0, "an attempt that is none")
    multiplier = own.noise_multiplier
    _require(
        type(multiplier) in (int, float) and _FEWEST <= multiplier <= _MOST,
        "a noise multiplier that is none",
    )
    _require(
        multiplier >= (privacy.noise_multiplier or 0) * (1 - _ROUNDING),
        "less noise than its config says",
    )


def _check_round_bounds(config: ExperimentConfig, work: Work, trainer: CohortTrainer) -> None:
    """Raise NotAllowed unless bounds come where they adapt, as many as there are."""
    adapt = config.privacy is not None and isinstance(config.privacy.clipping, AdaptiveOptions)
    expected = len(bounds_of(trainer.clipping)) if adapt else 0
    bounds = work.bounds
    _require(
        isinstance(bounds, list)
        and len(bounds) == expected
        and all(type(each) in (int, float) and 0 < each < math.inf for each in bounds),
        "clip bounds other than its config's",
    )


def _check_parameters(work: Work, trainer: CohortTrainer) -> None:
    numbers = Layout.of(trainer.model).total * (1 + len(trainer.algorithm.shared))
    found = work.parameters
    _require(
        found.dtype == torch.float32 and found.shape == (numbers,),
        "parameters of another type or shape than the model's",
    )
    _require(bool(torch.isfinite(found).all()), "parameters that are not finite")
