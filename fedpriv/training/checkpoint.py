"""Checkpoints: one safetensors file a round, whole or not there."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedpriv.disk import fsync
from fedpriv.errors import InputError

_NAME = re.compile(r"round-(\d{6})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round`.

    Attributes:
        round: the last finished round.
        fingerprint: the configuration it belongs to.
        tensors: parameters and optimizer state, by name.
        ledger: how many lines the ledger had after its header, and the hash of the last; None
            where there is no ledger.

    There is no generator state to keep: every generator derives from the seed and the round.
    """

    round: int
    fingerprint: str
    tensors: Mapping[str, Tensor]
    ledger: tuple[int, str] | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint durably and atomically, and remove all but the newest `keep`."""
    path = folder / f"round-{checkpoint.round:06d}.safetensors"
    tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
    metadata = {
        "round": str(checkpoint.round),
        "fingerprint": checkpoint.fingerprint,
        "sha256": digest_of(tensors),
    }
    if checkpoint.ledger is not None:
        lines, last_hash = checkpoint.ledger
        metadata |= {"ledger_lines": str(lines), "ledger": last_hash}
    write_tensors(path, tensors, metadata)
    for old in checkpoint_files(folder)[:-keep]:
        old.unlink()
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors as safetensors, durably, whole or not at all.

    Raises:
        OSError: they cannot be written, for example because the disk is full.
    """
    scratch = path.with_suffix(".partial")
    try:
        save_file(dict(tensors), scratch, dict(metadata))
        fsync(scratch)
        scratch.replace(path)
    except SafetensorError as error:
        scratch.unlink(missing_ok=True)
        # The library names the system's error by number, in words.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("round-*.safetensors") if _NAME.match(path.name))


def load_checkpoint(path: Path, fingerprint: str) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        InputError: the file is corrupt, or belongs to another configuration.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checkpoint = Checkpoint(int(metadata["round"]), metadata["fingerprint"], tensors)
        if metadata["sha256"] != digest_of(tensors):
            raise ValueError("its numbers have changed since it was written")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: corrupt checkpoint ({error}); remove it to resume from the one before, or, "
            "where users keep memories, start anew: theirs are those of the newest checkpoint"
        ) from None
    if checkpoint.fingerprint != fingerprint:
        raise InputError(f"{path}: this checkpoint belongs to another configuration")
    return checkpoint


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and numbers of CPU tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
