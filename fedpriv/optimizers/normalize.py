"""Layer-wise normalisation of the averaged update, before the server's optimizer sees it.

Post-processing of the noisy sum: free of privacy cost. A normaliser maps a dict of blocks, one a
parameter tensor, to a dict with the same keys, shapes and dtypes; it changes none of its
arguments, and knows neither parameters nor optimizer. A new one is a function and one line in
`NORMALIZERS`.
"""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

from fedpriv.errors import InputError

Update = dict[str, Tensor]
Normalizer = Callable[[Update], Update]


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


NORMALIZERS: dict[str, Normalizer] = {"layer_norm_l2": layer_norm_l2}


def normalizer(name: str | None) -> Normalizer:
    """Return the normaliser of that name; None is off: the update itself.

    Raises InputError naming `server.normalize` for an unknown name.

    >>> normalizer("layer_norm_l2")({"w": torch.tensor([3.0, 4.0])})
    {'w': tensor([0.6000, 0.8000])}
    """
    if name is None:
        return dict
    if name not in NORMALIZERS:
        close = difflib.get_close_matches(name, NORMALIZERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(
            f"server.normalize: unknown normaliser {name!r}, known are "
            f"{', '.join(sorted(NORMALIZERS))}{hint}"
        )
    return NORMALIZERS[name]
