"""Many users of a model whose code is not known here: `torch.func.vmap` runs it user by user.

Inside `vmap` the model's code sees one user, whatever it does, and each operation is one over all
users. Where a linear map, a norm or an embedding comes by as a module, its stacked sibling serves
all users at once, which `vmap` need not know of: gradients then are not written out, and the step
is taken in the backward pass. Every other parameter is handed to the model by name
(`functional_call`), also where two places share it.

Not every model can be run so: one that asks what numbers it has, or writes into a tensor that all
users share, cannot. So each is tried, against training one user after another.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedpriv.data.federated import Batch
from fedpriv.draws import drawing_from
from fedpriv.failures import failure_of
from fedpriv.models.parameters import Layout, parameters_of, unchanged_buffers
from fedpriv.tasks.base import Task
from fedpriv.training.local import LocalTraining, train_user
from fedpriv.training.stacked import StackedModel, StackedUser, Stream, train_stack
from fedpriv.training.stacked_layers import (
    StackedEmbedding,
    StackedGroupNorm,
    StackedLayer,
    StackedLinear,
    StackedNorm,
    StackedTransposed,
)

#: What is served outside `vmap`, where the model calls it once in a forward pass.
_SERVED: dict[type[nn.Module], Any] = {
    nn.Linear: StackedLinear,
    nn.LayerNorm: StackedNorm,
    nn.RMSNorm: StackedNorm,
    nn.Embedding: StackedEmbedding,
    nn.GroupNorm: StackedGroupNorm,
}
#: And of other libraries, by module and class: they do the same.
_SERVED_OF_OTHERS: dict[str, Any] = {
    "timm.layers.norm.LayerNorm": StackedNorm,
    "transformers.pytorch_utils.Conv1D": StackedTransposed,
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Multiplications of a user's convolutions in a step from which one user keeps a CPU busy. Those of
# several users in one operation, of as many groups, are then slower than one after another: with 8
# million vmap is a quarter faster, with 28 million a quarter slower. See docs/speed.md.
_BUSY = 15_000_000
#: Users from which on `vmap` pays: what it adds to each operation is shared by so many.
FEWEST = 6
_SHAKEN = 0.02
_MISSING = "have not yet implemented the batching rule for "


def _sibling_of(layer: nn.Module) -> Any:
    """Return the class of the sibling that can serve a layer's users at once; None for none."""
    kind = type(layer)
    of_others = _SERVED_OF_OTHERS.get(f"{kind.__module__}.{kind.__qualname__}")
    return _SERVED.get(kind) or of_others


@dataclass(frozen=True)
class Vmapping:
    """How a model is run for many users.

    Attributes:
        served: the layers, by path, whose siblings serve all users at once.
        kept: bytes that the forward pass of one row keeps for the backward pass.
    """

    served: frozenset[str]
    kept: int


class _Loose(StackedLayer):
    """A parameter that is handed to the model by name: `weight` is `[U, ...]`."""


class _Passing:
    """Says which users are in the pass: `tag` is a number of each, `[]` inside `vmap`."""

    tag: Tensor


class _Served(nn.Module):
    """Stands in the model for a layer whose sibling serves all users at once."""

    def __init__(self, sibling: StackedLayer, passing: _Passing) -> None:
        super().__init__()
        self.sibling, self._passing = sibling, passing

    def forward(self, x: Tensor) -> Tensor:
        """Map one user's rows, inside `vmap`."""
        return _AllUsers.apply(x, self._passing.tag, self.sibling)


class _AllUsers(torch.autograd.Function):
    """Leaves `vmap`: the sibling is given the rows of all users, `[U, ...]`."""

    @staticmethod
    def forward(x: Tensor, tag: Tensor, sibling: StackedLayer) -> Tensor:
        raise RuntimeError("a layer of many users is only there inside vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, tag: Tensor, sibling: StackedLayer
    ) -> tuple[Tensor, int]:
        """Serve all users."""
        place = in_dims[0]
        if isinstance(sibling, StackedGroupNorm):  # where convolutions have left them
            beside = x.unsqueeze(1).expand(-1, info.batch_size, *x.shape[1:])
            return sibling(beside if place is None else x.movedim(place, 1)), 1
        rows = x.expand(info.batch_size, *x.shape) if place is None else x.movedim(place, 0)
        # To the sibling users' rows lie end to end, and each user's are equally many.
        alone = rows.dim() == (1 if isinstance(sibling, StackedEmbedding) else 2)
        rows = rows.unsqueeze(1) if alone else rows
        served = sibling(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return (served.squeeze(1) if alone else served), 0


class _PerUser(nn.Module):
    """Maps rows of all users, end to end, as the model maps those of each."""

    def __init__(self, model: nn.Module, loose: dict[str, _Loose], passing: _Passing) -> None:
        super().__init__()
        self.model = model
        self._loose, self._passing = loose, passing
        self.users = 1

    def forward(self, *inputs: Any) -> Any:
        """Return what the model returns, users' rows end to end."""
        rows = next(len(each) for each in inputs if isinstance(each, Tensor))
        dims = tuple(
            0 if isinstance(each, Tensor) and len(each) == rows else None for each in inputs
        )
        own = [
            each.unflatten(0, (self.users, -1)) if dim == 0 else each
            for each, dim in zip(inputs, dims, strict=True)
        ]
        values = {name: layer.weight for name, layer in self._loose.items()}
        device = inputs[0].device
        tags = torch.zeros(self.users, device=device)
        with _attention(device):
            given = vmap(self._of_one, in_dims=(0, 0, *dims))(values, tags, *own)
        return _end_to_end(given)

    def _of_one(self, values: dict[str, Tensor], tag: Tensor, *inputs: Any) -> Any:
        self._passing.tag = tag
        try:
            given = functional_call(self.model, values, inputs)
        finally:
            del self._passing.tag
        # Of an object, such as transformers', a task reads the logits.
        return given if isinstance(given, Tensor | tuple | list) else given.logits

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


def _end_to_end(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.flatten(0, 1)
    return type(given)(each.flatten(0, 1) for each in given)


def _attention(device: torch.device) -> AbstractContextManager[Any]:
    """Let attention be made of operations that `vmap` knows: on CPUs it knows no fast one."""
    if device.type != "cpu":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


class VmappedModel(StackedModel):
    """A model of many users at once that `vmap` runs; see `Vmapping`."""

    def __init__(self, model: nn.Module, served: Collection[str]) -> None:
        self._served, self._passing = served, _Passing()
        self._loose: dict[str, _Loose] = {}
        super().__init__(model)
        self.module = self._per_user = _PerUser(self.module, self._loose, self._passing)

    def _owner(self, name: str) -> tuple[StackedLayer, str]:
        path, _, attribute = name.rpartition(".")
        layer = self.module.get_submodule(path)
        if path in self._served:
            if not isinstance(layer, _Served):
                layer = _Served(_sibling_of(layer)(layer), self._passing)
                self.module.set_submodule(path, layer)
            return layer.sibling, attribute
        self._loose[name] = _Loose()
        return self._loose[name], "weight"

    def set_users(self, users: int, first: bool) -> None:
        """Make ready for a pass of the first `users`."""
        super().set_users(users, first)
        self._per_user.users = users


@lru_cache(maxsize=1)
def vmapped_model(model: nn.Module, vmapping: Vmapping) -> VmappedModel:
    """Return the model of many users, the same one each time."""
    return VmappedModel(model, vmapping.served)


def vmapping_of(
    model: nn.Module, task: Task[Any], examples: Batch, batch_size: int
) -> Vmapping | str:
    """Return how `model` is run for many users; or, in a sentence's end, why it is not.

    `examples` are prepared, held out, and of every length that comes: two users are made of them,
    who take other numbers of steps, of other numbers of rows, and must end where each ends alone.
    """
    device = next(model.parameters()).device
    passes = _Passes.of(model, task, examples.to(device))
    if device.type == "cpu" and passes.products * batch_size > _BUSY:
        return "the convolutions of one user's step are enough for this processor"
    reasons = []
    for served in dict.fromkeys([passes.once, frozenset[str]()]):
        try:
            if _ends_alike(model, task, examples, served):
                return Vmapping(served, passes.kept)
            reasons.append("vmap does not compute what it computes")
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of its own code, or of torch's, which cannot run that
            reasons.append(cannot_run(error))
    return reasons[-1]


def cannot_run(error: Exception) -> str:
    """Return that `vmap` cannot run a model, and why."""
    said = failure_of(error)
    return f"vmap cannot run it: {said if len(said) <= 160 else f'{said[:157]}...'}"


@contextmanager
def missing_rules() -> Iterator[list[str]]:
    """Yield what, after the body, names operations in which `vmap` has gone from user to user."""
    missing: list[str] = []
    with warnings.catch_warnings(record=True) as noted:
        warnings.filterwarnings("always", f".*{_MISSING}")
        yield missing
    for each in noted:
        _, found, name = str(each.message).partition(_MISSING)
        if found:
            missing.append(name.split(". ")[0].rstrip("."))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


@dataclass(frozen=True)
class _Passes:
    """What a forward pass shows of a model.

    Attributes:
        once: which layers that can be served are called once.
        kept: bytes that a row's pass keeps.
        products: multiplications that convolutions take a row.
    """

    once: frozenset[str]
    kept: int
    products: int

    @classmethod
    def of(cls, model: nn.Module, task: Task[Any], examples: Batch) -> _Passes:
        calls: Counter[str] = Counter()
        products, kept = [0], dict[int, Tensor]()
        rows = examples.take(torch.tensor([int(examples.sizes.argmax())]))

        def called(path: str, layer: nn.Module, inputs: Any, output: Any) -> None:
            calls[path] += 1
            if isinstance(layer, _CONVOLUTIONS):
                each = layer.weight.numel() // layer.weight.shape[0]
                products[0] += output.numel() * each

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        hooks = [
            layer.register_forward_hook(partial(called, path))
            for path, layer in model.named_modules()
            if _sibling_of(layer) or isinstance(layer, _CONVOLUTIONS)
        ]
        model.train()
        try:
            own = {p.untyped_storage()._cdata for p in model.parameters()}
            with (
                drawing_from(0, next(model.parameters()).device),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                task.losses(model, rows)
        finally:
            for hook in hooks:
                hook.remove()
        there = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
        return cls(frozenset(_servable(model, calls)), there, products[0])


def _servable(model: nn.Module, calls: Counter[str]) -> Iterator[str]:
    """Yield the layers that are called once and have parameters of their own alone, all trained."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for path, layer in model.named_modules():
        sibling = _sibling_of(layer)
        if not path or sibling is None or calls[path] != 1:
            continue
        own = list(layer.parameters())
        apart = own and all(p.requires_grad and uses[id(p)] == 1 for p in own)
        if apart and sibling.takes(layer):
            yield path


def _ends_alike(
    model: nn.Module, task: Task[Any], examples: Batch, served: Collection[str]
) -> bool:
    """Say whether two users end where each ends alone."""
    device = next(model.parameters()).device
    order = examples.sizes.argsort(stable=True)
    one, two, last = order[:1], order[-3:], order[-1:]
    users = [_user(examples, [two, last]), _user(examples, [one])]
    layout, alone = Layout.of(model), copy.deepcopy(model)
    # A layer that begins with zeros would hide what lies below it.
    start = layout.join(parameters_of(model))
    shaken = torch.randn(len(start), generator=torch.Generator().manual_seed(0))
    start += _SHAKEN * shaken.to(start)
    recipe = LocalTraining(lr=_rate(alone, layout, start, users[0], task))
    stacked = VmappedModel(model, served)
    with missing_rules() as missing, drawing_from(0, device), unchanged_buffers(stacked.module):
        found = train_stack(stacked, start, users, recipe, task, 1).deltas.written_out()
    if missing:
        raise RuntimeError(f"it has no batching rule for {missing[0]}")
    expected = [_update(alone, layout, start, user, recipe, task) for user in users]
    return all(map(_near, found, expected))


def _rate(
    model: nn.Module, layout: Layout, start: Tensor, user: StackedUser, task: Task[Any]
) -> float:
    """Return the rate whose first step is a hundredth of where it starts: seen, and no more."""
    one = replace(user, steps=user.steps[:1])
    gradient = _update(model, layout, start, one, LocalTraining(lr=1.0), task)
    size = float(torch.linalg.vector_norm(gradient))
    return float(torch.linalg.vector_norm(start)) / size / 100 if size else 0.01


def _update(
    model: nn.Module,
    layout: Layout,
    start: Tensor,
    user: StackedUser,
    recipe: LocalTraining,
    task: Task[Any],
) -> Tensor:
    """Return the update of a user who is trained alone: `[P]`."""
    again = replace(user, augmentation=Stream(torch.Generator))
    steps = [again.step(number, task, 1).to(start.device) for number in range(len(user.steps))]
    with drawing_from(0, start.device):
        return layout.join(train_user(model, layout.split(start), steps, recipe, task).update)


def _user(examples: Batch, steps: list[Tensor]) -> StackedUser:
    streams = {"dropout": Stream(torch.Generator), "augmentation": Stream(torch.Generator)}
    return StackedUser(0, examples, steps, **streams)


def _near(found: Tensor, expected: Tensor) -> bool:
    """Say whether updates are the same but for rounding, of which a step may make more."""
    size = float(torch.linalg.vector_norm(expected))
    apart = float(torch.linalg.vector_norm(found - expected))
    return math.isfinite(apart) and apart <= 1e-3 * size
