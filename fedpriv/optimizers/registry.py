"""The server's optimizers by name: those of torch.optim, then those of pytorch_optimizer.

The server hands an optimizer the averaged noisy update as if it were a gradient, once a round,
and nothing else: neither a loss, nor a closure, nor the model. `UNSUITABLE` lists what cannot
work so; everything else in the two libraries is available.

pytorch_optimizer is imported when something of it is asked for: it takes half a second.
"""

import difflib
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from fedpriv.errors import InputError
from fedpriv.optimizers.kinds import OPTIMIZERS
from fedpriv.sections import refuse_truth

OptimizerClass = type[torch.optim.Optimizer]

_CLOSURE = "it evaluates the loss in its step, and the server has no data"
_CURVATURE = "it needs second derivatives of the loss, and the server has no data"
_MODEL = "it takes over the model's own backward pass"
_SCHEDULED = "it brings a learning rate schedule of its own: use server.schedule"
_OTHER_RANDOMNESS = "it draws from a global generator other than torch's: no run could be repeated"
_AVERAGED = "the model to use is a running average that it keeps to itself, not its parameters"

UNSUITABLE: dict[str, str] = {
    "lbfgs": _CLOSURE,
    "alig": _CLOSURE,
    "bsam": _CLOSURE,
    "emofact": _CLOSURE,
    "emolynx": _CLOSURE,
    "emonavi": _CLOSURE,
    "adahessian": _CURVATURE,
    "sophiah": _CURVATURE,
    "adalomo": _MODEL,
    "adammini": _MODEL,
    "lomo": _MODEL,
    "schedulefreeadamw": _AVERAGED,
    "schedulefreeradam": _AVERAGED,
    "schedulefreesgd": _AVERAGED,
    "splus": _AVERAGED,
    "apollodqn": _SCHEDULED,
    "ranger21": _SCHEDULED,
    "a2grad": "it has no learning rate for server.lr and server.schedule to set",
    "adashift": "its first ten steps leave the model as it is",
    "demo": "it exchanges gradients between processes of its own",
    "distributedmuon": "it exchanges gradients between processes of its own",
    "kron": _OTHER_RANDOMNESS,
    "sara": _OTHER_RANDOMNESS,
    "lorarite": "it only trains pairs of LoRA factors",
    "magma": "it wraps another optimizer",
    "muonclip": "it needs the attention logits of the forward pass",
    "scalableshampoo": "its state holds objects that no safe checkpoint can",
    "sparseadam": "it takes sparse gradients only",
    "spectralsphere": "it takes matrices only",
}
"""Names that `available_optimizers` leaves out, each with the reason that its user is told."""

# torch's Muon takes matrices only; pytorch_optimizer's has a group for all other parameters.
_NOT_FROM_TORCH = {"muon"}

_SPLIT_MATRICES = {"adago", "adamuon", "muon", "normuon"}
_PROJECTED = {"fira", "galore"}

# Projection settings are keyword arguments that the library's signatures do not show; without
# them these two silently are Adam.
_PROJECTION_HINTS: dict[str, Any] = {
    "rank": int,
    "update_proj_gap": int,
    "scale": float,
    "projection_type": Literal["std", "reverse_std", "right", "left", "full", "random"],
}
_PROJECTION = {"rank": 16, "update_proj_gap": 200, "scale": 1.0, "projection_type": "std"}

# Where our default is not the library's. Reasons: see `server_optimizer`.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "lamb": {
        "adam_debias": True,
        "weight_decouple": False,
        "pre_norm": False,
        "weight_decay": 0.0,
    },
    "fira": _PROJECTION,
    "galore": {**_PROJECTION, "scale": 0.25},
}

_TYPES = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)

# `lr` is server.lr; the others would turn the step around, or serve autograd and CUDA graphs alone.
_NOT_OPTIONS = {"lr", "maximize", "differentiable", "capturable"}


def state_types() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return what state dicts hold besides tensors and plain values.

    Allow these with `torch.serialization.safe_globals(state_types())` to load a checkpoint with
    `weights_only=True`.
    """
    from pytorch_optimizer.optimizer.scion import LMONorm
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    return [GaLoreProjector, LMONorm]


def server_optimizer(
    name: str, parameters: list[nn.Parameter], lr: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build the named optimizer over the parameters, with base learning rate `lr`.

    Names ignore case, `-` and `_`. `options` are keyword arguments of the optimizer; lists become
    tuples where it wants those. Each parameter group keeps its base rate as `initial_lr` (see
    `scale_learning_rates`).

    **lamb** is LAMB of You et al. (ICLR 2020), Algorithm 2, for each parameter tensor θ_h:

        m = β₁m + (1-β₁)g,  v = β₂v + (1-β₂)g²,  r = m/(√v + ε),
        θ_h ← θ_h - lr · ‖θ_h‖/‖Δ_h‖ · Δ_h,  Δ_h = r + λθ_h,  ratio 1 where a norm is 0.

    Set against pytorch_optimizer: `adam_debias` on, since the library else divides the rate by
    1-β₁ᵗ (ten times the rate in round 1); `weight_decouple` off, since the paper's decay is inside
    Δ_h and so under the trust ratio; no cap of ‖θ_h‖ at 10, since φ is the identity here;
    `pre_norm` off and λ = `weight_decay` = 0, as there. m and v are not bias-corrected: with λ = 0
    the trust ratio cancels the corrections, except that ε weighs 1/√(1-β₂ᵗ) times as much (32 in
    round 1). Updates are clipped, so their numbers can lie far below ε = 1e-6: lower `eps` then.

    **muon, adamuon, normuon, adago** orthogonalise the matrices, and give all other parameters to
    AdamW at `adamw_lr`. **fira, galore** project matrices to `rank` (ours: 16) every
    `update_proj_gap` steps; so does **apollo**, which is ours (`Apollo`), since the library's is
    not the published one.

    Raises InputError naming `server.optimizer` for a name that is unknown or in `UNSUITABLE`,
    `server.options.<key>` for an option that is unknown or has an impossible value, and
    `server.lr`.

    >>> server_optimizer("Lamb", [nn.Parameter(torch.ones(2, 2))], 0.01, {"betas": [0.9, 0.99]})
    ... # doctest: +ELLIPSIS
    Lamb...
    """
    key = _key(name)
    optimizer_class = _optimizer_class(name)
    values = _checked_options(key, optimizer_class, options)
    built = _without_compiler(optimizer_class)  # type: ignore[arg-type]
    optimizer = _construct(key, built, parameters, lr, values)
    if key == "lamb":
        optimizer.clamp = math.inf  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


@cache
def _without_compiler(optimizer_class: OptimizerClass) -> OptimizerClass:
    """Return a class of our own that is `optimizer_class` and works without `torch.compile`.

    torch hides its optimizers' methods from the compiler at their first call, for which it imports
    all of it: a second that no run has a use for. Here they are the functions that it hides.
    """
    methods = {
        name: inspect.unwrap(getattr(torch.optim.Optimizer, name))
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
        if getattr(optimizer_class, name) is getattr(torch.optim.Optimizer, name)
    }
    if optimizer_class.__module__.startswith("torch."):
        methods["step"] = torch.no_grad()(inspect.unwrap(optimizer_class.step))
    return type(optimizer_class.__name__, (optimizer_class,), methods)


def available_optimizers() -> list[str]:
    """Return the names that `server_optimizer` takes, sorted: both libraries less `UNSUITABLE`."""
    return sorted(_all_optimizers().keys() - UNSUITABLE.keys())


def optimizer_options(name: str) -> list[str]:
    """Return the names of the options that an available optimizer takes, sorted."""
    return sorted(_option_hints(_key(name), _optimizer_class(name)))


def library_of(name: str) -> str:
    """Return the library that an optimizer of `available_optimizers` or `UNSUITABLE` is from.

    Of one that is ours it is the paper.
    """
    if name == "apollo":
        return "Zhu et al. 2024"
    return "torch.optim" if name in _of_torch() else "pytorch_optimizer"


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


@cache
def _of_torch() -> dict[str, OptimizerClass]:
    """Return torch's optimizers by lower-case name, but those that the other library's replace."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
        and name.lower() not in _NOT_FROM_TORCH
    }


@cache
def _all_optimizers() -> dict[str, OptimizerClass]:
    """Return both libraries' optimizers by lower-case name, torch's before the other's."""
    import pytorch_optimizer

    found = {
        name: pytorch_optimizer.load_optimizer(name)
        for name in pytorch_optimizer.get_supported_optimizers()
    }
    from fedpriv.optimizers.apollo import Apollo

    return found | _of_torch() | {"apollo": Apollo}


def _optimizer_class(name: str) -> OptimizerClass:
    if ":" in name:
        return _from_outside(name)
    key = _key(name)
    if key in UNSUITABLE:
        raise InputError(f"server.optimizer: {name} cannot be the server's, {UNSUITABLE[key]}")
    found = _of_torch().get(key) or _all_optimizers().get(key)
    if found is None:
        close = difflib.get_close_matches(key, available_optimizers(), n=3)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else "write the name of one of torch.optim or pytorch_optimizer, such as lamb or adam"
        )
        raise InputError(f"server.optimizer: unknown optimizer {name!r}; {hint}")
    return found


def _from_outside(name: str) -> OptimizerClass:
    made = OPTIMIZERS.find(name).make
    if not isinstance(made, type) or not issubclass(made, torch.optim.Optimizer):
        raise InputError(f"server.optimizer: {name} is not a subclass of torch.optim.Optimizer")
    return made


def _option_hints(key: str, optimizer_class: OptimizerClass) -> dict[str, Any]:
    """Return the type of each option that the optimizer takes."""
    _, *arguments = inspect.signature(optimizer_class).parameters.values()
    hints = typing.get_type_hints(optimizer_class.__init__)
    named = {
        argument.name: hints.get(argument.name, Any)
        for argument in arguments
        if argument.kind is not argument.VAR_KEYWORD and argument.name not in _NOT_OPTIONS
    }
    return named | (_PROJECTION_HINTS if key in _PROJECTED else {})


def _checked_options(
    key: str, optimizer_class: OptimizerClass, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options with the types that the optimizer declares."""
    hints = _option_hints(key, optimizer_class)
    values = {}
    for name, value in options.items():
        if name not in hints:
            raise InputError(
                f"server.options.{name}: {key} has no such option, it takes "
                f"{', '.join(sorted(hints))}"
            )
        adapter = TypeAdapter(hints[name], config=_TYPES)
        try:
            values[name] = adapter.validate_python(refuse_truth(value, hints[name]))
        except ValueError as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise InputError(f"server.options.{name}: {reason}, got {value!r}") from error
    return values


def _construct(
    key: str,
    optimizer_class: OptimizerClass,
    parameters: list[nn.Parameter],
    lr: float,
    values: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Call the optimizer's class; where it refuses, find the value that it refuses."""
    groups = _groups(key, parameters)
    defaults = _DEFAULTS.get(key, {})
    try:
        return optimizer_class(groups, lr=lr, **{**defaults, **values})  # type: ignore[call-arg]
    except Exception as error:  # the libraries raise many kinds, some of them their own
        if not values:
            raise InputError(f"server.lr: {key} refuses {lr}: {error}") from error
        _construct(key, optimizer_class, parameters, lr, {})
        if len(values) > 1:
            for name, value in values.items():
                _construct(key, optimizer_class, parameters, lr, {name: value})
        raise InputError(f"server.options.{', '.join(values)}: {key} refuses: {error}") from error


def _groups(key: str, parameters: list[nn.Parameter]) -> list[Any]:
    """Return what the optimizer takes: the parameters, or for Muon's kin matrices and others."""
    if key not in _SPLIT_MATRICES:
        return parameters
    groups = [
        {"params": [p for p in parameters if (p.ndim == 2) == matrices], "use_muon": matrices}
        for matrices in (True, False)
    ]
    return [group for group in groups if group["params"]]
