"""Layer-wise normalisation of the averaged update, before the server's optimizer sees it.

Post-processing of the noisy sum: free of privacy cost. A normaliser maps a dict of blocks, one a
parameter tensor, to a dict with the same keys and shapes; it changes none of its arguments, and
knows neither parameters nor optimizer. It is a function of the blocks and of its options, or a
class that is made with its options and then called with the blocks. What such an object keeps from
round to round, in its attributes or as its `state_dict` says, is in every checkpoint. One whose
class says `knows_noise = True` is called with the blocks and with the standard deviation of the
noise on each, by name.
"""

import io
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fedpriv.components import Kind, Options
from fedpriv.errors import Diverged, InputError
from fedpriv.failures import told_as

Update = dict[str, Tensor]
Normalizer = Callable[..., Update]
#: Where a storage of a checkpoint goes: `torch.load`'s `map_location`.
Place = Callable[[Any, str], Any]


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
    registered={
        "dp_adam_bc": "fedpriv.optimizers.normalizers.dp_adam_bc:DpAdamBc",
        "lanton": "fedpriv.optimizers.normalizers.lanton:Lanton",
        "layer_norm_l2": "fedpriv.optimizers.normalize:layer_norm_l2",
        "root": "fedpriv.optimizers.normalizers.root:Root",
        "scale": "fedpriv.optimizers.normalizers.scale:Scale",
        "sinkgd": "fedpriv.optimizers.normalizers.sinkgd:sinkgd",
        "swan": "fedpriv.optimizers.normalizers.swan:swan",
    },
    base="fedpriv.optimizers.normalize:NormalizerOptions",
    works_on=1,
    group="fedpriv.normalizers",
    refused={
        "ofvl_ms": "it balances the averages of several tasks (Xie et al. 2023), and a normaliser "
        "sees that of all: it is an algorithm here, write algorithm: {name: ofvl_ms, tasks: [...]}",
    },
)


class Normalization:
    """The normaliser of a run, with what it keeps; without options it is off.

    >>> Normalization(NORMALIZERS.parse("layer_norm_l2"))({"w": torch.tensor([3.0, 4.0])})
    {'w': tensor([0.6000, 0.8000])}
    """

    def __init__(self, options: NormalizerOptions | None) -> None:
        self._name = "" if options is None else options.name
        self._made: Normalizer = dict if options is None else NORMALIZERS.of(options).bound(options)
        self._calls = 0
        self.state()  # what no checkpoint can hold is told before anything is spent

    def __call__(self, update: Update, noise: Mapping[str, float] | None = None) -> Update:
        """Return the normalised blocks; `noise` are the deviations of the noise on each.

        Raises:
            Diverged: the normaliser failed.
            InputError: it returned something else.
        """
        self._calls += 1
        known = [dict(noise or {})] if getattr(self._made, "knows_noise", False) else []
        with told_as(f"server.normalize: {self._name} fails", Diverged):
            blocks = self._made(dict(update), *known)
        if not isinstance(blocks, dict) or {k: _shape(b) for k, b in blocks.items()} != {
            k: b.shape for k, b in update.items()
        }:
            raise InputError(
                f"server.normalize: {self._name} must return a dict with the blocks that it was "
                "given, each a tensor of its own shape"
            )
        return blocks

    def state(self) -> Tensor | None:
        """Return what it keeps, as the bytes of a `torch.save`; None where it cannot keep anything.

        Raises:
            InputError: a checkpoint cannot hold it.
        """
        made: Any = self._made
        if isinstance(made, type | FunctionType):
            return None
        buffer, kept = io.BytesIO(), {}
        try:
            kept = made.state_dict() if hasattr(made, "state_dict") else vars(made)
            torch.save(kept, buffer)
            if self._calls < 2:  # later ones are of the same kinds
                _loaded(buffer)
        except Exception:  # pickle raises many kinds, whatever the object's own code does
            raise InputError(
                f"server.normalize: {self._name} keeps what no checkpoint can hold"
                f"{_not_held(kept)}; keep tensors, numbers, texts, lists and dicts, or write "
                "state_dict and load_state_dict"
            ) from None
        return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)

    @property
    def keeps(self) -> object:
        """What it keeps between updates, as an object or a nesting of tensors."""
        made: Any = self._made
        if isinstance(made, type | FunctionType):
            return None
        return made.state_dict() if hasattr(made, "state_dict") else vars(made)

    def load_state(self, packed: Tensor | None, place: Place | None = None) -> None:
        """Keep what `state` returned, `place`d where the model is.

        Raises:
            InputError: there is nothing, or it is another normaliser's.
        """
        made: Any = self._made
        if isinstance(made, type | FunctionType):
            return
        try:
            if packed is None:
                raise ValueError("it has none of its state")
            state = _loaded(io.BytesIO(packed.numpy().tobytes()), place)
            if hasattr(made, "load_state_dict"):
                made.load_state_dict(state)
            else:
                vars(made).update(state)
        except Exception as error:  # whatever the object's own code raises
            raise InputError(
                f"the checkpoint does not fit server.normalize: {self._name} ({error})"
            ) from None


def _shape(block: object) -> object:
    return block.shape if isinstance(block, Tensor) else None


def _not_held(kept: Any) -> str:
    """Say which parts of a state no checkpoint can hold."""
    found = []
    for name, value in dict(kept).items():
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            _loaded(buffer)
        except Exception:  # as where it is saved
            found.append(f"{name} is a {type(value).__name__}")
    return f" ({', '.join(found)})" if found else ""


def _loaded(buffer: io.BytesIO, place: Place | None = None) -> Any:
    buffer.seek(0)
    return torch.load(buffer, map_location=place, weights_only=True)
