"""Parts of a round, each made from the config: those that nodes need, and share with the server.

Nothing here imports an accountant: nodes account for nothing, and start a second earlier.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fedpriv.algorithms.base import Algorithm
from fedpriv.algorithms.registry import make_algorithm
from fedpriv.config import ExperimentConfig
from fedpriv.data.federated import FederatedDataset
from fedpriv.data.registry import build_dataset
from fedpriv.errors import InputError
from fedpriv.models.fitness import count, require_memory
from fedpriv.models.parameters import Layout
from fedpriv.models.products import route_products
from fedpriv.models.registry import MODELS, build_model
from fedpriv.models.trained_part import frozen_of
from fedpriv.optimizers.layer_rates import layer_multipliers
from fedpriv.optimizers.local import LocalOptimizer, Signs, build_local_optimizer
from fedpriv.privacy.clipping import (
    AdaptiveBounds,
    ClippingRule,
    GlobalClipping,
    PayloadClipping,
    Unclipped,
    UndoneClipping,
    bounds_of,
)
from fedpriv.privacy.clipping_rules import AdaptiveOptions, ClippingOptions, build_rule
from fedpriv.privacy.error_feedback import Dice, ErrorFeedback, Remainder
from fedpriv.privacy.example_level import ExampleLevel
from fedpriv.privacy.mechanisms.base import NodeNoise
from fedpriv.privacy.mechanisms.gaussian import CountNoise, GaussianMechanism
from fedpriv.privacy.mechanisms.local import UsersNoise
from fedpriv.privacy.mechanisms.shares import NodeShare, NoiseShares
from fedpriv.privacy.options import PrivacyConfig
from fedpriv.privacy.randomness import Randomness
from fedpriv.privacy.sampling import Adjacency
from fedpriv.privacy.turns import Turn
from fedpriv.tasks.base import Task
from fedpriv.tasks.decoding import decoder
from fedpriv.tasks.recognition import sizes_a_second
from fedpriv.tasks.registry import build_task
from fedpriv.tasks.spec_augment import SpecAugment, SpecAugmentConfig
from fedpriv.training.checkpoint import digest_of
from fedpriv.training.cohort import CohortTrainer, Engine
from fedpriv.training.device import resolve_device, set_tf32
from fedpriv.training.local import PLAIN, LocalTraining
from fedpriv.training.options import LocalConfig
from fedpriv.training.seed_file import load_seed_blocks
from fedpriv.training.separate import look_at_rows
from fedpriv.training.stack_size import planned_stack, remembered_by
from fedpriv.training.stacked import can_stack
from fedpriv.training.trial import try_model
from fedpriv.training.user_cache import UserCache
from fedpriv.training.vmapped import FEWEST, Vmapping, vmapping_of


def build_trainer(
    config: ExperimentConfig,
    dataset: FederatedDataset | None = None,
    allow: Callable[[int], None] | None = None,
) -> CohortTrainer:
    """Return what a node needs to train its users: data, model, recipe, clipping rule.

    `dataset` is what there is of the data where that is not the config's data set. `allow` raises
    where a model of so many parameters must not be built; it is asked before that takes memory.
    """
    if dataset is None:
        dataset = build_dataset(config.data, config.seed)
    device = resolve_device(config.runtime.device)
    set_tf32(config.local.precision == "tf32", device)
    model = _built_model(config, dataset, device, allow)
    if device.type == "cpu" and config.runtime.fast_products:
        route_products(model)
    layout = Layout.of(model)
    feedback, algorithm = build_error_feedback(config.privacy, layout), build_algorithm(config)
    task = task_of(config, dataset)
    a_second = sizes_a_second(model, dataset.input_shape)
    recipe = _recipe(config.local, algorithm, a_second, layout.names)
    _require(algorithm, config, recipe)
    if algorithm.signs:
        recipe = replace(recipe, optimizer=Signs())
    chosen = _engine(config, dataset, model, task, recipe)
    return CohortTrainer(
        dataset=dataset,
        model=model,
        task=task,
        recipe=recipe,
        clipping=build_clipping(config, layout),
        feedback=feedback,
        algorithm=algorithm,
        randomness=build_local_randomness(config),
        device=device,
        engine=chosen.engine,
        vmapped=chosen.vmapped,
        why=chosen.why,
        stack=_stack(config, model, task, recipe.optimizer, chosen.vmapped),
        tolerant=config.runtime.deployment,
        cache=UserCache(config.runtime.cache_mib * 2**20),
        # What is recorded adds updates up as they are.
        graphs=config.runtime.cuda_graphs
        and device.type == "cuda"
        and feedback is None
        and algorithm.sends_update_alone,
        # How long a user takes says something of its data.
        timed=config.runtime.profile and not config.runtime.deployment,
    )


def population_of(config: ExperimentConfig, dataset: FederatedDataset) -> int:
    """Return N: what `data.users` says, else how many users the data set has.

    In a deployment each node has its own users, and only `data.users` can say how many in all.
    Places beyond the users that are there are empty: whoever is drawn for one contributes zero.
    """
    if config.runtime.deployment and config.data.users is None:
        raise InputError("data.users is needed with runtime.deployment: the total of all nodes")
    return config.data.users or dataset.population


def _start_seed(config: ExperimentConfig) -> int:
    """Return the seed of the numbers that a model begins with.

    What begins anew beside a seed model must not begin with what that one may have begun with, by
    the same seed: the rest of it grew beside those numbers, and has half learnt the new layer.
    """
    if config.seed_model is None or not config.seed_model.reinitialize:
        return config.seed
    drawn = hashlib.sha256(f"reinitialize {config.seed}".encode()).digest()
    return int.from_bytes(drawn[:4])


def _built_model(
    config: ExperimentConfig,
    dataset: FederatedDataset,
    device: torch.device,
    allow: Callable[[int], None] | None,
) -> nn.Module:
    """Return the config's model on its device; for `allow` see `build_trainer`.

    Raises:
        InputError: it cannot be built or trained on these data, or takes more memory than there is.
    """

    def built(pretrained: Callable[[nn.Module], None] | None = None) -> nn.Module:
        shape, classes = dataset.input_shape, dataset.classes
        return build_model(config.model, shape, classes, _start_seed(config), pretrained)

    runtime = config.runtime
    elsewhere = runtime.deployment or runtime.ray_address is not None
    processes = 1 if elsewhere or runtime.grid == "local" else 1 + runtime.workers

    def checked(model: nn.Module) -> nn.Module:
        trained, parameters = Layout.of(model).total, count(model)
        if allow is not None:
            allow(parameters)
        require_memory(trained, processes, device, frozen=parameters - trained)
        return model

    if MODELS.of(config.model).origin is None:
        with torch.device("meta"):  # shapes without numbers: a model of any size takes no time
            checked(built())
        return _as_begun(config, built(_pretrained(config))).to(device)
    if allow is not None and (shapes := _shapes_of(built)) is not None:
        checked(shapes)
    return _as_begun(config, checked(built(_pretrained(config)))).to(device)


def _shapes_of(built: Callable[[], nn.Module]) -> nn.Module | None:
    """Return a model from outside without its numbers; None where its builder looks at them."""
    try:
        with torch.device("meta"):
            return built()
    except Exception:  # whatever its own code raises, and then again
        return None


def _pretrained(config: ExperimentConfig) -> Callable[[nn.Module], None] | None:
    """Return what puts the seed model's numbers into a model of which not all is trained.

    Where all is trained the server alone begins with it. Until a seed model is there only shapes
    are asked for.

    Raises:
        InputError: the nodes are on machines that do not have its file, or a run that began with
            it has lost it.
    """
    seed = config.seed_model
    if seed is None or config.model.train == "all":
        return None
    if config.runtime.deployment:
        raise InputError(
            "model.train: the nodes of a deployment do not have the seed model, parts of which "
            "stay as they are; write a model of your own that reads its weights on each node, or "
            "train: all"
        )
    if seed.path is None or seed.sha256 is None:
        return None
    if not seed.path.exists():
        if config.model.frozen_sha256 is None:
            return None
        raise InputError(
            f"seed_model.path: there is no {seed.path}; put the file that the run began with "
            "there, since what is not trained is in that file alone"
        )
    path, digest, anew = seed.path, seed.sha256, seed.reinitialize
    return lambda model: load_seed_blocks(path, digest, model, anew)


def _as_begun(config: ExperimentConfig, model: nn.Module) -> nn.Module:
    """Return `model`, of which what is not trained must be what the run began with.

    Raises:
        InputError: it is not.
    """
    wanted, frozen = config.model.frozen_sha256, frozen_of(model)
    if wanted is not None and digest_of(frozen) != wanted:
        raise InputError(
            f"model.frozen_sha256: what is not trained has other numbers on {platform.node()} than "
            "where the run began; copy the same weights there, and install the same versions"
        )
    return model


class _Chosen(NamedTuple):
    """How users are trained: see `CohortTrainer`."""

    engine: Engine
    vmapped: Vmapping | None = None
    why: str = ""


def _engine(
    config: ExperimentConfig,
    dataset: FederatedDataset,
    model: nn.Module,
    task: Task[Any],
    recipe: LocalTraining,
) -> _Chosen:
    """Return how users are trained: in one batch only where that keeps them apart.

    What decides is public, and the same in every process: no clock is asked.

    Raises:
        InputError: the model does not fit the data, it carries one user's data to the next, or
            examples are to be protected one by one and it mixes them.
    """
    # In a stack the rounding of one user's numbers depends on who else is in it, which local
    # training can amplify: the others' contributions then move with one user's presence.
    engine, why, optimizer = config.runtime.engine, "", recipe.optimizer
    if config.runtime.deployment:
        engine, why = "sequential", "this is a deployment"
    elif recipe.perturbs:
        engine, why = "sequential", f"{config.algorithm.name} takes a second gradient in each step"
    elif not optimizer.stackable:
        name = config.local.optimizer.name
        engine, why = "sequential", f"{name} is not known to take the steps of several at once"
    own = MODELS.of(config.model).origin is None and type(task).__module__.startswith("fedpriv.")
    if own and (engine == "sequential" or can_stack(model)):
        return _Chosen(engine, why=why)
    prepared = (task.prepare(model, part) for part in dataset.evaluation())
    examples = next((part for part in prepared if len(part)), None)
    if examples is not None:
        try_model(model, task, examples, dataset.classes, config.model.name)
        if len(examples) == 1:  # too few to see whether they meet
            examples = next((part for part in prepared if len(part) > 1), None)
    rows = look_at_rows(model, task, examples)
    if rows.carried:
        raise InputError(
            f"model.name: {config.model.name}, or the task, keeps something of one batch that "
            "changes the losses of the next, and would carry one user's data to another; keep "
            "nothing between calls"
        )
    if config.privacy is not None and config.privacy.unit == "example" and not rows.separate:
        raise InputError(
            f"model.name: with {config.model.name} and this task an example's loss depends on the "
            "others of its batch, as with batch normalisation, so that no example's gradient can "
            "be bounded alone: write GroupNorm or LayerNorm in its place, or privacy.unit: user"
        )
    if engine == "sequential":
        return _Chosen("sequential", why=why)
    if examples is None:
        return _Chosen("sequential", why="there are no examples to try it on")
    if rows.drawn or not rows.separate:
        what = "it draws random numbers" if rows.drawn else "it mixes the rows of a batch"
        return _Chosen("sequential", why=what)
    if can_stack(model):
        return _Chosen("stacked")
    found: Vmapping | str = (
        f"there is memory for fewer than {FEWEST} at a time (runtime.stack, runtime.stack_mib)"
    )
    # A GPU's memory is asked for later.
    if _several(config, model, task, optimizer, None):
        tried = vmapping_of(model, task, examples, config.local.batch_size)
        if isinstance(tried, str) or _several(config, model, task, optimizer, tried):
            found = tried
    return _Chosen("sequential", why=found) if isinstance(found, str) else _Chosen("stacked", found)


def _several(
    config: ExperimentConfig,
    model: nn.Module,
    task: Task[Any],
    optimizer: LocalOptimizer,
    vmapped: Vmapping | None,
) -> bool:
    """Say whether so many users are trained at once that `vmap` pays."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    chosen_later = on_gpu and config.runtime.stack is None
    return chosen_later or _stack(config, model, task, optimizer, vmapped) >= FEWEST


def _stack(
    config: ExperimentConfig,
    model: nn.Module,
    task: Task[Any],
    optimizer: LocalOptimizer,
    vmapped: Vmapping | None,
) -> int:
    """Return the number of users to stack; where it is to be measured, one to begin with."""
    runtime, parameters = config.runtime, Layout.of(model).total
    if isinstance(runtime.stack, int):
        return runtime.stack
    memory = runtime.stack_mib * 2**20
    kept = 0 if vmapped is None else vmapped.kept * config.local.batch_size
    return planned_stack(parameters, memory, task.long_examples, remembered_by(optimizer), kept)


def _recipe(
    config: LocalConfig, algorithm: Algorithm, a_second: float = 1.0, names: Sequence[str] = ()
) -> LocalTraining:
    """Return the recipe; `a_second` is what a second of sound adds to an example's size.

    `names` are those of the blocks; without them no block has a learning rate of its own.
    """
    apart = {"optimizer", "momentum", "schedule", "batch_seconds", "spec_augment", "layer_decay"}
    shared = config.model_dump(exclude=apart) | {
        "proximal_mu": algorithm.proximal_mu or config.proximal_mu,
        "perturbation": algorithm.perturbation,
        "lr": config.lr * algorithm.gradient_weight,
        "optimizer": build_local_optimizer(config.optimizer, config.momentum),
        "schedule": config.schedule,
        "multipliers": _multipliers(config, names) if names else (),
    }
    if config.batch_seconds is None:
        return LocalTraining(**shared)
    return LocalTraining(**shared, batch_sizes=round(config.batch_seconds * a_second))


def task_of(config: ExperimentConfig, dataset: FederatedDataset) -> Task[Any]:
    """Return what is learnt."""
    return build_task(
        config.task,
        dataset=dataset,
        decode=decoder(config.evaluation.decoder, config.evaluation.beam),
        spec_augment=build_spec_augment(config.local.spec_augment),
    )


def build_spec_augment(config: SpecAugmentConfig | None) -> SpecAugment | None:
    """Return how features are masked; None for not at all."""
    return None if config is None else SpecAugment(**config.model_dump())


def build_algorithm(config: ExperimentConfig) -> Algorithm:
    """Return what users compute, keep and send, and what the server does with it.

    Raises:
        InputError: the local recipe has something that the algorithm has no meaning for.
    """
    algorithm = make_algorithm(config.algorithm)
    recipe = _recipe(config.local, algorithm)
    _require(algorithm, config, recipe)
    return algorithm.made_for(recipe)


def build_turns(config: ExperimentConfig, rounds: int) -> tuple[Turn, ...] | None:
    """Return the schedule of the first `rounds`, which is public; None where there is none."""
    if config.algorithm.unread:  # only fedpriv's own have one
        return None
    algorithm, steps = make_algorithm(config.algorithm), config.local.steps
    if not algorithm.scheduled or steps is None:
        return None
    return tuple(algorithm.turns(rounds, steps))


def _multipliers(config: LocalConfig, names: Sequence[str]) -> tuple[float, ...]:
    return layer_multipliers(config.multipliers, config.layer_decay, names)


def _require(algorithm: Algorithm, config: ExperimentConfig, recipe: LocalTraining) -> None:
    reason = algorithm.refuses(recipe)
    if algorithm.signs and (recipe.optimizer != PLAIN or recipe.perturbs):
        reason = (
            "local.optimizer or local.momentum: users move the scores of signs by plain steps; "
            "leave both out"
        )
    if reason is not None:
        raise InputError(f"algorithm.name: {config.algorithm.name} does not go with {reason}")


def build_gaussian(
    config: ExperimentConfig,
    noise_multiplier: float,
    layout: Layout,
    contributions: float | None = None,
) -> GaussianMechanism:
    """Return the clip bound and the noise of a private `config`.

    `contributions` are how many are expected in a sum; adaptive clipping needs it unless its
    `count_noise` is given.

    Raises:
        InputError: the noise on the counts of adaptive clipping costs more than there is.
    """
    privacy, clipping = config.privacy, build_clipping(config, layout)
    assert privacy is not None
    if (feedback := build_error_feedback(privacy, layout)) is not None:
        clipping = feedback.contribution(clipping)
    counts = None
    if isinstance(privacy.clipping, AdaptiveOptions):
        number = len(bounds_of(clipping))
        stddev = privacy.clipping.count_noise
        if stddev is None:
            assert contributions is not None
            # A twentieth of the cohort is Andrew et al.'s choice; z keeps the price of the counts
            # in a small cohort to 15% more noise on the updates.
            stddev = max(contributions / 20, noise_multiplier) * math.sqrt(number)
        counts = CountNoise(number, stddev)
    try:
        return GaussianMechanism(
            noise_multiplier, clipping, counts, per_block=privacy.noise == "per_block"
        )
    except ValueError as error:
        raise InputError(f"privacy.clipping: {error}") from None


def build_clipping(config: ExperimentConfig, layout: Layout) -> ClippingRule:
    """Return the clipping rule of `config` for blocks of `layout`; without privacy none bounds.

    Payloads beside the update are each clipped as a whole, to the bound that `algorithm` gives it.
    """
    if config.privacy is None:
        return Unclipped()
    options, payloads = config.privacy.clipping, config.algorithm.bounds
    rule = build_rule(options, layout.sizes)
    if options.undoes and (multipliers := _multipliers(config.local, layout.names)):
        rule = UndoneClipping(rule, multipliers)
    if not payloads:
        return rule
    return PayloadClipping(("model", *payloads), (rule, *map(GlobalClipping, payloads.values())))


def build_adaptive(options: ClippingOptions) -> AdaptiveBounds | None:
    """Return how the clip bounds follow the norms; None where they are fixed."""
    return options.bounds() if isinstance(options, AdaptiveOptions) else None


def build_error_feedback(privacy: PrivacyConfig | None, layout: Layout) -> ErrorFeedback | None:
    """Return how users' memories enter their contributions; None where they keep none."""
    if privacy is None or privacy.error_feedback.kind == "none":
        return None
    feedback = privacy.error_feedback
    if feedback.variant == "remainder":
        return Remainder(feedback.decay, feedback.norm_cap)
    bound = feedback.memory_bound or privacy.clipping.bound
    second = privacy.clipping.model_copy(update={"bound": bound})
    return Dice(build_rule(second, layout.sizes), feedback.decay, feedback.norm_cap)


def build_example_level(
    config: ExperimentConfig, noise_multiplier: float, layout: Layout
) -> ExampleLevel:
    """Return what happens inside a silo of `config`, whose unit is an example.

    The multiplier is the server's: whoever calibrated it again could get other last digits.

    Raises:
        InputError: the noise on the counts of adaptive clipping costs more than there is.
    """
    assert config.privacy is not None
    level = example_level_of(config, GaussianMechanism(noise_multiplier, GlobalClipping(1.0)))
    gaussian = build_gaussian(config, noise_multiplier, layout, level.contributions)
    return example_level_of(config, gaussian)


def example_level_of(config: ExperimentConfig, gaussian: GaussianMechanism) -> ExampleLevel:
    """Return what happens inside a silo whose steps have the bound and the noise of `gaussian`."""
    privacy, steps = config.privacy, config.local.steps
    assert privacy is not None
    assert privacy.example is not None
    assert steps is not None
    return ExampleLevel(
        mechanism=gaussian,
        sampling_rate=privacy.example.sampling_rate,
        steps=steps,
        adjacency=Adjacency(privacy.adjacency or "add_or_remove_one"),
        silo_size=privacy.example.silo_size,
        adaptive=build_adaptive(privacy.clipping),
    )


def build_node_noise(config: ExperimentConfig, gaussian: GaussianMechanism) -> NodeNoise:
    """Return the noise that a node of `config` adds to its sum: its share, or its users' own."""
    assert config.privacy is not None
    if config.privacy.noise_by == "users":
        return UsersNoise(gaussian)
    return NodeShare(gaussian, build_shares(config))


def build_shares(config: ExperimentConfig) -> NoiseShares:
    """Return the shares of noise that the nodes of `config` add."""
    assert config.privacy is not None
    return NoiseShares(config.runtime.workers, config.privacy.lost_nodes)


def build_randomness(config: ExperimentConfig, data: str) -> Randomness:
    """Return where sampling and noise come from; `data` is the digest of the users' data.

    Runs on different data share neither: the difference of their releases would show that of the
    data, free of noise.
    """
    if config.runtime.deployment:
        return Randomness.operating_system()
    return Randomness.simulation(config.seed, config.fingerprint(data))


def build_local_randomness(config: ExperimentConfig) -> Randomness:
    """Return where the order of examples, dropout and masks come from.

    In a deployment that is a secret of whoever calls, a new one at each call. In a simulation it is
    the seed alone, not the digest of the data: one user less must leave others' draws alone.
    """
    if config.runtime.deployment:
        return Randomness.operating_system()
    return Randomness.simulation(config.seed)
