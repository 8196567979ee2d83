"""From labelled images to users: the part that all image data sets have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedpriv import counting
from fedpriv.data import partition
from fedpriv.data.facts import DataFacts
from fedpriv.data.federated import LabelledImages, PartitionedImages, PixelScale
from fedpriv.data.options import DealtOptions
from fedpriv.data.partition import held_out_by_id
from fedpriv.errors import InputError

DEVELOPMENT_EVERY = 8
"""`evaluation: development` holds out one in so many of the training side."""

PARTITION_STREAM = 0x70617274
"""Keeps the partition's random numbers apart from all others of the run ("part" in ASCII)."""


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Labelled images before they are dealt to users: what a data set's own file provides.

    `writers` names the person behind each training image, int64 `[n]`, or is None when the data
    set does not say. Raises InputError when training and test images differ in shape.
    """

    title: str
    training: LabelledImages
    test: LabelledImages
    classes: int
    scale: PixelScale
    writers: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        shapes = [list(split.images.shape[1:]) for split in (self.training, self.test)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"data.path: {self.title}: training images are {shapes[0]} but test images "
                f"{shapes[1]} (channels, height, width); use files of one data set"
            )


def federate(source: ImageSource, options: DealtOptions, seed: int) -> PartitionedImages:
    """Hold out the evaluation examples and deal the others to users, as the options asks.

    The result depends on `source`, `options` and `seed` only; the held-out examples do not
    depend on `seed`. Raises InputError for a partition that the source cannot have.
    """
    if options.evaluation == "development":
        source = hold_out_development(source)
    rng = np.random.default_rng(np.random.SeedSequence([seed, PARTITION_STREAM]))
    dealt = _deal(source, options, rng)
    user_ids = _user_ids(source, options, len(dealt))
    parts = partition.cap(dealt, user_ids, options.examples_per_user, seed)
    return PartitionedImages(
        pool=source.training,
        parts=parts,
        user_ids=user_ids,
        held_out=source.test,
        scale=source.scale,
        classes=source.classes,
        description=_describe(source, options, options.users or len(parts)),
        sizes=_sizes(parts, source),
        facts=_facts(source, options),
    )


def hold_out_development(source: ImageSource) -> ImageSource:
    """Replace the test set by a fixed eighth of the training side, which leaves the training.

    With writers it is one writer in eight, by a hash of the id, with all their images; without,
    every eighth training image. The rule is public and the same for every seed.
    Raises InputError when nothing is left to train on.
    """
    held = np.arange(len(source.training)) % DEVELOPMENT_EVERY == 0
    if (writers := source.writers) is not None:
        strangers = [w for w in np.unique(writers) if held_out_by_id(_writer(w), DEVELOPMENT_EVERY)]
        held = np.isin(writers, strangers)
    if held.all() or not held.any():
        left = "training" if held.all() else "held-out"
        raise InputError(
            f"data.evaluation=development leaves no {left} examples among the {len(held)} here, "
            f"since it holds out one in {DEVELOPMENT_EVERY}: use test"
        )
    return ImageSource(
        title=source.title,
        training=source.training.take(np.flatnonzero(~held)),
        test=source.training.take(np.flatnonzero(held)),
        classes=source.classes,
        scale=source.scale,
        writers=None if source.writers is None else source.writers[~held],
    )


def _deal(
    source: ImageSource, options: DealtOptions, rng: np.random.Generator
) -> list[partition.Indices]:
    if options.partition.kind == "natural":
        return _deal_naturally(source, options)
    return make_up(source.training.labels.numpy(), options, rng)


def make_up(
    labels: NDArray[np.int64], options: DealtOptions, rng: np.random.Generator
) -> list[partition.Indices]:
    """Deal examples of these labels to `data.users` made-up users, as the options ask.

    Raises InputError without their number, or for one that is too large.
    """
    kind = options.partition.kind
    if options.users is None:
        raise InputError(
            f"data.users must be set for data.partition.kind={kind}: "
            f"a number from 1 to {len(labels)}"
        )
    if kind == "dirichlet":
        return partition.dirichlet(labels, options.users, options.partition.alpha, rng)
    if kind == "shards":
        return partition.shards(labels, options.users, options.partition.shards_per_user, rng)
    return partition.iid(labels, options.users, rng)


def _deal_naturally(source: ImageSource, options: DealtOptions) -> list[partition.Indices]:
    if source.writers is None:
        raise InputError(
            f"data.partition.kind=natural: data set {options.name} does not say who its users "
            "are; use iid, dirichlet or shards"
        )
    parts = partition.natural(source.writers)
    if options.users is not None and options.users < len(parts):
        raise InputError(
            f"data.users must be null or at least {len(parts)} (the writers of {options.name} with "
            f"data.evaluation={options.evaluation}) for natural users, got {options.users}"
        )
    return parts


def _user_ids(source: ImageSource, options: DealtOptions, users: int) -> tuple[str, ...]:
    if options.partition.kind == "natural" and source.writers is not None:
        return tuple(map(_writer, np.unique(source.writers)))
    return tuple(f"user-{index}" for index in range(users))


def _writer(number: np.int64) -> str:
    return f"writer-{number}"


def _facts(source: ImageSource, options: DealtOptions) -> DataFacts:
    """Whose the test images are no file says; held-out writers are taken out of the training."""
    named = source.writers is not None
    return DataFacts(
        users="person" if options.partition.kind == "natural" and named else "dealt",
        example="image",
        held_out="others" if options.evaluation == "development" and named else "unnamed",
        public="none",
    )


def _describe(source: ImageSource, options: DealtOptions, users: int) -> str:
    held_out = int(_known(source.test.labels, source).sum())
    return (
        f"{source.title}: {counting.numbered(users, 'user')} ({how_dealt(options)}); "
        f"{counting.numbered(held_out, f'{options.evaluation} example')}"
    )


def how_dealt(options: DealtOptions) -> str:
    """Return how users come about, in words."""
    settings = {
        "dirichlet": f" with alpha {options.partition.alpha:g}",
        "shards": f" of {options.partition.shards_per_user} a user",
    }
    return options.partition.kind + settings.get(options.partition.kind, "")


def _known(labels: Tensor, source: ImageSource) -> NDArray[np.bool_]:
    """Return which labels are classes: examples of others are left out."""
    return ((labels >= 0) & (labels < source.classes)).numpy()


def _sizes(parts: Sequence[partition.Indices], source: ImageSource) -> str:
    """Return how many examples users are trained on, and how many are left out, in words."""
    known = _known(source.training.labels, source)
    used = [int(known[part].sum()) for part in parts]
    said = counting.in_words(used, "training example")
    wrong = sum(map(len, parts)) - sum(used)
    return said + f"; {wrong:,} training examples with wrong labels, left out" * bool(wrong)
