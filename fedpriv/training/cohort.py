"""The users of one node in one round: each is trained, clipped and added to one sum."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedpriv.algorithms.base import Algorithm, Trained
from fedpriv.algorithms.fedavg import FedAvg
from fedpriv.data.federated import Batch, FederatedDataset
from fedpriv.draws import drawing_from
from fedpriv.errors import DamagedFile, EnvironmentFault
from fedpriv.models.parameters import Layout, unchanged_buffers
from fedpriv.models.stochastic import PerUserDraw, Stochastic
from fedpriv.privacy.clipping import ClippedUsers, ClippingRule, clip_and_add, undone
from fedpriv.privacy.error_feedback import ErrorFeedback, feed_back
from fedpriv.privacy.model_deltas import ModelDeltas
from fedpriv.privacy.randomness import Purpose, Randomness, id_words
from fedpriv.tasks.base import Task
from fedpriv.training import vmapped
from fedpriv.training.local import LocalTraining, batches, train_user
from fedpriv.training.memory_store import RoundMemories
from fedpriv.training.recordings import recordings_of
from fedpriv.training.spans import Span, Stopwatch
from fedpriv.training.stacked import (
    StackedModel,
    StackedResult,
    StackedUser,
    Stream,
    stacked_model,
    train_stack,
)
from fedpriv.training.user_cache import UserCache
from fedpriv.training.vmapped import VmappedModel, Vmapping, vmapped_model
from fedpriv.transfer import fetched, moved_to

Engine = Literal["stacked", "sequential"]

# Stacks that a GPU may be ahead of what is counted of them.
_COMING = 16
# What no user's data are to blame for. After any other error of a GPU than a lack of memory nobody
# can be trained in this process.
OF_THE_MACHINE = (
    EnvironmentFault,
    DamagedFile,
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    torch.AcceleratorError,
)
# Users whose data are looked at together, so that like may be stacked with like, per user of a
# stack. It bounds memory in a large cohort.
_WINDOW = 8


@dataclass(frozen=True)
class CohortTrainer:
    """Everything public that a node needs to train its users.

    Attributes:
        dataset: the users, by index.
        model: the architecture; its parameters are overwritten.
        task: what is learnt.
        recipe: local training.
        clipping: the rule that bounds what each user sends: its update, or all its payloads.
        feedback: how users' memories enter their contributions; None where they keep none.
        randomness: the order of each user's examples, its dropout and its masks. In a simulation
            it derives from the seed alone: whose data are there must not change what others draw.
            In a deployment it is the node's own secret, new for each message.
        device: where training runs.
        engine: stacked trains `stack` users at once, where the model allows it; sequential one
            after another.
        vmapped: how a model whose layers are not all known is run for many users at once; None
            where they are, or users are trained one after another.
        why: why users are trained one after another, as the end of a sentence; "" where that is
            the config's own choice, or they are not.
        stack: users at once.
        tolerant: a user whose data cannot be used, for whatever reason, contributes zero and is
            counted, instead of stopping the run. A deployment must not let one user decide whether
            others count.
        cache: prepared users.
        timed: spans are recorded.
        graphs: on a GPU, stacks of shapes that come again are recorded and replayed.
        algorithm: what users compute, keep and send beside their update.
        planted: float32 `[users, P·payloads]`, what each user sends to be clipped in place of what
            training would have given it: the canaries of an audit. None in every training.
    """

    dataset: FederatedDataset
    model: nn.Module
    task: Task[Any]
    recipe: LocalTraining
    clipping: ClippingRule
    randomness: Randomness
    device: torch.device
    engine: Engine = "stacked"
    vmapped: Vmapping | None = None
    why: str = ""
    stack: int = 16
    tolerant: bool = False
    cache: UserCache = field(default_factory=lambda: UserCache(0))
    timed: bool = False
    graphs: bool = False
    feedback: ErrorFeedback | None = None
    algorithm: Algorithm = field(default_factory=FedAvg)
    planted: Tensor | None = None

    @property
    def stacked(self) -> StackedModel | None:
        """The model of many users; None where users are trained one after another."""
        if self.engine == "sequential" or not self.recipe.stackable:
            return None
        if self.vmapped is not None:
            return vmapped_model(self.model, self.vmapped)
        return stacked_model(self.model)

    @property
    def told(self) -> str:
        """How users are trained, in words."""
        if self.stacked is None:
            return "one after another" + (f": {self.why}" if self.why else "")
        return f"{self.stack} at a time" + (", run by vmap" if self.vmapped else "")

    def prepared(self, user: int, whole: bool = True) -> Batch:
        """Return the user's examples as they are trained on, before augmentation, on the host.

        One that the task cannot learn is an error of all of them, unless they are not to be `whole`
        and whoever takes them leaves it out.
        """
        # Nodes of one process share the cache, and each numbers its own users from 0.
        key = (self.dataset, user)
        cached = self.cache.get(key)
        if cached is None:
            found = self.task.prepare(self.model, self.dataset.user(user))
            if whole:
                self.task.require_targets(found, self.dataset.classes)
            cached = self.cache.put(key, found)
        return cached


@dataclass(frozen=True)
class CohortSum:
    """The sum of clipped updates, and what is seen on the way (private: simulation only).

    Attributes:
        total: float64 `[parameters]`, the sum over users in the order in which they were given.
        users: number of users that were trained.
        examples: number of their examples.
        skipped: number of further examples of theirs that could not be used.
        non_finite: users who contributed zero: their update held a NaN or Inf, or none of their
            data could be used.
        loss: sum over users of the mean local loss, over finite ones.
        norm: sum over users of the update's L2 norm before clipping, over finite ones.
        clipped: users with any block scaled down.
        block_norms: `[blocks]`, sum over users of each block's norm before clipping.
        block_clipped: `[blocks]`, number of users whose block was scaled down.
        block_shares: `[blocks]`, sum over users of each block's share of the squared norm.
        block_sent: `[blocks]`, sum over users of the norm of what they sent of each block.
        spans: what took the time, where that was asked for.
        memory_norm: sum over users of the L2 norm of what they keep for later.
        memory_reset: users whose memory was not finite and was taken to be zero.
        bound_moves: sum over silos of the logarithms of the factors of bounds that adapt within
            them; empty for users, and where bounds are fixed.
        alone: users of stacks who were trained one after another all the same.
        slowed: why the first of them were, or what else slows a stack down, as the end of a
            sentence; "" for nothing.

    Of silos `total` is the sum of their noisy changes, and norms and what was scaled down are
    those of the gradients of examples: a mean, or a fraction, in each silo, summed over silos.
    Norms are of what is clipped: where multipliers are undone, of the update divided by them.
    """

    total: Tensor
    users: int
    examples: int
    skipped: int
    non_finite: int
    loss: float
    norm: float
    clipped: float
    block_norms: list[float]
    block_clipped: list[float]
    block_shares: list[float]
    block_sent: list[float]
    spans: tuple[Span, ...] = ()
    memory_norm: float = 0.0
    memory_reset: int = 0
    bound_moves: list[float] = field(default_factory=list)
    alone: int = 0
    slowed: str = ""


def train_cohort(
    trainer: CohortTrainer,
    parameters: Tensor,
    users: Sequence[int],
    round_: int,
    memories: RoundMemories | None = None,
) -> CohortSum:
    """Train each of `users` from the flat `parameters` and return the sum of what they send.

    `parameters` `[P·(1 + shared)]` are the model, then what the algorithm's server shares; the sum
    `[P·vectors]` is that of clipped updates, then of other payloads, or of the algorithm's slots
    one after another. It is kept in float64 and taken in an order that depends on `users` and their
    data alone. `memories` are what users keep; a trainer with error feedback, or an algorithm whose
    users keep something, needs them.
    """
    layout = Layout.of(trainer.model)
    received = parameters.to(trainer.device).view(-1, layout.total)
    seen = _CohortStatistics(layout, trainer, memories, received[1:])
    watch = Stopwatch(trainer.timed, device=trainer.device)
    for slot, own in enumerate(_by_slot(trainer, users)):
        seen.fill(slot)
        start = trainer.algorithm.start(received[0], received[1:], slot)
        _train_from(trainer, layout, start, own, round_, seen, watch)
    return seen.summed(watch)


def _by_slot(trainer: CohortTrainer, users: Sequence[int]) -> list[Sequence[int]]:
    """Return the users of each slot, in their order: those of one start from one model."""
    algorithm, ids = trainer.algorithm, trainer.dataset.user_ids
    if algorithm.slots == 1:
        return [users]
    slots = [algorithm.slot(ids[user]) for user in users]
    return [
        [user for user, slot in zip(users, slots, strict=True) if slot == number]
        for number in range(algorithm.slots)
    ]


def _train_from(
    trainer: CohortTrainer,
    layout: Layout,
    start: Tensor,
    users: Sequence[int],
    round_: int,
    seen: _CohortStatistics,
    watch: Stopwatch,
) -> None:
    """Train each of `users` from `start` and let `seen` add what they send."""
    steps_seed = trainer.randomness.torch_seed(Purpose.STEP_ORDER, round_)
    stacked = trainer.stacked
    size = trainer.stack if stacked and not _share_draws(trainer) else 1
    for window in _windows(users, size * _WINDOW):
        with watch.measure("data"):
            found = [_work(trainer, user, round_, steps_seed, seen) for user in window]
            work = [one for one in found if one is not None]
        if trainer.planted is not None:
            numbers = torch.tensor([one.number for one in work], dtype=torch.int64)
            planted = trainer.planted[moved_to(trainer.planted.device, numbers)]
            sizes = layout.sizes * len(trainer.algorithm.payloads)
            seen.add(list(planted.split(sizes, dim=1)), torch.zeros(len(work)), work)
            continue
        if stacked is None:
            for one in work:
                _train_alone(trainer, layout, start, one, round_, seen, watch)
            continue
        for stack in _stacks(work, size):
            if not _train_together(trainer, stacked, start, stack, round_, seen, watch):
                for one in stack:
                    _train_alone(trainer, layout, start, one, round_, seen, watch)


def shares_of(norms: Tensor, whole: Tensor) -> Tensor:
    """Return Σ_u ‖g_h‖²/‖g‖² for blocks of `norms` `[U, H]` of updates of `whole` norms `[U]`."""
    return (norms / torch.where(whole > 0, whole, 1.0)[:, None]).square().sum(0)


def _share_draws(trainer: CohortTrainer) -> bool:
    """Say whether users of a stack would decide about one another's dropout: see `PerUserDraw`."""
    layers = (layer for layer in trainer.model.modules() if isinstance(layer, Stochastic))
    return trainer.device.type != "cpu" and any(layer.draws for layer in layers)


def _windows(users: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(users), size):
        yield users[first : first + size]


def _work(
    trainer: CohortTrainer, user: int, round_: int, steps_seed: int, seen: _CohortStatistics
) -> StackedUser | None:
    """Return what a user trains on in this round; None, and counted, where that is nothing.

    `steps_seed` is that of the order of steps, which all users of a round share.
    """
    try:
        examples = trainer.prepared(user)
    except OF_THE_MACHINE:
        raise  # to go on would cost every user ε for noise alone
    except Exception:
        # Whatever one user's data lead to, it must not decide whether the others count.
        if not trainer.tolerant:
            raise
        seen.skip(0)
        return None
    if len(examples) == 0:
        seen.skip(examples.skipped)
        return None
    randomness, own = trainer.randomness, id_words(trainer.dataset.user_ids[user])
    examples_order = randomness.torch(Purpose.LOCAL_TRAINING, round_, 0, *own)
    steps_order = torch.Generator().manual_seed(steps_seed)
    stream = partial(randomness.torch, Purpose.LOCAL_TRAINING, round_)
    return StackedUser(
        number=user,
        examples=examples,
        steps=list(batches(examples.sizes, trainer.recipe, examples_order, steps_order)),
        # On the device, which else would wait for the host to draw and to send.
        dropout=Stream(partial(stream, 1, *own, device=trainer.device)),
        augmentation=Stream(partial(stream, 2, *own)),
    )


def _stacks(work: list[StackedUser], size: int) -> Iterator[list[StackedUser]]:
    """Cut users into stacks of like with like, those with the most steps first.

    Stacks are as few as can be and as equal as can be: a small last one would be slow.
    """
    alike = sorted(work, key=lambda one: (-len(one.steps), one.largest_step))
    stacks = math.ceil(len(alike) / size)
    for number in range(stacks):
        yield alike[len(alike) * number // stacks : len(alike) * (number + 1) // stacks]


def _train_together(
    trainer: CohortTrainer,
    stacked: StackedModel,
    start: Tensor,
    stack: list[StackedUser],
    round_: int,
    seen: _CohortStatistics,
    watch: Stopwatch,
) -> bool:
    """Train a stack, and say whether its users could be trained together."""
    with watch.measure("forward and backward"):
        result, pull = None, seen.pull(stack)
        if isinstance(stacked, VmappedModel):
            result = _run_by_vmap(trainer, stacked, start, stack, round_, pull, seen)
            if result is None:
                return False
        elif trainer.graphs and pull is None:
            recorded = recordings_of(stacked)
            result = recorded.train(
                start, stack, trainer.stack, trainer.recipe, trainer.task, round_
            )
        if result is None:
            result = train_stack(stacked, start, stack, trainer.recipe, trainer.task, round_, pull)
    with watch.measure("clip and sum"):
        seen.add(result.deltas, result.losses, stack)
    return True


def _run_by_vmap(
    trainer: CohortTrainer,
    stacked: VmappedModel,
    start: Tensor,
    stack: list[StackedUser],
    round_: int,
    pull: Tensor | None,
    seen: _CohortStatistics,
) -> StackedResult | None:
    """Train a stack; None where the model's code asks something that `vmap` cannot answer.

    It may do so for some examples alone. Whoever is to blame, each user is then trained alone. So
    is each of a stack of few.
    """
    if len(stack) < vmapped.FEWEST:
        few = f"vmap pays from {vmapped.FEWEST} users on, and a worker had fewer to train together"
        seen.slow(few, alone=len(stack))
        return None
    try:
        with unchanged_buffers(stacked.module), vmapped.missing_rules() as missing:
            result = train_stack(stacked, start, stack, trainer.recipe, trainer.task, round_, pull)
    except OF_THE_MACHINE:
        raise
    except Exception as error:
        seen.slow(vmapped.cannot_run(error), alone=len(stack))
        return None
    if missing:
        seen.slow(f"vmap goes from user to user in {missing[0]}, for which it has no batching rule")
    return result


def _train_alone(
    trainer: CohortTrainer,
    layout: Layout,
    start: Tensor,
    one: StackedUser,
    round_: int,
    seen: _CohortStatistics,
    watch: Stopwatch,
) -> None:
    for layer in trainer.model.modules():
        if isinstance(layer, Stochastic):
            layer.draw = PerUserDraw([one.dropout()])
    own = one.dropout().initial_seed()
    steps = (one.step(number, trainer.task, round_) for number in range(len(one.steps)))
    steps = (batch.to(trainer.device) for batch in steps)
    # Layers of other kinds draw from global generators. What a layer has kept ends the training,
    # whether or not its user was left out.
    with unchanged_buffers(trainer.model), drawing_from(own, trainer.device):
        try:
            with watch.measure("forward and backward"):
                pull = seen.pull([one])
                pulls = () if pull is None else tuple(layout.split(pull[0]).values())
                result = train_user(
                    trainer.model,
                    layout.split(start),
                    steps,
                    trainer.recipe,
                    trainer.task,
                    pulls,
                    len(one.steps),
                )
        except OF_THE_MACHINE:
            raise  # as in `_work`
        except Exception:  # such as a label that the model has no class for
            if not trainer.tolerant:
                raise
            seen.skip(len(one.examples))
            return
    with watch.measure("clip and sum"):
        update = [result.update[name].reshape(1, -1) for name in layout.names]
        seen.add(update, torch.tensor([result.loss]), [one])


class _CohortStatistics:
    """Bounds updates, accumulates contributions, and notes what was seen of them."""

    def __init__(
        self,
        layout: Layout,
        trainer: CohortTrainer,
        memories: RoundMemories | None,
        shared: Tensor,
    ) -> None:
        self._sizes, self._trainer, self._memories = layout.sizes, trainer, memories
        self._shared = shared
        blocks, device = len(layout.names), trainer.device
        numbers = layout.total * trainer.algorithm.vectors
        self.total = torch.zeros(numbers, dtype=torch.float64, device=device)
        self._slot = self.total
        self.users = self.examples = self.skipped = self.non_finite = self.clipped = 0
        self.loss = self.norm = self.memory_norm = 0.0
        self.memory_reset = 0
        self.block_norms = torch.zeros(blocks, dtype=torch.float64)
        self.block_clipped = torch.zeros(blocks, dtype=torch.int64)
        self.block_shares, self.block_sent = torch.zeros(2, blocks, dtype=torch.float64)
        multipliers = undone(trainer.clipping) or (1.0,) * blocks
        self._multipliers = torch.tensor(multipliers, dtype=torch.float64)
        self._coming: deque[Callable[[], list[Tensor]]] = deque()
        self.alone, self.slowed = 0, ""

    def fill(self, slot: int) -> None:
        """Add the users to come to a slot of `total`, and to no other."""
        self._slot = self.total.chunk(self._trainer.algorithm.slots)[slot]

    def slow(self, why: str, alone: int = 0) -> None:
        """Note why a stack is slower than it should be: so many of its users are trained alone."""
        self.alone += alone
        self.slowed = self.slowed or why

    def skip(self, examples: int) -> None:
        self.users += 1
        self.non_finite += 1
        self.skipped += examples

    def add(
        self, updates: list[Tensor] | ModelDeltas, losses: Tensor, users: Sequence[StackedUser]
    ) -> None:
        """Bound the users' updates, deltas or blocks `[U, d_h]`, add them up and count them."""
        clipped = self._bounded(updates, users)
        self.users += len(users)
        self.examples += sum(len(user.examples) for user in users)
        self.skipped += sum(user.examples.skipped for user in users)
        # Statistics arrive from a GPU while it continues.
        self._coming.append(fetched([clipped.finite, clipped.norms, clipped.scales, losses]))
        while len(self._coming) > (_COMING if self.total.is_cuda else 0):
            self._count(*self._coming.popleft()())

    def _count(self, finite: Tensor, norms: Tensor, scales: Tensor, losses: Tensor) -> None:
        """Count what clipping has seen of a stack."""
        self.non_finite += int((~finite).sum())
        # Of an update; what else a user sends is not counted.
        blocks = len(self._sizes)
        norms, scales = norms[finite, :blocks], scales[finite, :blocks]
        self.block_sent += (norms * scales).sum(0)
        norms, shrunk = norms / self._multipliers, scales < 1 / self._multipliers
        whole = torch.linalg.vector_norm(norms, dim=1)
        self.block_shares += shares_of(norms, whole)
        self.clipped += int(shrunk.any(dim=1).sum())
        self.block_clipped += shrunk.sum(0)
        self.block_norms += norms.sum(0)
        self.norm += float(whole.sum())
        self.loss += float(losses[finite].double().sum())

    def pull(self, users: Sequence[StackedUser]) -> Tensor | None:
        """Return what users add to each gradient: `[U, P]`; None where the algorithm adds none."""
        pull = self._trainer.algorithm.pull(self._shared, self._kept(users))
        return None if pull is None else pull.expand(len(users), -1)

    def _kept(self, users: Sequence[StackedUser]) -> Tensor | None:
        """Return what users keep for the algorithm: `[U, P]`; None where they keep nothing."""
        if not self._trainer.algorithm.keeps:
            return None
        assert self._memories is not None
        return self._memories.read([user.number for user in users]).to(self._trainer.device)

    def _bounded(
        self, updates: list[Tensor] | ModelDeltas, stack: Sequence[StackedUser]
    ) -> ClippedUsers:
        """Add the users' contributions to `total`; they keep what was not sent."""
        trainer, memories = self._trainer, self._memories
        as_is = trainer.algorithm.sends_update_alone or trainer.planted is not None
        if trainer.feedback is None and as_is:
            return clip_and_add(updates, trainer.clipping, self._slot)
        whole = torch.cat(updates, dim=1) if isinstance(updates, list) else updates.written_out()
        if trainer.feedback is None:
            return self._payloads(whole, stack)
        assert memories is not None
        users = [user.number for user in stack]
        before = memories.read(users).to(whole)
        fed = feed_back(whole, before, self._sizes, trainer.clipping, trainer.feedback)
        memories.write(users, fed.memories)
        self.memory_norm += float(torch.linalg.vector_norm(fed.memories, dim=1).sum())
        self.memory_reset += int(fed.reset.sum())
        self._slot += fed.sent.total
        return fed.sent

    def _payloads(self, updates: Tensor, users: Sequence[StackedUser]) -> ClippedUsers:
        """Bound all payloads of the users, add them to `total`, and let users keep theirs."""
        trainer, memories = self._trainer, self._memories
        steps = torch.tensor([len(user.steps) for user in users], device=updates.device)
        kept = self._kept(users)
        trained = Trained(updates, steps, self._shared, kept, trainer.recipe.lr)
        payloads = [trainer.algorithm.update(trained), *trainer.algorithm.sent(trained)]
        blocks = [block for each in payloads for block in each.split(self._sizes, dim=1)]
        clipped = clip_and_add(blocks, trainer.clipping, self._slot)
        if kept is None:
            return clipped
        assert memories is not None
        scales = clipped.scales.to(updates.dtype).unflatten(1, (len(payloads), -1))
        sent = [
            torch.cat(
                [b * s[:, None] for b, s in zip(one.split(self._sizes, dim=1), own, strict=True)], 1
            )
            for one, own in zip(payloads[1:], scales[:, 1:].permute(1, 2, 0), strict=True)
        ]
        after = trainer.algorithm.kept(trained, sent)
        # Whose update is not finite sends nothing and keeps what it had.
        after = torch.where((clipped.finite & after.isfinite().all(1))[:, None], after, kept)
        memories.write([user.number for user in users], after)
        self.memory_norm += float(torch.linalg.vector_norm(after, dim=1).sum())
        return clipped

    def summed(self, watch: Stopwatch) -> CohortSum:
        while self._coming:
            self._count(*self._coming.popleft()())
        return CohortSum(
            total=self.total.cpu(),
            users=self.users,
            examples=self.examples,
            skipped=self.skipped,
            non_finite=self.non_finite,
            loss=self.loss,
            norm=self.norm,
            clipped=self.clipped,
            block_norms=self.block_norms.tolist(),
            block_clipped=self.block_clipped.tolist(),
            block_shares=self.block_shares.tolist(),
            block_sent=self.block_sent.tolist(),
            spans=tuple(watch.spans),
            memory_norm=self.memory_norm,
            memory_reset=self.memory_reset,
            alone=self.alone,
            slowed=self.slowed,
        )
