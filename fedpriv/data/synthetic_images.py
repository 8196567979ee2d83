"""Synthetic images: any number of made-up users, each a function of a seed and their number.

Nothing is kept of a user who is not asked for, so that memory and start-up do not grow with the
population. There are ten classes, each a smooth pattern; a user sees them in a style of their
own (contrast, brightness, a shift, a background) and through noise. What is measured on them is
always called synthetic: they are made to be learnable, and say nothing of real images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedpriv.counting import numbered
from fedpriv.data.content import Content
from fedpriv.data.facts import DataFacts
from fedpriv.data.federated import Examples
from fedpriv.data.options import DealtOptions, Evaluation
from fedpriv.errors import InputError
from fedpriv.sections import Section

CLASSES = 10

EXAMPLES_PER_USER = 10
"""Where `data.examples_per_user` is null."""

HELD_OUT_USERS = 100
HELD_OUT_EXAMPLES = 10
"""Of each of them, whatever sizes users have."""

STREAM = 0x696D6773
"""Keeps these random numbers apart from all others ("imgs" in ASCII)."""

PATTERNS, USERS, TEST, DEVELOPMENT = range(4)
"""Streams of a data set's random numbers."""

HELD_OUT: dict[Evaluation, int] = {"test": TEST, "development": DEVELOPMENT}

GRID = 7
"""Patterns and backgrounds are smooth: so many random numbers a side, linear in between."""

NOISE, BACKGROUND = 1.0, 0.7
"""Standard deviations of a pixel; a class pattern has 1 before its contrast."""

CONTRAST = (0.6, 1.4)
BRIGHTNESS = 0.3
SHIFT = 0.07
"""Contrasts from and to, brightness' standard deviation, largest shift as a part of the side."""


class SizesConfig(Section):
    """How many examples a made-up user has."""

    kind: Literal["equal", "lognormal"] = Field(
        default="equal",
        description="equal: data.examples_per_user each; lognormal: many have few and few have "
        "many, median·exp(sigma·normal) rounded and kept within 1 and max",
    )
    median: float = Field(
        default=10.0, gt=0, le=1e6, description="lognormal: median number of examples of a user"
    )
    sigma: float = Field(
        default=1.0,
        ge=0,
        le=10,
        description="lognormal: standard deviation of the number's logarithm (no unit)",
    )
    max: int = Field(default=100, gt=0, description="lognormal: most examples that a user has")


class SyntheticConfig(Section):
    """What is made up."""

    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="seed of the data set, of which every user is a function; runs with other "
        "seeds of their own have the same users",
    )
    side: int = Field(default=28, ge=4, le=512, description="height and width of an image (pixels)")
    sizes: SizesConfig = Field(default=SizesConfig(), description="how many examples a user has")


class SyntheticImagesOptions(DealtOptions):
    """How many users are made up, and of what."""

    gives_examples: ClassVar[bool] = True
    synthetic: SyntheticConfig = Field(default=SyntheticConfig(), description="what is made up")


@dataclass(frozen=True)
class UserIds(Sequence[str]):
    """The ids `user-0`, `user-1`, ...: as long as the population, and never written out."""

    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> UserIds: ...

    def __getitem__(self, place: int | slice) -> str | UserIds:
        if isinstance(place, slice):
            return UserIds(self.numbers[place])
        return f"user-{self.numbers[place]}"


@dataclass(frozen=True)
class SyntheticImages:
    """Made-up users: see `FederatedDataset`.

    Attributes:
        population: number of users N.
        made: seed, size of images, and how many a user has.
        examples: number of examples of each user where sizes are equal.
        alpha: concentration of each user's own Dirichlet draw of label shares; None for labels
            that are all as likely.
        held_out: which held-out people `evaluation` yields.
    """

    population: int
    made: SyntheticConfig
    examples: int
    alpha: float | None
    held_out: Evaluation
    sizes = ""  # users are drawn when they are asked for, by public numbers
    facts = DataFacts(users="made_up", example="image", held_out="made_up", public="none")

    @property
    def user_ids(self) -> UserIds:
        """Ids by number."""
        return UserIds(range(self.population))

    @property
    def classes(self) -> int:
        """Ten."""
        return CLASSES

    @property
    def input_shape(self) -> tuple[int, ...]:
        """One channel, height, width."""
        return (1, self.made.side, self.made.side)

    @property
    def description(self) -> str:
        """One line: source, users, sizes."""
        dealt = "iid" if self.alpha is None else f"dirichlet with alpha {self.alpha:g}"
        sizes, side = self.made.sizes, self.made.side
        each = f"{self.examples} training examples each"
        if sizes.kind == "lognormal":
            each = (
                f"1 to {sizes.max} training examples each, lognormal with median "
                f"{sizes.median:g} and sigma {sizes.sigma:g}"
            )
        return (
            f"synthetic images ({side}x{side} pixels, made up): "
            f"{numbered(self.population, 'user')} ({dealt}), "
            f"{each}; {HELD_OUT_USERS * HELD_OUT_EXAMPLES} {self.held_out} examples of "
            f"{HELD_OUT_USERS} others"
        )

    def user(self, index: int) -> Examples:
        """Make up one user's examples: see `FederatedDataset.user`."""
        if not 0 <= index < self.population:
            raise IndexError(f"user index {index} is outside 0..{self.population - 1}")
        rng = generator(self.made.seed, USERS, index)
        sizes = self.made.sizes
        count = draw_size(sizes, rng) if sizes.kind == "lognormal" else self.examples
        return self._person(count, rng)

    def evaluation(self) -> Iterator[Examples]:
        """Make up the held-out examples, in one part, of people who are no users."""
        stream = HELD_OUT[self.held_out]
        yield Examples.join(
            [
                self._person(HELD_OUT_EXAMPLES, generator(self.made.seed, stream, number))
                for number in range(HELD_OUT_USERS)
            ]
        )

    def digest(self) -> str:
        """Return the SHA-256 of what all users are a function of, themselves unseen."""
        return Content(repr(replace(self, held_out="test"))).hexdigest()

    def _person(self, count: int, rng: np.random.Generator) -> Examples:
        shares = None if self.alpha is None else rng.dirichlet(np.full(CLASSES, self.alpha))
        labels = rng.choice(CLASSES, size=count, p=shares)
        patterns = class_patterns(self.made.seed, self.made.side)
        images = draw_style(self.made.side, rng).show(patterns[labels], rng)
        return Examples(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels))


@dataclass(frozen=True, eq=False)
class Style:
    """How one person's images look: `background` is `[side, side]`, shifts are in pixels."""

    contrast: float
    background: NDArray[np.float64]
    shift: tuple[int, int]

    def show(self, patterns: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float32]:
        """Return images, float32 of the shape of `patterns` `[n, side, side]`."""
        clean = self.contrast * np.roll(patterns, self.shift, axis=(1, 2)) + self.background
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        return clean.astype(np.float32) + np.float32(NOISE) * noise


def build_synthetic_images(options: SyntheticImagesOptions, seed: int) -> SyntheticImages:
    """Make up `data.users` users with images of ten classes; partitions iid and dirichlet.

    Like a collected data set the users are the same for every run: the run's `seed` is not
    used, `data.synthetic.seed` names the data set. `partition: dirichlet` gives each user label
    shares of its own. Raises InputError, naming the key, for settings that it cannot use.
    """
    if options.users is None:
        raise InputError("data.users must be set for synthetic_images: how many to make up")
    kind = options.partition.kind
    if kind not in ("iid", "dirichlet"):
        raise InputError(
            f"data.partition.kind must be iid or dirichlet for synthetic_images, got {kind}"
        )
    if options.synthetic.sizes.kind == "lognormal" and options.examples_per_user is not None:
        raise InputError(
            "data.examples_per_user must be null with data.synthetic.sizes.kind=lognormal; "
            "write data.synthetic.sizes.max"
        )
    return SyntheticImages(
        population=options.users,
        made=options.synthetic,
        examples=options.examples_per_user or EXAMPLES_PER_USER,
        alpha=options.partition.alpha if kind == "dirichlet" else None,
        held_out=options.evaluation,
    )


def generator(seed: int, stream: int, number: int = 0) -> np.random.Generator:
    """Return the random numbers of one person, or of the patterns."""
    return np.random.default_rng(np.random.SeedSequence([STREAM, seed, stream, number]))


def draw_size(sizes: SizesConfig, rng: np.random.Generator) -> int:
    """Draw how many examples a user has: lognormal, rounded, within 1 and `sizes.max`."""
    drawn = sizes.median * np.exp(sizes.sigma * rng.standard_normal())
    return int(np.clip(np.rint(drawn), 1, sizes.max))


def draw_style(side: int, rng: np.random.Generator) -> Style:
    """Draw how one person's images look."""
    reach = int(SHIFT * side)
    down, right = rng.integers(-reach, reach + 1, size=2)
    return Style(
        contrast=rng.uniform(*CONTRAST),
        background=BRIGHTNESS * rng.standard_normal() + BACKGROUND * draw_smooth(side, rng),
        shift=(int(down), int(right)),
    )


def draw_smooth(side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a smooth field `[side, side]` of mean 0 and standard deviation 1."""
    between = _interpolation(side)
    field = between @ rng.standard_normal((GRID, GRID)) @ between.T
    return (field - field.mean()) / field.std()


@lru_cache(maxsize=4)
def class_patterns(seed: int, side: int) -> NDArray[np.float64]:
    """Return the pattern of each class, `[CLASSES, side, side]`."""
    rng = generator(seed, PATTERNS)
    return np.stack([draw_smooth(side, rng) for _ in range(CLASSES)])


@lru_cache(maxsize=4)
def _interpolation(side: int) -> NDArray[np.float64]:
    """Return the matrix `[side, GRID]` that draws lines between numbers on a grid."""
    nodes, places = np.linspace(0, 1, GRID), np.linspace(0, 1, side)
    return np.stack([np.interp(places, nodes, unit) for unit in np.eye(GRID)], axis=1)
