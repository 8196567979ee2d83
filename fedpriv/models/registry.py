"""The models by name, and the `model:` section of an experiment's configuration.

A new model is a file with a builder, and one line in `MODELS`.
"""

import difflib
from collections.abc import Callable

import torch
from pydantic import ConfigDict, Field
from torch import nn

from fedpriv.errors import InputError
from fedpriv.models.fitness import require_separate_users
from fedpriv.models.initialise import initialise
from fedpriv.models.positions import PositionKind
from fedpriv.models.speech import SpeechTransformer
from fedpriv.models.transformer import NormName, NormPlacement
from fedpriv.models.vit import Pooling, ViT
from fedpriv.sections import Section


class ModelConfig(Section):
    """Which model is trained, and its shape."""

    model_config = ConfigDict(protected_namespaces=())

    name: str = Field(default="vit", description="name of the model in the registry")
    dim: int = Field(
        default=64, gt=0, le=65536, description="width of a token's vector (numbers); 1 to 65536"
    )
    depth: int = Field(
        default=4, gt=0, le=1024, description="number of transformer blocks; 1 to 1024"
    )
    heads: int = Field(
        default=4, gt=0, le=1024, description="attention heads in a block; 1 or more, divides dim"
    )
    patch: int = Field(
        default=2,
        gt=0,
        description="side of an image patch (pixels); 1 or more, divides the image's height and "
        "width",
    )
    mlp_ratio: float = Field(
        default=4.0,
        gt=0,
        le=64,
        description="hidden width of a block's MLP as a multiple of dim; above 0, at most 64",
    )
    norm: NormName = Field(
        default="layernorm",
        description="layernorm: centre and scale each token; rmsnorm: scale only",
    )
    norm_placement: NormPlacement = Field(
        default="pre",
        description="where a block normalises: pre, before its function; post, after the residual "
        "sum; peri, before and after its function; mix, post in the first quarter of the blocks "
        "and pre in the others (all pre below 4 blocks)",
    )
    pooling: Pooling = Field(
        default="mean",
        description="what the head reads: mean, the average of the final tokens; class, a token "
        "of its own",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that a number is dropped in training; 0 to below 1",
    )
    layer_drop: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that an example skips a block in training; 0 to below 1",
    )
    mels: int = Field(
        default=80, gt=0, le=512, description="speech: mel bands of the spectrogram; 1 to 512"
    )
    positions: PositionKind = Field(
        default="sinusoidal",
        description="speech: sinusoidal, fixed; cape, the same with random shift and scale in "
        "training",
    )


def _build_vit(config: ModelConfig, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    if len(input_shape) != 3:
        raise InputError(
            f"model.name: vit reads images (channels, height, width), the data are {input_shape}"
        )
    channels, height, width = input_shape
    if height % config.patch or width % config.patch:
        raise InputError(
            f"model.patch must divide the image's sides, got {config.patch} for {height}x{width}"
        )
    shape = config.model_dump(exclude={"name", "mels", "positions"})
    return ViT((channels, height, width), classes, **shape)


def _build_speech(config: ModelConfig, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    if len(input_shape) != 1:
        raise InputError(
            f"model.name: speech reads waveforms, the data are of shape {input_shape}; write vit"
        )
    if config.dim % 2:
        raise InputError(f"model.dim must be even for sinusoidal positions, got {config.dim}")
    shape = config.model_dump(exclude={"name", "patch", "pooling"})
    return SpeechTransformer(input_shape[0], classes, **shape)


MODELS: dict[str, Callable[[ModelConfig, tuple[int, ...], int], nn.Module]] = {
    "speech": _build_speech,
    "vit": _build_vit,
}


def build_model(
    config: ModelConfig, input_shape: tuple[int, ...], classes: int, seed: int
) -> nn.Module:
    """Build the model that the config names, for one example's shape and a number of classes.

    Equal arguments give equal parameters, bit for bit (see `initialise`), and the global random
    state of the CPU is left as it was. Under `with torch.device("meta")` no memory is taken.
    Raises InputError, naming the key, for an unknown name, for a shape that cannot be built, and
    for a model whose users would share more than its parameters.

    >>> model = build_model(ModelConfig(dim=16, depth=2), (1, 8, 8), classes=10, seed=17)
    >>> model(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """
    if config.name not in MODELS:
        close = difflib.get_close_matches(config.name, MODELS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(
            f"model.name: unknown model {config.name!r}, known are "
            f"{', '.join(sorted(MODELS))}{hint}"
        )
    if config.dim % config.heads:
        raise InputError(
            f"model.heads must divide model.dim, got {config.heads} heads for dim {config.dim}"
        )
    # The layers' own constructors draw from the global generator; what they draw is overwritten.
    with torch.random.fork_rng(devices=[]):
        model = MODELS[config.name](config, input_shape, classes)
    require_separate_users(model, config.name)
    initialise(model, seed)
    return model
