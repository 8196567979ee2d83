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


SAMPLINGS = Kind(
    key="privacy.sampling",
    noun="sampling",
    registered={
        "all": "fedpriv.privacy.sampling_options:everybody",
        "fixed_size": "fedpriv.privacy.sampling_options:fixed_size",
        "poisson": "fedpriv.privacy.sampling_options:poisson",
    },
    base="fedpriv.privacy.sampling_options:SamplingOptions",
    facts=("population", "adjacency"),
    name_key="kind",
    default="poisson",
    only_own="who is drawn, and what that costs, is one object that is proved (PROVEN in "
    "fedpriv/privacy/sampling.py); write poisson, fixed_size or all",
)
