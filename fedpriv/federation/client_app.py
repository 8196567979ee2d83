"""The ClientApp: a node trains the users that it is sent, or its own, and answers with one sum.

In a simulation any node can train any user. In a deployment a node hosts users of its own: its
`--node-config` gives `partition-id`, `num-partitions` and `data-path`, the folder that holds its
users, who never leave it. Without `data-path` it hosts its share of the config's data set, where
that reads no folder. `policy` names the file that says what it does at most for a server: see
`fedpriv.federation.policy`.
`components` lists what it may import that is not fedpriv's own, such as `mine:cnn`; without it, or
the environment's FEDPRIV_COMPONENTS, that is nothing, whatever a server names.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from fedpriv.config import ExperimentConfig
from fedpriv.data.content import Content
from fedpriv.data.federated import DatasetPartition, FederatedDataset
from fedpriv.errors import DamagedFile, EnvironmentFault, FedprivError, InputError
from fedpriv.federation.builders import (
    build_example_level,
    build_gaussian,
    build_local_randomness,
    build_node_noise,
    build_randomness,
    build_trainer,
)
from fedpriv.federation.messages import (
    Work,
    data_of,
    experiment_of,
    failure_reply,
    hosting_reply,
    one_line,
    other_versions,
    sum_reply,
    work_of,
)
from fedpriv.federation.policy import NodeTerms, NotAllowed
from fedpriv.federation.simulated import SimulatedContext
from fedpriv.models.fitness import count
from fedpriv.models.parameters import Layout
from fedpriv.privacy.clipping import with_bounds
from fedpriv.training.cohort import CohortSum, CohortTrainer, train_cohort
from fedpriv.training.memory_store import Memories, RoundMemories
from fedpriv.training.own_noise import released_alone, with_noise

app = ClientApp()
_LOG = logging.getLogger("flwr")


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Answer which users this node hosts."""

    def answer(config: ExperimentConfig, terms: NodeTerms) -> Message:
        partition, partitions = _partition(context), _partitions(context)
        dataset = _trainer(config, context, terms, data_of(message)).dataset
        if not config.runtime.deployment:
            return hosting_reply(message, partition, partitions, None)
        ids = _ids_digest(dataset, config)
        return hosting_reply(message, partition, partitions, dataset.population, ids)

    return _guarded(message, context, answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the users that the message names and answer with the sum of their clipped updates.

    Silos answer with the sum of their noisy changes; where nodes or users add the noise, it is in
    the sum.
    """

    def answer(config: ExperimentConfig, terms: NodeTerms) -> Message:
        work, partition = work_of(message), _partition(context)
        trainer = _trainer(config, context, terms, work.data)
        terms.check_work(config, work, trainer)
        users = terms.charged(config, work, trainer.dataset.user_ids)
        work = replace(work, users=_there(users, trainer.dataset))
        if config.privacy is not None and config.privacy.unit == "example":
            return sum_reply(message, partition, _trained_silos(config, work, trainer))
        with _memories(config, work) as memories:
            summed = trained(trainer, work, memories)
        if work.own_noise is not None:
            summed = _noisy(config, work, summed, trainer, partition)
        return sum_reply(message, partition, summed)

    return _guarded(message, context, answer)


def client_node(partition: int, partitions: int) -> Callable[[Message], Message]:
    """Return what answers as a simulated node `partition` of so many, without Flower's runtime."""
    node_config: UserConfig = {"partition-id": partition, "num-partitions": partitions}
    context = SimulatedContext(1, partition, node_config, RecordDict(), {})
    return lambda message: app(message, context)


def trained(trainer: CohortTrainer, work: Work, memories: RoundMemories | None = None) -> CohortSum:
    """Do the `work` of a round: train its users within its bounds and return their sum."""
    if work.bounds:
        trainer = replace(trainer, clipping=with_bounds(trainer.clipping, work.bounds))
    return train_cohort(trainer, work.parameters, work.users, work.round, memories)


def _noisy(
    config: ExperimentConfig,
    work: Work,
    summed: CohortSum,
    trainer: CohortTrainer,
    partition: int,
) -> CohortSum:
    """Return the node's sum with the noise that it, or its users, add before it leaves.

    The multiplier is the server's: whoever calibrated it again could get other last digits.
    """
    privacy, own = config.privacy, work.own_noise
    assert privacy is not None
    assert own is not None
    layout, dataset = Layout.of(trainer.model), trainer.dataset
    noise = build_node_noise(config, build_gaussian(config, own.noise_multiplier, layout))
    # In a deployment a source of this node's own, made anew for each message.
    secret = build_randomness(config, work.data)
    ids = [dataset.user_ids[user] for user in work.users]
    sizes = layout.sizes * trainer.algorithm.vectors
    draws = noise.draws(sizes, secret, (work.round, own.attempt), partition, ids)
    noisy = with_noise(summed, draws)
    return released_alone(noisy) if config.runtime.deployment else noisy


def _trained_silos(config: ExperimentConfig, work: Work, trainer: CohortTrainer) -> CohortSum:
    # Imported here: it needs Opacus, which nothing else does.
    from fedpriv.training.example_level import train_silos

    assert config.privacy is not None
    assert config.privacy.example is not None
    assert work.own_noise is not None
    layout = Layout.of(trainer.model)
    summed = train_silos(
        trainer,
        build_example_level(config, work.own_noise.noise_multiplier, layout).at(work.bounds),
        work.parameters,
        work.users,
        work.round,
        work.own_noise.attempt,
        build_randomness(config, work.data),
        config.privacy.delta,
        config.privacy.example.gradients,
    )
    return released_alone(summed, summed.users) if config.runtime.deployment else summed


def _guarded(
    message: Message, context: Context, answer: Callable[[ExperimentConfig, NodeTerms], Message]
) -> Message:
    """Return the answer to the message's experiment, or that there is none.

    What the node's terms do not allow is refused before anything of the message is used. In a
    simulation wrong input, or a fault of the machine, goes back as its sentence, and anything else
    is a crash of this node. From a node of a deployment no text leaves that could be about its
    data.
    """
    try:
        terms = NodeTerms.of(context)
    except InputError as error:  # about this node's own files
        return _withheld(message, error)
    try:
        _compare_versions(message)
        config = experiment_of(message, terms.components)
        terms.check(config, data_of(message))
    except InputError as error:  # about what the server sent
        return _refused(message, error)
    try:
        return answer(config, terms)
    except NotAllowed as error:
        return _refused(message, error)
    except Exception as error:
        if config.runtime.deployment:
            return _withheld(message, error)
        if isinstance(error, InputError | EnvironmentFault | DamagedFile):
            return failure_reply(message, str(error))
        raise


def _compare_versions(message: Message) -> None:
    """Log what this node has in another version than the server; see `other_versions`."""
    for name, (here, there) in other_versions(message).items():
        _LOG.warning(
            "fedpriv: %s is %s here and %s at the server: sums may round differently",
            name,
            here,
            one_line(there),
        )


def _refused(message: Message, why: InputError) -> Message:
    """Return what this node does not do, and log it here."""
    reason = one_line(str(why))
    _LOG.warning("fedpriv: refused: %s", reason)
    return failure_reply(message, f"refused: {reason}" if isinstance(why, NotAllowed) else reason)


def _withheld(message: Message, why: Exception) -> Message:
    """Return that this node cannot do its part; its own log says why."""
    known = isinstance(why, FedprivError | OSError)
    _LOG.error(
        "fedpriv: this node cannot do its part of the round: %s",
        one_line(str(why)),
        exc_info=not known and why,
    )
    return failure_reply(message, "it could not do its part; the reason is in its own log")


def _there(users: list[int], dataset: FederatedDataset) -> list[int]:
    """Return the users who are there: places of the population may be empty."""
    return [user for user in users if user < dataset.population]


def _ids_digest(dataset: FederatedDataset, config: ExperimentConfig) -> str:
    """Return what changes with the users whom this node hosts; another config has another."""
    content = Content(config.fingerprint(""))
    for user_id in dataset.user_ids:
        content.add(user_id.encode("utf-8", "surrogatepass"))
    return content.hexdigest()


def _memories(config: ExperimentConfig, work: Work) -> AbstractContextManager[RoundMemories | None]:
    """Return access to what users keep, where they keep anything, for this piece of work."""
    if work.memories is None or work.journal is None:
        return nullcontext()
    ram = config.kept.ram_mib * 2**20 // config.runtime.workers
    return _opened(work.memories, ram).round(work.journal)


# What a worker keeps of memories in RAM stays there between rounds.
@lru_cache(maxsize=1)
def _opened(folder: Path, ram_bytes: int) -> Memories:
    return Memories(folder, ram_bytes)


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _partitions(context: Context) -> int:
    return int(context.node_config["num-partitions"])


def _trainer(
    config: ExperimentConfig, context: Context, terms: NodeTerms, data: str
) -> CohortTrainer:
    """Return what this node trains with: the users in its folder, or its share of the config's.

    `data` is the digest of a simulation's data.
    """
    if not config.runtime.deployment:
        return _TRAINERS.of(config, data)
    folder = terms.folder
    if folder is None:
        trainer = _TRAINERS.of(config, data, terms.check_size)
        share = DatasetPartition(trainer.dataset, _partition(context), _partitions(context))
        trainer = replace(trainer, dataset=share)
    else:
        if "path" not in type(config.data).model_fields:
            raise InputError(
                f"data.name: {config.data.name} reads no folder, but this node has a data-path"
            )
        own = config.data.model_copy(update={"path": folder, "users": None})
        trainer = _TRAINERS.of(config.model_copy(update={"data": own}), data, terms.check_size)
    # Drawn here and for this message: a trainer is kept between messages, its secrets are not.
    return replace(trainer, randomness=build_local_randomness(config))


def _with_the_servers_data(
    trainer: CohortTrainer, config: ExperimentConfig, data: str
) -> CohortTrainer:
    """Return `trainer`, whose data must be those whose digest is `data`; one machine has only one.

    Raises:
        InputError: this machine of a cluster has other data, of which the accounting knows nothing.
    """
    if config.runtime.ray_address is not None and trainer.dataset.digest() != data:
        raise InputError(
            f"data: {platform.node()} has other data under this config than the machine on which "
            "the run was started; copy the same files to the same path there"
        )
    return trainer


class _Trainers:
    """Keeps data and model in the worker between rounds. One experiment runs at a time."""

    def __init__(self) -> None:
        self._for: tuple[ExperimentConfig, str] | None = None
        self._trainer: CohortTrainer | None = None

    def of(
        self, config: ExperimentConfig, data: str, allow: Callable[[int], None] | None = None
    ) -> CohortTrainer:
        """Return the trainer of `config`, the same one as long as config and data are the same.

        `data` is the digest of the users' data, "" in a deployment, whose nodes start anew for each
        message. For `allow` see `build_trainer`.
        """
        # Each time: a grid in one process with others leaves them as they were before.
        torch.set_num_threads(config.runtime.threads_per_worker)
        if self._trainer is None or self._for != (config, data):
            trainer = build_trainer(config, allow=allow)
            self._trainer = _with_the_servers_data(trainer, config, data)
            self._for = (config, data)
        elif allow is not None:
            allow(count(self._trainer.model))
        return self._trainer


_TRAINERS = _Trainers()
