"""The samplings by name, and what configs say of them.

One of your own needs a proof of what it costs: see `PROVEN` in `fedpriv/privacy/sampling.py`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fedpriv.components import Kind, Options
from fedpriv.privacy.sampling import Adjacency, Sampling, build_sampling

Cohort = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SamplingOptions(Options):
    """How a round's cohort is drawn; each sampling adds its own options."""

    kind: str = Field(description="name of the sampling")

    @property
    def cohort(self) -> float | None:
        """The expected number of users in a round; None for everybody."""
        return None


class PoissonOptions(SamplingOptions):
    """Each user independently (adjacency: add_or_remove_one)."""

    expected_cohort: Cohort = Field(description="Users sampled in a round, in expectation.")

    @property
    def cohort(self) -> float | None:
        """The expected number of users in a round."""
        return self.expected_cohort


class FixedSizeOptions(SamplingOptions):
    """Exactly that many users (adjacency: replace_one, sensitivity 2C)."""

    expected_cohort: Cohort = Field(description="Users sampled in a round; a whole number.")

    @property
    def cohort(self) -> float | None:
        """The number of users in a round."""
        return self.expected_cohort

    @model_validator(mode="after")
    def _is_whole(self) -> FixedSizeOptions:
        if self.expected_cohort != int(self.expected_cohort):
            raise ValueError("expected_cohort must be a whole number with kind: fixed_size")
        return self


class AllOptions(SamplingOptions):
    """Every user, every round."""


class MinSeparationOptions(SamplingOptions):
    """Each user at most once in so many rounds; coins are not trusted, and amplify nothing."""

    rounds: Annotated[int, Field(ge=1, le=100_000)] = Field(
        description="A user takes part at most once in so many rounds: a hash of its id puts it "
        "into one of as many groups, and each round draws from one of them."
    )
    expected_cohort: Cohort | None = Field(
        default=None,
        description="Users in a round, in expectation; null: all of a group, N over the rounds.",
    )

    @property
    def cohort(self) -> float | None:
        """The expected number of users in a round; None for all of a group."""
        return self.expected_cohort


class RandomAllocationOptions(SamplingOptions):
    """Each user in exactly one of so many rounds (balls in bins; adjacency: add_or_remove_one)."""

    rounds: Annotated[int, Field(ge=1, le=100_000)] = Field(
        description="Each user takes part in exactly one of every so many rounds, drawn uniformly "
        "and secretly; a round has N over so many users, in expectation."
    )


def poisson(
    options: PoissonOptions, population: int, adjacency: Adjacency | None = None
) -> Sampling:
    """Return Poisson sampling of so many users; see `build_sampling`."""
    return build_sampling("poisson", population, options.expected_cohort, adjacency)


def fixed_size(
    options: FixedSizeOptions, population: int, adjacency: Adjacency | None = None
) -> Sampling:
    """Return sampling of a fixed number out of so many users; see `build_sampling`."""
    return build_sampling("fixed_size", population, options.expected_cohort, adjacency)


def everybody(options: AllOptions, population: int, adjacency: Adjacency | None = None) -> Sampling:
    """Return the participation of all of so many users; see `build_sampling`."""
    return build_sampling("all", population, None, adjacency)


def min_separation(
    options: MinSeparationOptions, population: int, adjacency: Adjacency | None = None
) -> Sampling:
    """Return sampling of each user at most once in so many rounds; see `build_sampling`."""
    cohort, rounds = options.expected_cohort, options.rounds
    return build_sampling("min_separation", population, cohort, adjacency, rounds)


def random_allocation(
    options: RandomAllocationOptions, population: int, adjacency: Adjacency | None = None
) -> Sampling:
    """Return the allocation of each user to one of so many rounds; see `build_sampling`."""
    return build_sampling("random_allocation", population, None, adjacency, options.rounds)


SAMPLINGS = Kind(
    key="privacy.sampling",
    noun="sampling",
    registered={
        "all": "fedpriv.privacy.sampling_options:everybody",
        "fixed_size": "fedpriv.privacy.sampling_options:fixed_size",
        "min_separation": "fedpriv.privacy.sampling_options:min_separation",
        "poisson": "fedpriv.privacy.sampling_options:poisson",
        "random_allocation": "fedpriv.privacy.sampling_options:random_allocation",
    },
    base="fedpriv.privacy.sampling_options:SamplingOptions",
    facts=("population", "adjacency"),
    name_key="kind",
    default="poisson",
    only_own="who is drawn, and what that costs, is one object that is proved (PROVEN in "
    "fedpriv/privacy/sampling.py); write poisson, fixed_size, all, min_separation or "
    "random_allocation",
)
