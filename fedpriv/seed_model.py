"""A config's seed model: found as a file, or pre-trained on public data and kept as one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedpriv.config import ExperimentConfig, PretrainConfig
from fedpriv.data.registry import DATASETS
from fedpriv.data.speech import FederatedSpeech
from fedpriv.disk import has_no_room
from fedpriv.errors import InputError, Interrupted
from fedpriv.federation.builders import build_spec_augment, build_trainer
from fedpriv.models.parameters import parameters_of
from fedpriv.models.registry import MODELS
from fedpriv.optimizers.server import Server
from fedpriv.tasks.recognition import Recognition
from fedpriv.threads import threads_of_torch
from fedpriv.training.checkpoint import digest_of, write_tensors
from fedpriv.training.cohort import CohortTrainer
from fedpriv.training.pretrain import Listener, Pretraining, measures_of, pretrain
from fedpriv.training.seed_file import load_seed_blocks, read_seed_model, require_used
from fedpriv.training.user_cache import UserCache


def seed_path(config: ExperimentConfig) -> Path:
    """Return where the config's seed model is, or will be; `config.seed_model` is not None."""
    assert config.seed_model is not None
    name = f"seed-{_fingerprint(config)[:12]}.safetensors"
    return config.seed_model.path or Path("runs") / config.name / name


def with_seed_model(
    config: ExperimentConfig, listener: Listener, stop: threading.Event
) -> ExperimentConfig:
    """Return `config` with path and digest of its seed model, which is made where it is missing.

    Raises:
        InputError: the file is missing and nothing says how to make it, or it does not fit.
        Interrupted: a stop was asked for while it was made; call again to resume.
    """
    if config.seed_model is None:
        return config
    path, recipe = seed_path(config), config.seed_model.pretrain
    if recipe is not None and not path.exists():
        make_seed_model(config, recipe, listener, stop)
        if stop.is_set():
            raise Interrupted(f"stopped after pre-training; the seed model is {path}")
    return with_seed_file(config)


def with_seed_file(config: ExperimentConfig) -> ExperimentConfig:
    """Return `config` with path and digest of its seed model, which is never made here.

    One that is missing and can be made is left as the config says.

    Raises:
        InputError: the file is missing and nothing says how to make it, or is another one.
    """
    if config.seed_model is None:
        return config
    path = seed_path(config)
    if config.seed_model.pretrain is not None and not path.exists():
        return config
    digest = digest_of(read_seed_model(path))
    if config.seed_model.sha256 not in (None, digest):
        raise InputError(
            f"seed_model.sha256: {path} holds other numbers ({digest}); take the file that the "
            "config was written for, or leave sha256 out"
        )
    # A run may be continued from another working directory.
    found = config.seed_model.model_copy(update={"path": path.absolute(), "sha256": digest})
    return config.model_copy(update={"seed_model": found})


def load_seed_model(config: ExperimentConfig, model: nn.Module) -> None:
    """Copy the seed model of a config from `with_seed_model` into `model`.

    Raises:
        InputError: it is missing or another one, has other blocks than `model`, or numbers that
            are not finite.
    """
    seed = config.seed_model
    assert seed is not None
    assert seed.sha256 is not None
    load_seed_blocks(seed_path(config), seed.sha256, model, seed.reinitialize)


def read_measures(path: Path) -> dict[str, Any]:
    """Return what was measured of a seed model when it was made; empty for a foreign file."""
    with safe_open(path, framework="pt") as file:
        return dict(json.loads((file.metadata() or {}).get("measures", "{}")))


#: What a run's start is known to be. pretrained: made by fedpriv as the config's own
#: `seed_model.pretrain` says. outside: a file of whose training nothing is known.
Origin = Literal["pretrained", "outside"]


def origin_of(config: ExperimentConfig) -> Origin:
    """Return what the config's seed model is known to be.

    A file that was pre-trained says by which recipe, on which data, and the digest of its numbers:
    all of it must be the config's own.
    """
    assert config.seed_model is not None
    path = seed_path(config)
    with safe_open(path, framework="pt") as file:
        said = file.metadata() or {}
    made = config.seed_model.pretrain is not None and said.get("recipe") == _fingerprint(config)
    intact = said.get("sha256") == digest_of(read_seed_model(path))
    return "pretrained" if made and intact else "outside"


def make_seed_model(
    config: ExperimentConfig, recipe: PretrainConfig, listener: Listener, stop: threading.Event
) -> None:
    """Pre-train the config's seed model and write its file, whole or not at all."""
    whole = config.model_copy(update={"model": config.model.whole(), "seed_model": None})
    training = _pretraining(config, recipe, build_trainer(whole))
    # What begins anew later must be of it: said now, and not when it is trained.
    names = parameters_of(training.model).keys()
    require_used(config.seed_model.reinitialize if config.seed_model else (), names, names)
    path, fingerprint = seed_path(config), _fingerprint(config)
    folder = path.with_suffix(".checkpoints")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"seed_model.path: cannot write {folder} ({error.strerror})") from None
    with threads_of_torch(config.runtime.workers * config.runtime.threads_per_worker):
        pretrain(training, folder, fingerprint, listener, stop)
        measures = measures_of(training)
    _write(path, parameters_of(training.model), measures, fingerprint)
    for file in sorted(folder.glob("round-*")):  # torn ones of a killed process too
        file.unlink()
    with suppress(OSError):  # something else lies there, which is not ours to remove
        folder.rmdir()


def _write(
    path: Path, blocks: Mapping[str, Tensor], measures: Mapping[str, Any], recipe: str
) -> None:
    tensors = {name: t.cpu().contiguous() for name, t in blocks.items()}
    metadata = {
        "format": "fedpriv seed model",
        "measures": json.dumps(measures),
        "recipe": recipe,
        "sha256": digest_of(tensors),
    }
    try:
        write_tensors(path, tensors, metadata)
    except (SafetensorError, OSError) as error:
        if has_no_room(error):
            raise
        raise InputError(f"seed_model.path: cannot write {path} ({error})") from None


def _pretraining(
    config: ExperimentConfig, recipe: PretrainConfig, trainer: CohortTrainer
) -> Pretraining:
    # Of speech alone there are public parts yet.
    if not hasattr(trainer.dataset, "public") or not isinstance(trainer.task, Recognition):
        raise InputError(f"seed_model.pretrain: {config.data.name} has no public part to train on")
    dataset = cast(FederatedSpeech, trainer.dataset)
    if not config.runtime.deployment:
        dataset.require_one_owner()
    return Pretraining(
        dataset=dataset,
        model=trainer.model,
        task=replace(trainer.task, spec_augment=build_spec_augment(recipe.spec_augment)),
        server=Server(
            model=trainer.model,
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            options=recipe.options,
            schedule=recipe.schedule,
            normalize=None,
            rounds=recipe.steps,
        ),
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        max_grad_norm=recipe.max_grad_norm,
        every=recipe.every,
        evaluation_batch=config.evaluation.batch_size,
        seed=config.seed,
        device=trainer.device,
        cache=UserCache(config.runtime.cache_mib * 2**20),
    )


def _fingerprint(config: ExperimentConfig) -> str:
    """Return the SHA-256 of everything that the seed model's numbers depend on."""
    assert config.seed_model is not None
    recipe = config.seed_model.pretrain
    of_users = {"users", "examples_per_user", "partition"}
    kept = {
        "seed": config.seed,
        "data": [
            DATASETS.of(config.data).version,
            config.data.model_dump(mode="json", exclude=of_users),
        ],
        "model": [
            config.model.name,
            MODELS.of(config.model).version,
            config.model.whole().bearing(),
        ],
        "pretrain": recipe and recipe.model_dump(mode="json", exclude={"every"}),
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
