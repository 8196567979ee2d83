"""The parameters that a training starts from, as a function of one seed."""

import torch
from torch import Tensor, nn

from fedpriv.models.vit import LearnedPositions

POSITION_STD = 0.02


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Overwrite the parameters of known layers; equal seeds give equal parameters, bit for bit.

    - linear weights: normal with standard deviation 1/√(inputs), cut at two deviations, which
      keeps the scale of activations at any width (0.02 fits widths near 2,500 and starves the
      small ones that a few private rounds have to train);
    - learned positions: normal with standard deviation 0.02, cut likewise;
    - biases 0; norms 1 and 0.

    Numbers are drawn on the CPU from a generator of their own, in the order of `model.modules()`:
    they do not depend on the model's device, and no global generator moves. A layer of a kind not
    named here keeps the numbers that its builder gave it.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _fill(module.weight, module.in_features**-0.5, generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, LearnedPositions):
            _fill(module.weight, POSITION_STD, generator)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()


def _fill(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    if parameter.is_meta:  # it has a shape and no numbers, and may be too large to draw any
        return
    values = torch.empty(parameter.shape, device="cpu")
    nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=generator)
    parameter.copy_(values)
