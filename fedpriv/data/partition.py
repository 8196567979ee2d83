"""Deal examples to users: pure functions from labels (or groups) to index arrays.

Every function returns one ascending int64 index array for each user. The arrays are disjoint,
cover all examples and none is empty; `cap` is the one that drops examples. Dealing draws from the
given generator alone: it makes the users up. What happens to users who are given, `cap` and
`choose`, is drawn for each of them alone, by its id.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from fedpriv.errors import InputError
from fedpriv.privacy.randomness import Purpose, Randomness, id_words
from fedpriv.sections import Section

Indices = NDArray[np.int64]

PartitionKind = Literal["iid", "dirichlet", "shards", "natural"]


class PartitionConfig(Section):
    """How the training examples are dealt to users."""

    kind: PartitionKind = Field(
        default="iid",
        description="iid: at random; dirichlet: label skew by a Dirichlet draw for each user; "
        "shards: label skew by pieces of the examples sorted by label; "
        "natural: the people that the data set itself names",
    )
    alpha: float = Field(
        default=0.3,
        gt=0,
        le=1e6,
        description="dirichlet only: concentration of each label's share (no unit); "
        "towards 0 a user sees one label, at 1000 nearly all labels equally",
    )
    shards_per_user: int = Field(
        default=2, gt=0, description="shards only: number of label-sorted pieces that a user gets"
    )


def iid(labels: ArrayLike, users: int, rng: np.random.Generator) -> list[Indices]:
    """Deal a random permutation: sizes differ by at most one.

    Raises InputError when there are more users than examples.
    """
    examples = len(np.asarray(labels))
    _require_users(users, examples)
    return [np.sort(part) for part in np.array_split(rng.permutation(examples), users)]


def dirichlet(
    labels: ArrayLike, users: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    """Give each user its own mix of labels, drawn from a symmetric Dirichlet (Hsu et al. 2019).

    User k draws label shares `p_k ~ Dirichlet(alpha, ..., alpha)` over the labels that occur,
    then its examples by those shares without replacement; a label that runs out is struck from
    the shares of those who come later. Sizes differ by at most one. Hsu et al. state the total
    concentration, which is `alpha` times the number of labels here.

    Raises InputError when there are more users than examples.
    """
    labels = np.asarray(labels)
    _require_users(users, len(labels))
    stock = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    sizes = [len(part) for part in np.array_split(labels, users)]
    parts: list[Indices] = [np.empty(0, dtype=np.int64)] * users
    # Users who come last find the leftovers: a random order keeps that apart from the index.
    for user in rng.permutation(users):
        shares = rng.dirichlet(np.full(len(stock), alpha))
        counts = _draw_counts(shares, sizes[user], np.array([len(s) for s in stock]), rng)
        taken = [left[:count] for left, count in zip(stock, counts, strict=True)]
        stock = [left[count:] for left, count in zip(stock, counts, strict=True)]
        parts[user] = np.sort(np.concatenate(taken))
    return parts


def _draw_counts(
    shares: NDArray[np.float64], size: int, available: Indices, rng: np.random.Generator
) -> Indices:
    """Draw how many examples of each label make up `size`, never more than `available`."""
    counts = np.zeros_like(available)
    while (missing := size - counts.sum()) > 0:
        left = available - counts
        weights = np.where(left > 0, shares, 0.0)
        if weights.sum() < np.finfo(float).tiny:
            # Every label this user wanted has run out: take from what there is.
            weights = left.astype(float)
        draw = rng.multinomial(missing, weights / weights.sum())
        counts += np.minimum(draw, left)
    return counts


def shards(
    labels: ArrayLike, users: int, shards_per_user: int, rng: np.random.Generator
) -> list[Indices]:
    """Cut the examples, sorted by label, into equal shards and deal them (McMahan et al. 2017).

    There are `users * shards_per_user` shards, whose sizes differ by at most one; a user has few
    labels, about `shards_per_user`.

    Raises InputError when a shard would be empty.
    """
    labels = np.asarray(labels)
    _require_users(users, len(labels))
    if users * shards_per_user > len(labels):
        raise InputError(
            f"data.users must be at most {len(labels) // shards_per_user} with "
            f"data.partition.shards_per_user={shards_per_user} "
            f"({len(labels)} training examples make no more shards), got {users}"
        )
    pieces = np.array_split(np.argsort(labels, kind="stable"), users * shards_per_user)
    dealt = rng.permutation(len(pieces)).reshape(users, shards_per_user)
    return [np.sort(np.concatenate([pieces[i] for i in hand])) for hand in dealt]


def natural(group_ids: ArrayLike) -> list[Indices]:
    """Make one user of each group: user i holds the examples of the i-th smallest group id."""
    _, sizes = np.unique(np.asarray(group_ids), return_counts=True)
    by_group = np.argsort(np.asarray(group_ids), kind="stable")
    ends = np.cumsum(sizes)
    return [by_group[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def cap(
    parts: Sequence[Indices], user_ids: Sequence[str], limit: int | None, seed: int
) -> list[Indices]:
    """Keep a uniformly random subset of at most `limit` examples of each user; None keeps all.

    Each user's subset has a stream of its own: with one for all, how many examples one user has
    would decide which ones of the others are kept.
    """
    if limit is None:
        return list(parts)
    randomness = Randomness.simulation(seed)

    def kept(part: Indices, user_id: str) -> Indices:
        if len(part) <= limit:
            return part
        own = randomness.numpy(Purpose.KEPT_EXAMPLES, *id_words(user_id))
        return np.sort(own.choice(part, limit, replace=False))

    return [kept(part, user_id) for part, user_id in zip(parts, user_ids, strict=True)]


def choose(names: Iterable[str], number: int, seed: int) -> list[str]:
    """Return `number` of `names` at random, or all where there are fewer, sorted.

    They are those with the smallest numbers, which each draws by itself: a name more or less
    changes at most one other choice.
    """
    randomness = Randomness.simulation(seed)
    drawn = {name: randomness.torch_seed(Purpose.CHOSEN_USERS, *id_words(name)) for name in names}
    return sorted(sorted(drawn, key=lambda name: (drawn[name], name))[:number])


def undrawn(people: int, users: int | None) -> str:
    """Say where `choose` leaves people out; "" where it does not. Private: it counts them."""
    if users is None or people <= users:
        return ""
    return (
        f"data.users is {users} and there are {people} people here: {users} drawn at random are "
        f"trained on, and the other {people - users} are left out; write users: {people} or more "
        "for all"
    )


def held_out_by_id(name: str, every: int) -> bool:
    """Say whether a person belongs to the public part of one in `every` that is held out.

    It is a function of the name alone. Every so many-th in the order of names would not be: with
    one person less, all who come later would change places.
    """
    return id_words(name)[0] % every == 0


def _require_users(users: int, examples: int) -> None:
    if not 1 <= users <= examples:
        raise InputError(
            f"data.users must be at least 1 and at most {examples} "
            f"(the number of training examples), got {users}"
        )
