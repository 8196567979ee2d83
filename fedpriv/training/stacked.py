"""Many users in one forward and one backward pass.

The users of a cohort start from the same parameters, so their parameters can be stacked to
`[U, ...]` and their batches laid end to end, `[U·B, ...]`. A user's loss depends on its own slice
alone, so that one backward pass of the sum of losses gives every user's own gradient.

A small model's users spend their time in the overhead of many small operations, a larger one's in
moving parameters through memory. Against the first, users are stacked; against the second, no
copy of the start parameters is made for them, no gradient is written out where the step can be
taken from its factors, and the step is taken while the backward pass still has the parameters in
the caches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from fedpriv.data.federated import Batch
from fedpriv.models.packing import Ragged
from fedpriv.models.parameters import Layout
from fedpriv.models.stochastic import PerUserDraw, Stochastic
from fedpriv.optimizers.local import NumberByNumber
from fedpriv.privacy.model_deltas import ModelDeltas
from fedpriv.tasks.base import Task
from fedpriv.training.local import LocalTraining, corrected
from fedpriv.training.stacked_layers import (
    SIBLINGS,
    StackedLayer,
    StackedLinear,
    of_users,
    rows_apart,
)
from fedpriv.transfer import moved_to

# Numbers of a block that are worked on at once: the step then finds the product that it takes still
# in the processor's caches. A GPU is asked for more, since each operation has to be asked for.
_CACHED_NUMBERS, _NUMBERS_ON_A_GPU = 2**19, 2**28


def can_stack(model: nn.Module) -> bool:
    """Say whether every parameter of `model` is trainable and lies in a layer that is known here.

    A layer that is used in two places counts as unknown, and all that lies around the layers has
    to be known too: see `rows_apart`.
    """
    owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    shared = len(list(model.named_parameters(remove_duplicate=False))) > len(
        list(model.parameters())
    )
    known = all(type(owner) in SIBLINGS and SIBLINGS[type(owner)].takes(owner) for owner in owners)
    known = known and all(rows_apart(module) for module in model.modules())
    return known and not shared and all(p.requires_grad for p in model.parameters())


@dataclass
class _Block:
    """One parameter of many users.

    Attributes:
        layer: the layer that it belongs to.
        name: what it is called there.
        origin: where all users start.
        values: `[U, *origin.shape]`, where they are; a linear layer's from its first step on.
        leaf: what autograd differentiates by in this pass; None for a linear layer's.
        multiplier: what the learning rate is multiplied by.
    """

    layer: StackedLayer
    name: str
    origin: Tensor
    values: Tensor
    leaf: Tensor | None = None
    multiplier: float = 1.0

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer's, which makes its gradient itself."""
        return isinstance(self.layer, StackedLinear)


class StackedModel:
    """A model of many users at once; `module` maps rows as the plain model does.

    Memory for the parameters of the largest stack is kept between stacks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layout = Layout.of(model)
        self.module = copy.deepcopy(model).train()
        self.blocks: list[_Block] = []
        self._owners = [self._owner(name) for name in self.layout.names]
        self._stochastic = [m for m in self.module.modules() if isinstance(m, Stochastic)]
        self._linear: dict[StackedLinear, list[_Block]] = {}
        self._buffers: dict[str, Tensor] = {}

    def _owner(self, name: str) -> tuple[StackedLayer, str]:
        """Return the stacked sibling that holds a parameter; it takes the plain layer's place."""
        path, _, attribute = name.rpartition(".")
        layer = self.module.get_submodule(path)
        if not isinstance(layer, StackedLayer):
            layer = SIBLINGS[type(layer)](layer)
            if path:
                self.module.set_submodule(path, layer)
            else:  # the model is a single layer
                self.module = layer
        return layer, attribute

    def start(self, parameters: Tensor, users: int, multipliers: Sequence[float] = ()) -> None:
        """Put `users` users at the flat `parameters` `[P]`; `multipliers` are of their rates."""
        origins = self.layout.split(parameters).values()
        values = self.scratch("values", parameters, users)
        owned = zip(self._owners, origins, values, strict=True)
        self.blocks = [_Block(layer, name, origin, block) for (layer, name), origin, block in owned]
        for block, multiplier in zip(self.blocks, multipliers, strict=False):
            block.multiplier = multiplier
        self._linear = {}
        for block in self.blocks:
            if isinstance(block.layer, StackedLinear):
                self._linear.setdefault(block.layer, []).append(block)
                # Written to in the backward pass: to autograd a change of all that lies beside it.
                block.values = block.values.data
            else:
                block.values.copy_(block.origin)

    @property
    def parameters(self) -> Tensor:
        """Where the users are, `[U·P]`: each block's `[U, d_h]`, one after another."""
        users = self.blocks[0].values.shape[0]
        return self._buffers["values"][: users * self.layout.total]

    def scratch(self, purpose: str, like: Tensor, users: int) -> list[Tensor]:
        """Return memory for every block of `users` users, `[U, *shape]` each, with anything in it.

        It is the same memory each time: fresh memory costs as much as the arithmetic.
        """
        room = self._buffers.get(purpose)
        if room is None or room.numel() < users * self.layout.total or room.device != like.device:
            room = self._buffers[purpose] = like.new_empty(users * self.layout.total)
        parts = room[: users * self.layout.total].split([users * n for n in self.layout.sizes])
        return [
            part.view(users, *shape) for part, shape in zip(parts, self.layout.shapes, strict=True)
        ]

    def begin_pass(self, take: Callable[[_Block], None] | None) -> None:
        """Let linear layers' blocks step, by `take`, in the next backward pass; None: not there."""
        for layer, blocks in self._linear.items():
            layer.begin_pass(None if take is None else partial(_each, take, blocks))

    @property
    def waiting(self) -> list[_Block]:
        """The blocks that the backward pass has not let take their step."""
        return [
            block
            for block in self.blocks
            if not (isinstance(block.layer, StackedLinear) and block.layer.stepped)
        ]

    @property
    def draws(self) -> bool:
        """Whether a layer draws random numbers in training."""
        return any(layer.draws for layer in self._stochastic)

    def set_users(self, users: int, first: bool) -> None:
        """Make ready for a pass of the first `users`.

        `first`: no step has been taken, so linear layers multiply by the shared start parameters.
        """
        for block in self.blocks:
            block.layer.users = users
            shared = block.linear and first
            value = block.origin if shared else of_users(block.values, 0, users)
            if not block.linear:
                block.leaf = value = value.detach().requires_grad_()
            setattr(block.layer, block.name, value)
        # Elsewhere many small operations may cost more than padding.
        if isinstance(self.module, Ragged) and self.blocks[0].origin.device.type == "cpu":
            self.module.users = users

    def set_streams(self, generators: Sequence[torch.Generator]) -> None:
        """Let layers draw each user's numbers, in the passes to come, from a stream of its own."""
        draw = PerUserDraw(generators)
        for layer in self._stochastic:
            layer.draw = draw


def _each(take: Callable[[_Block], None], blocks: Sequence[_Block]) -> None:
    for block in blocks:
        take(block)


@lru_cache(maxsize=1)
def stacked_model(model: nn.Module) -> StackedModel | None:
    """Return the stacked sibling of `model`, the same one each time; None where it has none.

    It is kept here because a trainer is replaced in every round in which clip bounds have moved.
    """
    return StackedModel(model) if can_stack(model) else None


@dataclass(slots=True)
class Stream:
    """A random stream that is made when it is first asked for, by `make`.

    To make it takes longer than to train a small user on a GPU, and most users draw nothing.
    """

    make: Callable[[], torch.Generator]
    made: torch.Generator | None = None

    def __call__(self) -> torch.Generator:
        """Return the stream, the same one each time."""
        if self.made is None:
            self.made = self.make()
        return self.made


@dataclass(frozen=True)
class StackedUser:
    """What one user of a stack trains on.

    Attributes:
        number: the user's number.
        examples: the user's examples.
        steps: the example indices of each local step.
        dropout: the random stream of layers such as dropout, on the model's device.
        augmentation: the random stream of augmentation.
    """

    number: int
    examples: Batch
    steps: Sequence[Tensor]
    dropout: Stream
    augmentation: Stream

    @property
    def largest_step(self) -> int:
        """What the largest step costs: rows times the largest example among them."""
        sizes = self.examples.sizes
        return max(len(index) * int(sizes[index].max()) for index in self.steps)

    def step(self, number: int, task: Task[Any], round_: int) -> Batch:
        """Return the rows of a local step, on the host."""
        rows = self.examples.take(self.steps[number])
        if not task.augments(round_):
            return rows
        return task.augment(rows, round_, self.augmentation())


@dataclass(frozen=True)
class StackedResult:
    """What a stack's training gives, users in the order in which they were given.

    Attributes:
        deltas: start parameters minus parameters after training. They are valid until the next
            stack is trained.
        losses: float32 `[U]`, mean loss over the local steps, before each step. Private.
    """

    deltas: ModelDeltas
    losses: Tensor


def train_stack(
    stacked: StackedModel,
    parameters: Tensor,
    users: Sequence[StackedUser],
    recipe: LocalTraining,
    task: Task[Any],
    round_: int,
    pull: Tensor | None = None,
) -> StackedResult:
    """Train all `users` from the flat `parameters` at once, each as `train_user` trains it alone.

    `pull` `[U, P]` is what each adds to its gradients; None for nothing.

    Users with more steps come first, so that those who are still training are the first so many
    and nothing is computed for the others. In a step, a user with fewer examples than others is
    filled up with rows that weigh nothing.

    Raises:
        ValueError: a user has more steps than one before it.
    """
    counts = [len(user.steps) for user in users]
    if counts != sorted(counts, reverse=True):
        raise ValueError(f"users with more steps must come first, got {counts}")
    steps = (rows.to(parameters.device) for rows in steps_of(users, task, round_))
    generators = [user.dropout() for user in users] if stacked.draws else []
    deltas, losses = take_steps(stacked, parameters, steps, counts, recipe, task, generators, pull)
    return StackedResult(deltas, losses / moved_to(losses.device, torch.tensor(counts)))


@dataclass(frozen=True)
class StackedRows:
    """The rows of one step of a stack.

    Attributes:
        batch: the rows of all users end to end, equally many a user.
        weights: `[U, B]`, what each counts for in its user's mean loss; 0 for what fills up.
    """

    batch: Batch
    weights: Tensor

    def to(self, device: torch.device) -> StackedRows:
        """Return them on another device."""
        return replace(self, batch=self.batch.to(device), weights=moved_to(device, self.weights))


def steps_of(users: Sequence[StackedUser], task: Task[Any], round_: int) -> Iterator[StackedRows]:
    """Yield the rows of each step, on the host; users with more steps must come first."""
    counts = [len(user.steps) for user in users]
    for number in range(counts[0]):
        active = [user for user in users if len(user.steps) > number]
        lengths = [len(user.steps[number]) for user in active]
        rows = max(lengths)
        if task.augments(round_):
            parts = [_filled_up(user.step(number, task, round_), rows) for user in active]
            batch = type(parts[0]).join(parts)
        else:
            indices = [_repeating_the_first(user.steps[number], rows) for user in active]
            batch = type(active[0].examples).gather([user.examples for user in active], indices)
        real = torch.tensor(lengths)[:, None]
        weights = (torch.arange(rows) < real) / real.double()
        yield StackedRows(batch, weights)


def _filled_up(part: Batch, rows: int) -> Batch:
    """Return a batch with its first example repeated to a length of `rows`."""
    if len(part) == rows:
        return part
    return part.take(_repeating_the_first(torch.arange(len(part)), rows))


def _repeating_the_first(index: Tensor, rows: int) -> Tensor:
    if len(index) == rows:
        return index
    return torch.cat([index, index[:1].expand(rows - len(index))])


def take_steps(
    stacked: StackedModel,
    parameters: Tensor,
    steps: Iterable[StackedRows],
    counts: Sequence[int],
    recipe: LocalTraining,
    task: Task[Any],
    generators: Sequence[torch.Generator] = (),
    pull: Tensor | None = None,
) -> tuple[ModelDeltas, Tensor]:
    """Take all local steps of a stack; return the deltas, and the sums of losses, float32 `[U]`.

    `counts` are the users' numbers of steps. All is where `parameters` are; nothing here waits for
    it, unless the task's losses do.
    """
    users, optimizer = len(counts), recipe.optimizer
    assert isinstance(optimizer, NumberByNumber)
    stacked.start(parameters, users, recipe.multipliers)
    losses = parameters.new_zeros(users)
    kept = [stacked.scratch(f"kept {n}", parameters, users) for n in range(optimizer.kept)]
    for number, rows in enumerate(steps, 1):
        active = len(rows.weights)
        lr = _rates(recipe, number, counts[:active], parameters)
        step = _Step(recipe, optimizer, active, number, lr, pull)
        stacked.set_users(active, step.first)
        stacked.set_streams(generators[:active])
        stacked.begin_pass(step.take if step.plain else None)
        with recipe.products(parameters.device):
            per_example = task.losses(stacked.module, rows.batch).view(active, -1)
        weights = rows.weights.to(per_example.dtype)
        per_user = (per_example * weights).masked_fill(weights == 0, 0.0).sum(1)
        per_user.sum().backward()
        losses[:active] += per_user.detach()
        with torch.no_grad():
            if step.plain:
                _each(step.take, stacked.waiting)
            else:
                _written_out_step(stacked, kept, step)
    return ModelDeltas(parameters, stacked.parameters, stacked.layout.sizes, users), losses


def _rates(
    recipe: LocalTraining, number: int, counts: Sequence[int], like: Tensor
) -> float | Tensor:
    """Return the learning rate of a step: `[U]` where users with other `counts` have others."""
    rates = [recipe.rate(number, count) for count in counts]
    if len(set(rates)) == 1:
        return rates[0]
    return moved_to(like.device, torch.tensor(rates, dtype=like.dtype))


@dataclass(frozen=True)
class _Step:
    """One step of a stack.

    Attributes:
        recipe: what makes a step beside the optimizer.
        optimizer: how it is taken.
        users: who take it, the first so many.
        number: which of theirs it is, from 1.
        lr: the learning rate; `[U]` where it is not one for all.
        pull: `[U, P]`, what is added to gradients; None for nothing.
    """

    recipe: LocalTraining
    optimizer: NumberByNumber
    users: int
    number: int
    lr: float | Tensor
    pull: Tensor | None = None

    @property
    def first(self) -> bool:
        """Whether nobody has taken one before."""
        return self.number == 1

    @property
    def plain(self) -> bool:
        """Whether it is θ ← θ - η·∇, which each parameter can take by itself."""
        return self.recipe.plain and self.pull is None

    def take(self, block: _Block) -> None:
        """Take a plain step of a block, in place."""
        for low, high in self._pieces(block):
            self._move(block, _gradient(block, low, high), (), low, high)

    def take_given(
        self, block: _Block, gradient: Tensor, kept: Sequence[Tensor], factors: Tensor
    ) -> None:
        """Take a step of a block by a gradient `[U, *shape]`, times the users' factors."""
        for low, high in self._pieces(block):
            own = [of_users(each, low, high) for each in kept]
            self._move(block, of_users(gradient, low, high), own, low, high, factors[low:high])

    def _pieces(self, block: _Block) -> Iterator[tuple[int, int]]:
        numbers = _CACHED_NUMBERS if block.origin.is_cpu else _NUMBERS_ON_A_GPU
        at_once = max(1, numbers // block.origin.numel())
        for low in range(0, self.users, at_once):
            yield low, min(low + at_once, self.users)

    def _move(
        self,
        block: _Block,
        gradient: Tensor,
        kept: Sequence[Tensor],
        low: int,
        high: int,
        factors: Tensor | None = None,
    ) -> None:
        column = (-1, *(1,) * block.origin.dim())
        values = of_users(block.values, low, high)
        lr = self.lr[low:high].view(column) if isinstance(self.lr, Tensor) else self.lr
        self.optimizer.step(
            start=block.origin if self.first else values,
            gradient=gradient,
            kept=kept,
            lr=lr if block.multiplier == 1 else lr * block.multiplier,
            number=self.number,
            out=values,
            factor=None if factors is None else factors.view(column),
        )


def _written_out_step(stacked: StackedModel, kept: Sequence[list[Tensor]], step: _Step) -> None:
    """Take a step that needs each whole gradient before any parameter moves, or remembers it.

    `kept` is what the optimizer remembers: blocks of each number.
    """
    recipe, users = step.recipe, step.users
    gradients = [_gradient(block, 0, users) for block in stacked.blocks]
    mu = 0.0 if step.first else recipe.proximal_mu  # the proximal term has no gradient there
    pulls = () if step.pull is None else step.pull[:users].split(stacked.layout.sizes, dim=1)
    for gradient, block, pull in zip_longest(gradients, stacked.blocks, pulls):
        more = None if pull is None else pull.reshape(gradient.shape)
        corrected(gradient, block.values[:users], block.origin, mu, more)
    if recipe.max_grad_norm is not None:
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        # The same constant as torch's clip_grad_norm_, for equal results.
        factors = (recipe.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    else:
        factors = torch.ones(users, dtype=gradients[0].dtype, device=gradients[0].device)
    for index, (gradient, block) in enumerate(zip(gradients, stacked.blocks, strict=True)):
        own = [each[index][:users] for each in kept]
        step.take_given(block, gradient, own, factors)


def _gradient(block: _Block, low: int, high: int) -> Tensor:
    """Return a block's gradient of the last pass for users `low` to `high`, `[users, *shape]`.

    A product that is written and then subtracted beats one that adds to what is there, which takes
    the libraries half as long again.
    """
    if isinstance(block.layer, StackedLinear):
        return block.layer.gradient(block.name, low, high)
    assert block.leaf is not None
    if block.leaf.grad is None:  # no loss depends on it
        block.leaf.grad = torch.zeros_like(block.leaf)
    return of_users(block.leaf.grad, low, high)
