"""Layer-wise normalisation of the averaged update, before the server's optimizer sees it.

Post-processing of the noisy sum: free of privacy cost. A normaliser maps a dict of blocks, one a
parameter tensor, to a dict with the same keys and shapes; it changes none of its arguments, and
knows neither parameters nor optimizer. It is a function of the blocks and of its options, or a
class that is made with its options and then called with the blocks.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from fedpriv.components import Kind, Options
from fedpriv.errors import InputError

Update = dict[str, Tensor]
Normalizer = Callable[[Update], Update]


class NormalizerOptions(Options):
    """How the averaged update is normalised; each normaliser adds its own options."""

    name: str = Field(description="name of the normaliser, or package.module:object for your own")


def layer_norm_l2(update: Update) -> Update:
    """Return g_h / ‖g_h‖₂ for each block g_h; a block of zeros stays as it is.

    The norm is taken in float64, the result has the block's dtype. A block with a NaN or an
    infinite number becomes NaN in part or whole: the noisy sum of bounded contributions has none.
    """
    return {name: _unit(block) for name, block in update.items()}


def _unit(block: Tensor) -> Tensor:
    precise = block.double()
    norm = torch.linalg.vector_norm(precise)
    return (precise / torch.where(norm == 0, 1.0, norm)).to(block.dtype)


NORMALIZERS = Kind(
    key="server.normalize",
    noun="normaliser",
    registered={"layer_norm_l2": "fedpriv.optimizers.normalize:layer_norm_l2"},
    base="fedpriv.optimizers.normalize:NormalizerOptions",
    works_on=1,
    group="fedpriv.normalizers",
)


def normalizer(options: NormalizerOptions | None) -> Normalizer:
    """Return the normaliser of these options; None is off: the update itself.

    >>> normalizer(NORMALIZERS.parse("layer_norm_l2"))({"w": torch.tensor([3.0, 4.0])})
    {'w': tensor([0.6000, 0.8000])}
    """
    if options is None:
        return dict
    made: Normalizer = NORMALIZERS.of(options).bound(options)

    def normalized(update: Update) -> Update:
        blocks = made(dict(update))
        if not isinstance(blocks, dict) or {k: b.shape for k, b in blocks.items()} != {
            k: b.shape for k, b in update.items()
        }:
            raise InputError(
                f"server.normalize: {options.name} must return a dict with the blocks that it was "
                "given, each of its own shape"
            )
        return blocks

    return normalized
