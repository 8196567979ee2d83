"""What of a model is trained: all, its head, some parameters by name, or adapters beside it.

What is not trained stays as its builder, or a seed model, made it: it is neither bounded nor
noised, sent or kept in checkpoints. Every process builds it anew, and its digest says that all
have the same.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fedpriv.errors import InputError
from fedpriv.models.options import LoraOptions, ModelOptions

#: What the last layer is called: by transformers, by torchvision, by timm and here.
_HEADS = ("classifier", "lm_head", "score", "fc", "heads", "head")


def freeze_the_rest(model: nn.Module, options: ModelOptions) -> None:
    """Leave only what `options.train` names to be trained.

    Raises:
        InputError: the head is not to be found, or a pattern matches nothing.
    """
    if options.train == "all":
        return
    if options.train == "lora":
        wanted = _adapters_and_head(model, options)
    elif options.train == "head":
        wanted = set(head_of(model, options.name))
    else:
        assert not isinstance(options.train, str)
        wanted = _matching(model, options.train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def _adapters_and_head(model: nn.Module, options: ModelOptions) -> set[str]:
    from fedpriv.models.lora import add_adapters

    lora = options.lora or LoraOptions()
    try:
        head = set(head_of(model, options.name))
    except InputError as error:
        if lora.head:
            raise InputError(f"{error}; or, to train adapters alone, lora.head: false") from None
        head = set()
    adapters = add_adapters(model, options, head)
    return adapters | head if lora.head else adapters


def head_of(model: nn.Module, name: str) -> list[str]:
    """Return the names of the parameters of a model's last layer, by its library's convention.

    Raises:
        InputError: none is known.
    """
    layer = _last_with_parameters(_head_by_convention(model))
    if layer is not None:
        # By identity: a tied parameter has the name under which it came first.
        own = {id(parameter) for parameter in layer.parameters()}
        return [each for each, parameter in model.named_parameters() if id(parameter) in own]
    last = [each for each, _ in model.named_parameters()][-1]
    layer_of, dot, _ = last.rpartition(".")
    raise InputError(
        f"model.train: {name} has no layer that is known to be its head; write patterns of "
        f"parameters' names, such as ['{f'{layer_of}.*' if dot else last}']"
    )


def _head_by_convention(model: nn.Module) -> nn.Module | None:
    """Return what timm's models say, or what has one of the known names."""
    say = getattr(model, "get_classifier", None)
    if callable(say):
        said = say()
        return said if isinstance(said, nn.Module) else nn.ModuleList(said)
    named = (getattr(model, each, None) for each in _HEADS)
    return next((each for each in named if isinstance(each, nn.Module)), None)


def _last_with_parameters(layer: nn.Module | None) -> nn.Module | None:
    """Return the last of several layers in a row: those before it are no classifier."""
    if layer is None or not any(True for _ in layer.parameters()):
        return None
    if not isinstance(layer, nn.Sequential):
        return layer
    return next(
        each for each in map(_last_with_parameters, reversed(list(layer.children()))) if each
    )


def _matching(model: nn.Module, patterns: tuple[str, ...]) -> set[str]:
    """Return the names of parameters that match one of `patterns`.

    Raises:
        InputError: a pattern matches none.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0) or names
            raise InputError(
                f"model.train: no parameter matches {pattern!r}; there are, for example, "
                f"{', '.join(close[:3])}"
            )
        found |= matches
    return found


def frozen_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all that is not trained, constants included, on the CPU; empty where all is."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        return {}
    trained = {id(each) for each in model.parameters() if each.requires_grad}
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in trained
    }


def start_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and constants of a model, on the CPU."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
