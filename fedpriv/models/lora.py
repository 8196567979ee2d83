"""Low-rank adapters by `peft`: W + s·B·A in the place of a frozen W (Hu et al. 2022).

A user's update has the numbers of A and B alone, and so has the noise.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Set
from importlib.util import find_spec
from typing import Any

from torch import nn

from fedpriv.errors import InputError
from fedpriv.imports import command_for
from fedpriv.models.options import LoraOptions, ModelOptions
from fedpriv.threads import threads_of_torch

# What peft can adapt, where it is asked to by name; linear maps also where it is not.
_LINEAR = ("Linear", "NonDynamicallyQuantizableLinear", "Conv1D")
_OTHERS = ("Conv1d", "Conv2d", "Embedding")


def add_adapters(model: nn.Module, options: ModelOptions, head: Set[str]) -> set[str]:
    """Put adapters into `model`, in place, and return the names of what is trained.

    `head` are the names of its head's parameters, which are adapted only where that is asked for.

    Raises:
        InputError: peft is not installed, or cannot adapt what is to be adapted.
    """
    if find_spec("peft") is None:
        raise InputError(f"model.train: lora needs peft: {command_for('peft')}")
    from peft import LoraConfig, inject_adapter_in_model

    lora = options.lora or LoraOptions()
    layers = _layers(model, lora, options.name, head)
    begins: bool | str = True
    if lora.variant == "pissa" and not next(model.parameters()).is_meta:  # of shapes there is none
        begins = "pissa"
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha or 2 * lora.r,  # type: ignore[arg-type]  # it may be any number
        target_modules="|".join(map(re.escape, layers)),
        lora_dropout=0.0,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        init_lora_weights=begins,  # type: ignore[arg-type]
    )
    with warnings.catch_warnings(), threads_of_torch(1):
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        try:
            inject_adapter_in_model(config, model)
        except (ValueError, TypeError, NotImplementedError) as error:
            said = " ".join(str(error).split())
            raise InputError(f"model.lora: peft cannot adapt {options.name}: {said}") from None
    return {name for name, _ in model.named_parameters() if ".lora_" in name}


def merged(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose adapters are added to what they adapt, under its own names."""
    whole = copy.deepcopy(model)
    if find_spec("peft") is None:
        return whole
    for path, layer in adapters_of(whole):
        layer.merge(safe_merge=True)
        whole.set_submodule(path, layer.get_base_layer())
    vars(whole).pop("peft_config", None)  # which says that there are adapters
    return whole


def adapters_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the adapters in `model`, each a layer of `peft` in an adapted one's place, by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _layers(model: nn.Module, lora: LoraOptions, name: str, head: Set[str]) -> list[str]:
    """Return the paths of the layers that are adapted.

    Raises:
        InputError: there are none, or one that has its weights together with another.
    """
    there = dict(_adaptable(model))
    if lora.target_modules is None:
        found = [
            path
            for path, (kind, shared) in there.items()
            if kind in _LINEAR and not shared and f"{path}.weight" not in head
        ]
        if not found:
            raise InputError(f"model.train: {name} has no linear map to put adapters beside")
        return found
    chosen: dict[str, None] = {}
    for end in lora.target_modules:
        named = [path for path in there if path == end or path.endswith(f".{end}")]
        if not named:
            ends = sorted({path.rpartition(".")[2] for path in there})
            raise InputError(
                f"model.lora.target_modules: {name} has no layer {end!r} that can be adapted; "
                f"there are {', '.join(ends) or 'none'}"
            )
        chosen |= dict.fromkeys(named)
    if tied := [path for path in chosen if there[path][1]]:
        raise InputError(
            f"model.lora.target_modules: {tied[0]} has its weights together with another layer, "
            "which an adapter would part; leave it out"
        )
    if whole := [path for path in chosen if lora.head and f"{path}.weight" in head]:
        raise InputError(
            f"model.lora.target_modules: {whole[0]} is the head, which is trained whole; leave it "
            "out, or write lora.head: false"
        )
    return list(chosen)


def _adaptable(model: nn.Module) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Yield layers by path, each with its kind, and whether another one has the same weights.

    Those inside `nn.MultiheadAttention` are read as weights, past any adapter.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    past: set[nn.Module] = set()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            past |= set(layer.modules())
        kinds = [each.__name__ for each in type(layer).__mro__]
        kind = next((each for each in kinds if each in _LINEAR + _OTHERS), None)
        if path and kind is not None and layer not in past:
            yield path, (kind, uses[id(layer.weight)] > 1)
