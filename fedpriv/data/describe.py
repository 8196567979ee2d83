"""What is in a data set: how many users and examples, and how unlike users' classes are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedpriv.data import partition
from fedpriv.data.federated import FederatedDataset, notes_of
from fedpriv.errors import InputError


@dataclass(frozen=True, eq=False)
class LabelSkew:
    """How unlike users' classes are.

    Attributes:
        counts: examples of each class, of all users: int64 `[classes]`.
        largest: the share of a user's most frequent class, in the median over users.
        distance: the mean over users of half the L1 distance between their shares of classes and
            those of all users together: 0 where all are alike, towards 1 where each has its own.
        shares: the shares of classes of each user, float64 `[users, classes]`.
    """

    counts: NDArray[np.int64]
    largest: float
    distance: float
    shares: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Description:
    """A data set in numbers; what is a function of users' data is private.

    Attributes:
        dataset: which.
        held_out: how many held-out examples there are. Public, if these are.
        population: how many users there are. Private.
        looked_at: how many of them were read.
        sizes: how many examples each of these has, int64. Private.
        skipped: how many more could not be used. Private.
        skew: of their classes; None where there are none. Private.
        reason: why the first that was skipped was; "" where that is not known. Private.
        notes: what else to know before training on these users. Private.
    """

    dataset: FederatedDataset
    held_out: int
    population: int
    looked_at: int
    sizes: NDArray[np.int64]
    skipped: int
    skew: LabelSkew | None
    reason: str = ""
    notes: tuple[str, ...] = ()


def describe(
    dataset: FederatedDataset, most: int, seed: int, places: int | None = None
) -> Description:
    """Read at most so many users, drawn at random, and return what they have.

    `places` is `data.users`.

    Raises:
        InputError: there is no user, or what one has would end a run.
    """
    places_of = {user_id: place for place, user_id in enumerate(dataset.user_ids)}
    if not places_of:
        raise InputError("data: there is no user here to describe")
    chosen = places_of if len(places_of) <= most else partition.choose(places_of, most, seed)
    by_class = getattr(dataset, "task", "classification") == "classification"
    sizes, labels, skipped, reason = [], [], 0, ""
    for user_id in chosen:
        examples = dataset.user(places_of[user_id])
        sizes.append(len(examples))
        skipped += examples.skipped
        if examples.skipped and not reason and hasattr(dataset, "why_skipped"):
            reason = dataset.why_skipped(places_of[user_id])
        targets = getattr(examples, "targets", None)
        if by_class and targets is not None and targets.dim() == 1 and len(targets):
            labels.append(torch.bincount(targets, minlength=dataset.classes).numpy())
    return Description(
        dataset=dataset,
        held_out=sum(len(part) for part in dataset.evaluation()),
        population=len(places_of),
        looked_at=len(sizes),
        sizes=np.array(sizes, np.int64),
        skipped=skipped,
        skew=_skew(np.array(labels, np.int64)) if labels else None,
        reason=reason,
        notes=notes_of(dataset, places),
    )


def _skew(counts: NDArray[np.int64]) -> LabelSkew:
    """Return the skew of users' counts of classes, `[users, classes]`, none of them empty."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    together = counts.sum(axis=0) / counts.sum()
    return LabelSkew(
        counts=counts.sum(axis=0),
        largest=float(np.median(shares.max(axis=1))),
        distance=float(np.abs(shares - together).sum(axis=1).mean() / 2),
        shares=shares,
    )
