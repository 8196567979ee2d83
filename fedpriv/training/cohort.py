"""The users of one node in one round: each is trained, clipped and added to one sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpriv.data.federated import Examples, FederatedDataset
from fedpriv.errors import InputError
from fedpriv.privacy.clipping import ClippedUpdate, ClippingRule, clip
from fedpriv.privacy.randomness import Purpose, Randomness
from fedpriv.training.local import LocalResult, LocalTraining, Loss, train_user
from fedpriv.training.parameters import Layout


@dataclass(frozen=True)
class CohortTrainer:
    """Everything public that a node needs to train its users.

    Attributes:
        dataset: the users, by index.
        model: the architecture; its parameters are overwritten.
        loss: mean loss of a batch.
        recipe: local training.
        clipping: the rule that bounds each user's contribution.
        seed: derives the order of each user's examples and its dropout.
        device: where training runs.
        tolerant: a user whose data cannot be used contributes zero and is counted, instead of
            stopping the run. A deployment must not let one user decide whether others count.
    """

    dataset: FederatedDataset
    model: nn.Module
    loss: Loss
    recipe: LocalTraining
    clipping: ClippingRule
    seed: int
    device: torch.device
    tolerant: bool = False


@dataclass(frozen=True)
class CohortSum:
    """The sum of clipped updates, and what is seen on the way (private: simulation only).

    Attributes:
        total: float64 `[parameters]`, the sum over users in the order in which they were given.
        users: number of users that were trained.
        examples: number of their examples.
        non_finite: users who contributed zero: their update held a NaN or Inf, or (tolerant)
            their data could not be used.
        loss: sum over users of the mean local loss, over finite ones.
        norm: sum over users of the update's L2 norm before clipping, over finite ones.
        clipped: users with any block scaled down.
        block_norms: `[blocks]`, sum over users of each block's norm before clipping.
        block_clipped: `[blocks]`, number of users whose block was scaled down.
    """

    total: Tensor
    users: int
    examples: int
    non_finite: int
    loss: float
    norm: float
    clipped: int
    block_norms: list[float]
    block_clipped: list[int]


def train_cohort(
    trainer: CohortTrainer, parameters: Tensor, users: Sequence[int], round_: int
) -> CohortSum:
    """Train each of `users` from the flat `parameters` and return the sum of clipped updates.

    The sum is kept in float64 and taken in the order of `users`, so it depends on nothing else.
    """
    layout = Layout.of(trainer.model)
    start = layout.split(parameters.to(trainer.device))
    seen = _Seen(layout, trainer.device)
    for user in users:
        try:
            result = _train_one(trainer, start, user, round_)
        except InputError:
            if not trainer.tolerant:
                raise
            seen.skip()
        else:
            seen.add(result, clip(result.update, trainer.clipping))
    return seen.summed()


def _train_one(
    trainer: CohortTrainer, start: dict[str, Tensor], user: int, round_: int
) -> LocalResult:
    randomness = Randomness.simulation(trainer.seed)
    # Dropout draws from the global generator; the order of examples has one of its own.
    torch.manual_seed(randomness.torch_seed(Purpose.LOCAL_TRAINING, round_, user, 1))
    generator = randomness.torch(Purpose.LOCAL_TRAINING, round_, user)
    held = trainer.dataset.user(user)
    examples = Examples(held.inputs.to(trainer.device), held.targets.to(trainer.device))
    return train_user(trainer.model, start, examples, trainer.recipe, trainer.loss, generator)


class _Seen:
    """Accumulates contributions and what was seen of them."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        blocks = len(layout.names)
        self.total = torch.zeros(layout.total, dtype=torch.float64, device=device)
        self.blocks = layout.split(self.total)
        self.users = self.examples = self.non_finite = self.clipped = 0
        self.loss = self.norm = 0.0
        self.block_norms = torch.zeros(blocks, dtype=torch.float64, device=device)
        self.block_clipped = torch.zeros(blocks, dtype=torch.int64, device=device)

    def skip(self) -> None:
        self.users += 1
        self.non_finite += 1

    def add(self, result: LocalResult, contribution: ClippedUpdate) -> None:
        self.users += 1
        self.examples += result.examples
        if not contribution.finite:
            self.non_finite += 1
            return
        for name, block in contribution.blocks.items():
            self.blocks[name].add_(block)
        shrunk = contribution.scales < 1
        self.clipped += int(shrunk.any())
        self.block_clipped += shrunk
        self.block_norms += contribution.norms
        self.norm += float(torch.linalg.vector_norm(contribution.norms))
        self.loss += result.loss

    def summed(self) -> CohortSum:
        return CohortSum(
            total=self.total.cpu(),
            users=self.users,
            examples=self.examples,
            non_finite=self.non_finite,
            loss=self.loss,
            norm=self.norm,
            clipped=self.clipped,
            block_norms=self.block_norms.tolist(),
            block_clipped=self.block_clipped.tolist(),
        )
