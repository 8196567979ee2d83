"""A GPU that is none: tensors that say they are on a CUDA device and hold their numbers on the CPU.

Where there is no GPU, this finds what only a GPU would show. PyTorch's dispatcher sees CUDA
tensors, so CUDA's own rules hold for what autocast rounds; an operation on tensors of two devices
is refused as a GPU's kernels refuse it; and whatever makes the host wait for the GPU is noted.
Kernels themselves are the CPU's: neither their speed nor their rounding is that of a GPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

import fedpriv
from fedpriv.privacy.randomness import Purpose, Randomness
from fedpriv.training.local import LocalTraining

GPU = torch.device("meta")
_PACKAGE = f"{Path(fedpriv.__file__).parent}/"
_aten = torch.ops.aten
# What a host has to wait for: the answer has a shape, or is a number, that depends on numbers.
_WAITED_FOR = {
    _aten._local_scalar_dense,
    _aten.equal,
    _aten.is_nonzero,
    _aten.masked_select,
    _aten.nonzero,
    _aten.repeat_interleave.Tensor.overloadpacket,
}
# These take indices from the CPU, which are copied for them.
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
# CTC reads its lengths on the host.
_LENGTHS_READ = {_aten._ctc_loss, _aten.ctc_loss, _aten._ctc_loss_backward}


class OnGpu(Tensor):
    """A tensor that says it is on the GPU; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=GPU,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended GPU is used outside of it")


class PretendGpu(TorchDispatchMode):
    """Carries out what is asked of tensors on the pretended GPU.

    Attributes:
        waits: how often the host waited, by the line of fedpriv that made it.
        transfers: how often it copied from the CPU in a way that waits, likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        on_gpu = any(isinstance(one, OnGpu) for one in flat)
        wanted = kwargs.get("device")
        packet = func.overloadpacket
        if packet in (_aten._to_copy, _aten.copy_) or (wanted is not None and flat):
            return self._moved(func, args, kwargs)
        if on_gpu:
            self._check(func, packet, flat, args)
        elif wanted is None or torch.device(wanted).type != GPU.type:
            return func(*args, **kwargs)
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
            generator = kwargs.get("generator")
            if isinstance(generator, torch.Generator) and generator.device.type != "cpu":
                raise AssertionError("no generator of the pretended GPU is a real one")
        held_args, held_kwargs = tree_map_only(OnGpu, lambda one: one.held, (args, kwargs))
        answer = func(*held_args, **held_kwargs)
        wrapped = tree_map_only(Tensor, OnGpu, answer)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copy between devices, or on one."""
        packet = func.overloadpacket
        if packet is _aten.copy_:
            target, source = args[0], args[1]
            if isinstance(target, OnGpu) != isinstance(source, OnGpu):
                blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                self._note(isinstance(target, OnGpu), blocks)
            held = [one.held if isinstance(one, OnGpu) else one for one in (target, source)]
            func(held[0], held[1], *args[2:], **kwargs)
            return target
        source = args[0]
        wanted = kwargs.pop("device", None) or source.device
        to_gpu = torch.device(wanted).type == GPU.type
        if to_gpu != isinstance(source, OnGpu):
            self._note(to_gpu, not kwargs.get("non_blocking", False))
        held = source.held if isinstance(source, OnGpu) else source
        rest = [one.held if isinstance(one, OnGpu) else one for one in args[1:]]
        answer = func(held, *rest, **kwargs, device=torch.device("cpu"))
        if answer is held:
            answer = held.clone()
        return OnGpu(answer) if to_gpu else answer

    def _note(self, to_gpu: bool, blocks: bool) -> None:
        if not to_gpu and blocks:
            self.waits[_asked_by()] += 1
        elif blocks and "transfer.py" not in (line := _asked_by()):  # to a GPU it does not wait
            self.transfers[line] += 1

    def _check(self, func: Any, packet: Any, flat: list[Tensor], args: Any) -> None:
        if packet in _WAITED_FOR or packet in _LENGTHS_READ:
            self.waits[_asked_by()] += 1
        if packet in _INDEXED:
            indices = [one for one in args[1] if one is not None]
            if not isinstance(args[0], OnGpu) and any(isinstance(i, OnGpu) for i in indices):
                raise RuntimeError(f"{func}: indices on the GPU for a tensor on the CPU")
            for index in indices:
                if not isinstance(index, OnGpu):
                    self.transfers[_asked_by()] += 1
                elif index.dtype in (torch.bool, torch.uint8):
                    self.waits[_asked_by()] += 1
            return
        others = [one for one in flat if not isinstance(one, OnGpu) and one.dim() > 0]
        if others and packet not in _LENGTHS_READ:
            raise RuntimeError(f"{func}: tensors on the GPU and on the CPU together")


def _asked_by() -> str:
    """Return the line of fedpriv that asks."""
    lines = [f for f in traceback.extract_stack() if f.filename.startswith(_PACKAGE)]
    if not lines:
        return "elsewhere"
    where = lines[-1]
    return f"{where.filename.removeprefix(_PACKAGE)}:{where.lineno} {where.line}"


class _Made(TorchFunctionMode):
    """Numbers of Python are made a tensor on the CPU and then copied; they come back likewise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            del kwargs["device"]
            return func(*args, **kwargs).to(GPU)
        if func is Tensor.tolist:  # which no subclass has
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


class CudaRounding(TorchFunctionMode):
    """What autocast to bfloat16 does on CUDA devices, which is not what it does on the CPU.

    The lists are those of PyTorch's notes on autocast ("CUDA Op-Specific Behavior"), as far as
    models use them.
    """

    _ROUNDED = frozenset(
        {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm", "conv2d"}
        | {"scaled_dot_product_attention"}
    )
    _EXACT = frozenset(
        {"softmax", "log_softmax", "layer_norm", "group_norm", "rms_norm", "cross_entropy"}
        | {"nll_loss", "norm", "sum", "prod", "pow", "__pow__", "__rpow__", "exp", "log"}
        | {"reciprocal", "rsqrt", "cumsum", "softplus", "ctc_loss"}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._ROUNDED:
            args, kwargs = _all_as(torch.bfloat16, torch.float32, (args, kwargs or {}))
        elif name in self._EXACT:
            args, kwargs = _all_as(torch.float32, torch.bfloat16, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _all_as(wanted: torch.dtype, found: torch.dtype, tensors: Any) -> Any:
    return tree_map_only(Tensor, lambda one: one.to(wanted) if one.dtype == found else one, tensors)


def _products(recipe: LocalTraining, device: torch.device) -> AbstractContextManager[Any]:
    return CudaRounding() if recipe.precision == "bfloat16" else nullcontext()


def _generator(randomness: Randomness, purpose: Purpose, *path: int, device: Any = "cpu") -> Any:
    return torch.Generator().manual_seed(randomness.torch_seed(purpose, *path))


@contextmanager
def pretended_gpu() -> Iterator[PretendGpu]:
    """Let there be a GPU in the body, called `GPU`; random numbers on it are those of the CPU."""
    generators = mock.patch.object(Randomness, "torch", _generator)
    rounding = mock.patch.object(LocalTraining, "products", _products)
    with generators, rounding, _Made(), PretendGpu() as gpu:
        yield gpu
