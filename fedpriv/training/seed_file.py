"""The file of a seed model: the blocks that a model begins with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedpriv.errors import InputError
from fedpriv.training.checkpoint import digest_of

#: What to write in the place of a file that is no seed model.
_INSTEAD = "write a .safetensors file, such as that of fedpriv export RUN --to safetensors"

#: How many blocks that differ are named, and by how many patterns they may be named.
_SHOWN = 3


def read_seed_model(path: Path) -> dict[str, Tensor]:
    """Return the blocks in a seed model's file.

    Raises:
        InputError: it cannot be read.
    """
    if not path.exists():
        raise InputError(f"seed_model.path: there is no {path}; name a file that is there")
    if path.is_dir():
        raise InputError(f"seed_model.path: cannot read {path} (it is a folder); {_INSTEAD}")
    try:
        with safe_open(path, framework="pt") as file:
            blocks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"seed_model.path: cannot read {path} ({said}); {_INSTEAD}") from None
    if not blocks:
        raise InputError(f"seed_model.path: {path} holds no numbers; {_INSTEAD}")
    return blocks


def load_seed_blocks(
    path: Path, sha256: str, model: nn.Module, reinitialize: Sequence[str] = ()
) -> None:
    """Copy the blocks of the file at `path` into `model`: its parameters, and what else it has.

    What matches a pattern of `reinitialize` stays as it is in `model`, and is not read of the file.
    A parameter of several names, one that is tied, may have any of them in the file.

    Raises:
        InputError: it is missing or another one, has other blocks than `model`, or numbers that
            are not finite or of another kind; or a pattern matches no parameter, or all match one.
    """
    blocks = read_seed_model(path)
    if sha256 != digest_of(blocks):
        raise InputError(f"seed_model.path: {path} is not the file that this run began with")
    first = _first_names(model)
    require_used(reinitialize, blocks.keys(), first.keys())
    anew = {first[name] for name in _matched(first, reinitialize)}
    dropped = _matched(blocks, reinitialize)
    kept = {name: block for name, block in blocks.items() if name not in dropped}
    blocks = _under_first_names(path, kept, first)
    blocks = {name: block for name, block in blocks.items() if name not in anew}
    own: dict[str, Tensor] = {
        name: p
        for name, p in model.named_parameters()
        if name not in anew and (p.requires_grad or name in blocks)
    }
    constants = dict(model.named_buffers())
    own |= {name: constants[name] for name in blocks.keys() & constants.keys()}
    if not blocks or not own:
        raise InputError(
            "seed_model.reinitialize: every parameter matches, so that nothing of the seed model "
            "is used; leave seed_model out"
        )
    _require_same(path, blocks, own)
    numbers = {name: _as_numbers_of(path, name, blocks[name], own[name]) for name in blocks}
    with torch.no_grad():
        for name, block in numbers.items():
            own[name].copy_(block)


def require_used(
    patterns: Iterable[str], of_file: Collection[str], of_model: Collection[str]
) -> None:
    """Check that each of the patterns of what begins anew matches a name of file or model.

    Raises:
        InputError: one does not.
    """
    for pattern in patterns:
        if not _matched({*of_file, *of_model}, [pattern]):
            last = ", ".join(list(of_model)[-3:])
            raise InputError(
                f"seed_model.reinitialize: no parameter matches {pattern!r}; the model's last ones "
                f"are {last}"
            )


def _matched(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, each) for each in patterns)}


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return for each name of a parameter the one that comes first; a tied one has several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every}


def _under_first_names(
    path: Path, blocks: Mapping[str, Tensor], first: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the blocks of a file by the names that the model's parameters go by.

    The model alone says which are tied. The file's metadata do too, but are no part of its digest,
    by which a run knows what it began with.

    Raises:
        InputError: two blocks are one in the model, and differ in the file.
    """
    found: dict[str, Tensor] = {}
    for name in sorted(blocks):
        of_model = first.get(name, name)
        if of_model in found and not torch.equal(found[of_model], blocks[name]):
            raise InputError(
                f"seed_model.path: {path} holds two blocks, {name} another one, for what is one "
                "in the config's model, whose weights are tied; write a model without ties"
            )
        found[of_model] = blocks[name]
    return found


def _as_numbers_of(path: Path, name: str, block: Tensor, own: Tensor) -> Tensor:
    """Return a block of the file as the model's kind of number.

    Of floating numbers any width will do. Integers are none: they are codes of quantised weights,
    or something else, and their values mean nothing as weights.

    Raises:
        InputError: it is of another kind, or not finite.
    """
    floating = block.is_floating_point() and own.is_floating_point()
    if not floating and block.dtype != own.dtype:
        kinds = [str(each.dtype).removeprefix("torch.") for each in (block, own)]
        raise InputError(
            f"seed_model.path: {path} holds {name} as {kinds[0]}, and the model's is {kinds[1]}; "
            "write a file with numbers of the model's kind, not quantised ones"
        )
    numbers = block.to(own.dtype)
    if not bool(numbers.isfinite().all()):
        raise InputError(
            f"seed_model.path: {path} holds a NaN or Inf in {name}; write a file of finite numbers"
        )
    return numbers


def _require_same(path: Path, blocks: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    every = sorted(blocks.keys() | own.keys())
    fitting = {name for name in blocks.keys() & own.keys() if blocks[name].shape == own[name].shape}
    differing = [name for name in every if name not in fitting]
    if not differing:
        return
    told = [_two_shapes(name, blocks, own) for name in differing[:_SHOWN]]
    if len(differing) > _SHOWN:
        told.append(f"and {len(differing) - _SHOWN} more")
    raise InputError(
        f"seed_model.path: {path} is of another shape than the config's model "
        f"({', '.join(told)}); {_advice(differing, fitting, blocks, own)}"
    )


def _two_shapes(name: str, blocks: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    there, here = (list(of[name].shape) if name in of else "missing" for of in (blocks, own))
    return f"{name} is {there} there and {here} in the model"


def _advice(
    differing: Sequence[str],
    fitting: Collection[str],
    blocks: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> str:
    """Say what to write: patterns only where they are few and something of the file is left."""
    layers = dict.fromkeys(_layer_of(name) for name in differing)
    patterns = [
        each
        for each in layers
        if not any(fnmatchcase(each, other) for other in layers if other != each)
    ]
    if len(patterns) <= _SHOWN and len(_matched(fitting, patterns)) < len(fitting):
        return (
            "write the model that it was made for, or name what begins anew: "
            f"seed_model.reinitialize: [{', '.join(patterns)}]"
        )
    if set(differing) - blocks.keys() and set(differing) - own.keys():
        return (
            "these are names of another model, or of another format, such as that of --to hf; "
            "write the file of fedpriv export RUN --to safetensors"
        )
    return "write the model that it was made for"


def _layer_of(name: str) -> str:
    """Return a pattern of all parameters of a parameter's layer."""
    layer, dot, _ = name.rpartition(".")
    return f"{layer}.*" if dot else name
