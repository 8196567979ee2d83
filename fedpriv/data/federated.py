"""What a federated data set is: users who hold examples, and examples that no user holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpriv.counting import numbered
from fedpriv.data.content import Content
from fedpriv.data.facts import UNCHECKED, DataFacts
from fedpriv.errors import InputError
from fedpriv.transfer import moved_to


class Batch(Protocol):
    """Some examples: `Examples` or `Utterances`."""

    def __len__(self) -> int: ...

    @property
    def sizes(self) -> Tensor:
        """What each example costs to train on, relative to the others: int64 `[n]`."""

    @property
    def skipped(self) -> int:
        """Number of examples that could not be used."""

    def take(self, index: Tensor) -> Self:
        """Return the examples at `index`."""

    def to(self, device: torch.device) -> Self:
        """Return them where a model reads them; what the host reads stays where it is."""

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Lay the examples of several users end to end."""

    @classmethod
    def gather(cls, parts: Sequence[Self], indices: Sequence[Tensor]) -> Self:
        """Lay the examples at each part's own indices end to end."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples ready for a model.

    `inputs` is float32 `[n, ...]`, `targets` is int64 `[n]`; `skipped` more could not be used.
    Raises ValueError when their lengths differ.
    """

    inputs: Tensor
    targets: Tensor
    skipped: int = 0

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def sizes(self) -> Tensor:
        """What each example costs to train on, relative to the others: int64 `[n]`."""
        return torch.ones(len(self), dtype=torch.int64)

    def take(self, index: Tensor) -> "Examples":
        """Copy the examples at `index` (int64 `[m]`)."""
        return Examples(self.inputs[index], self.targets[index])

    def to(self, device: torch.device) -> "Examples":
        """Return them on another device."""
        inputs, targets = moved_to(device, self.inputs), moved_to(device, self.targets)
        return Examples(inputs, targets, self.skipped)

    @classmethod
    def join(cls, parts: "Sequence[Examples]") -> "Examples":
        """Lay the examples of several users end to end."""
        return cls(
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.targets for part in parts]),
            sum(part.skipped for part in parts),
        )

    @classmethod
    def gather(cls, parts: "Sequence[Examples]", indices: Sequence[Tensor]) -> "Examples":
        """Lay the examples at each part's own indices end to end."""
        chosen = list(zip(parts, indices, strict=True))
        return cls(
            torch.cat([part.inputs.index_select(0, index) for part, index in chosen]),
            torch.cat([part.targets.index_select(0, index) for part, index in chosen]),
        )


class FederatedDataset(Protocol):
    """A population of users, each with private examples, and public facts about them.

    It is hashable: prepared users are kept by data set and number.
    """

    @property
    def population(self) -> int:
        """Number of users N."""

    @property
    def user_ids(self) -> Sequence[str]:
        """Stable public ids: position i names the user with index i."""

    @property
    def classes(self) -> int:
        """Number of classes: targets are 0 to `classes` - 1."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: channels, height, width of an image, samples of a second of sound."""

    @property
    def description(self) -> str:
        """One line for reports: source, users, held-out examples. Public: no user counts in it."""

    @property
    def sizes(self) -> str:
        """How many examples users have, in words; empty where it is public. Private."""

    @property
    def facts(self) -> DataFacts:
        """What is true of it, as far as that was checked."""

    def user(self, index: int) -> Batch:
        """Build the examples of one user, `0 <= index < population`.

        Raises IndexError outside that range and InputError for a user without examples.
        """

    def evaluation(self) -> Iterator[Batch]:
        """Build the held-out examples, which no user holds; whose they are say its facts.

        They come in parts, so that a caller may turn each into something smaller.
        """

    def digest(self) -> str:
        """Return the SHA-256 of the ordered user ids, their numbers of examples and their data.

        A copy of the data elsewhere has the same one. Private: it is a function of users' data.
        """


def notes_of(dataset: FederatedDataset, places: int | None) -> tuple[str, ...]:
    """Return what to know of a simulation's users before training on them; private.

    `places` is `data.users`. A data set says it where it has `notes`; of any other it is seen
    whether it has more users than places.
    """
    notes: tuple[str, ...] = getattr(dataset, "notes", ())
    if places is not None and dataset.population > places:
        notes += (
            f"data.users is {places} and the data have {numbered(dataset.population, 'user')}: "
            "those beyond have no place and are left out",
        )
    return notes


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Raw images `[n, channels, height, width]`, usually uint8, with int64 labels `[n]`.

    Raises ValueError when the lengths differ.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> "LabelledImages":
        """Copy the chosen images, in the order of `indices`."""
        chosen = torch.from_numpy(indices)
        return LabelledImages(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class PixelScale:
    """`(pixel / maximum - mean) / std`, with public constants.

    The constants are fixed in the code and never measured on a run's images: a mean taken over
    the users' pixels would be a release that no ledger charges.
    """

    maximum: float
    mean: float
    std: float

    def apply(self, images: Tensor) -> Tensor:
        """Return float32 images of the same shape."""
        return (images.to(torch.float32) / self.maximum - self.mean) / self.std


@dataclass(frozen=True, eq=False)
class PartitionedImages:
    """Users as index arrays into one pool of raw images, scaled to float user by user.

    `parts[i]` holds the pool positions of user i. Only raw pixels stay in memory. An example whose
    label is none of 0 to `classes` - 1 is left out and counted, when its user is built.
    """

    pool: LabelledImages
    parts: Sequence[NDArray[np.int64]]
    user_ids: Sequence[str]
    held_out: LabelledImages
    scale: PixelScale
    classes: int
    description: str
    sizes: str = ""
    facts: DataFacts = UNCHECKED

    @property
    def population(self) -> int:
        """Number of users N."""
        return len(self.parts)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return tuple(self.pool.images.shape[1:])

    def user(self, index: int) -> Examples:
        """Build one user's examples: see `FederatedDataset.user`."""
        if not 0 <= index < self.population:
            raise IndexError(f"user index {index} is outside 0..{self.population - 1}")
        if len(self.parts[index]) == 0:
            raise InputError(
                f"empty user: {self.user_ids[index]} has no examples; "
                "leave it out of the population or give it some"
            )
        return self._scaled(self.pool.take(self.parts[index]))

    def evaluation(self) -> Iterator[Examples]:
        """Build the held-out examples, in one part: see `FederatedDataset.evaluation`."""
        yield self._scaled(self.held_out)

    def digest(self) -> str:
        """Return the SHA-256 of the users' ids, pixels and labels."""
        content = Content(f"images {self.classes} {self.scale}")
        for user_id, part in zip(self.user_ids, self.parts, strict=True):
            content.add_user(user_id, len(part))
            raw = self.pool.take(part)
            content.add_tensor(raw.images)
            content.add_tensor(raw.labels)
        return content.hexdigest()

    def _scaled(self, raw: LabelledImages) -> Examples:
        known = (raw.labels >= 0) & (raw.labels < self.classes)
        images, labels = raw.images[known], raw.labels[known]
        return Examples(self.scale.apply(images), labels, len(raw) - len(labels))


@dataclass(frozen=True)
class DatasetPartition:
    """One node's own users: every `partitions`-th of a data set, from number `partition` on."""

    whole: FederatedDataset
    partition: int
    partitions: int

    @property
    def population(self) -> int:
        """Number of users of this partition."""
        return len(range(self.partition, self.whole.population, self.partitions))

    @property
    def user_ids(self) -> Sequence[str]:
        """Ids of this partition's users."""
        return self.whole.user_ids[self.partition :: self.partitions]

    @property
    def classes(self) -> int:
        """Number of classes of the whole."""
        return self.whole.classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.whole.input_shape

    @property
    def description(self) -> str:
        """One line: which partition of what."""
        return f"partition {self.partition} of {self.partitions}: {self.whole.description}"

    @property
    def sizes(self) -> str:
        """How many examples users of the whole have."""
        return self.whole.sizes

    @property
    def facts(self) -> DataFacts:
        """What is true of the whole."""
        return self.whole.facts

    def user(self, index: int) -> Batch:
        """Build one user's examples: see `FederatedDataset.user`."""
        return self.whole.user(self.partition + index * self.partitions)

    def evaluation(self) -> Iterator[Batch]:
        """Build the held-out examples of the whole."""
        return self.whole.evaluation()

    def digest(self) -> str:
        """Return the SHA-256 of the whole's digest and of which partition this is."""
        content = Content(f"partition {self.partition} of {self.partitions}")
        content.add(self.whole.digest().encode())
        return content.hexdigest()
