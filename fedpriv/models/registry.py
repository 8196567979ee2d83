"""The models: those known by name, and how any is built.

A new model is a file with its options and a builder, and one line in `MODELS`.
"""

from collections.abc import Callable

from torch import nn

from fedpriv.components import Kind
from fedpriv.draws import drawing_from
from fedpriv.errors import InputError
from fedpriv.models.convert import batch_to_group_norms
from fedpriv.models.fitness import require_separate_users
from fedpriv.models.initialise import initialise
from fedpriv.models.options import ModelOptions
from fedpriv.models.trained_part import freeze_the_rest

MODELS = Kind(
    key="model",
    noun="model",
    registered={
        "gpt": "fedpriv.models.gpt:build_gpt",
        "speech": "fedpriv.models.speech:build_speech",
        "vit": "fedpriv.models.vit:build_vit",
    },
    base="fedpriv.models.options:ModelOptions",
    facts=("input_shape", "classes"),
    group="fedpriv.models",
    default="vit",
)


def build_model(
    options: ModelOptions,
    input_shape: tuple[int, ...],
    classes: int,
    seed: int,
    pretrained: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Build the model that `options` are of, for one example's shape and a number of classes.

    Equal arguments give equal parameters, bit for bit, and global random states are left as they
    were: a builder draws from generators that start at `seed`. Our own models are
    built under `with torch.device("meta")` without taking memory. `pretrained` may put other
    numbers into the whole model, before what is not trained of it is frozen.

    Raises:
        InputError: the model cannot be built so, or its users would share more than its parameters.

    >>> import torch
    >>> from fedpriv.models.vit import ViTOptions
    >>> model = build_model(ViTOptions(dim=16, depth=2), (1, 8, 8), classes=10, seed=17)
    >>> model(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """
    component = MODELS.of(options)
    with drawing_from(seed):
        model = component.build(options, input_shape=input_shape, classes=classes)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model.name: {options.name} made a {type(model).__name__}, and must return a "
            "torch.nn.Module"
        )
    if options.convert == "groupnorm":
        model = batch_to_group_norms(model)
    require_separate_users(model, options.name)
    if options.initialise == "fedpriv":
        initialise(model, seed)
    if pretrained is not None:
        pretrained(model)
    with drawing_from(seed):
        freeze_the_rest(model, options)
    return model
