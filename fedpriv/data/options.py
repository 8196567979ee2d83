"""What configs say of data sets: of any, of those whose examples are dealt, of those in folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedpriv.components import Options
from fedpriv.data.partition import PartitionConfig
from fedpriv.sections import NO_BEARING, KeptPath

Evaluation = Literal["test", "development"]


class DataOptions(Options):
    """Which federated data set a run trains and is evaluated on; each adds its own options."""

    name: str = Field(description="name of the data set, or package.module:object for your own")
    users: int | None = Field(
        default=None,
        gt=0,
        description="population: number of users; natural users may be fewer, then some places "
        "are empty, and where they are more so many are drawn and the others left out; null, for "
        "natural users only: the data set's own number",
    )

    @property
    def most_examples(self) -> int | None:
        """The largest number of examples that a user has; None for any."""
        return None

    def caps(self) -> Mapping[str, Any]:
        """Return, by key, what cuts off a user's examples, so that one more moves another out."""
        return {}

    def decides_users(self) -> Mapping[str, Any]:
        """Return, by key, what decides who a user is, or makes public what is read of users.

        In a deployment that is for each node to say, not for the server: it could make a user of
        every example. Empty where nothing does.
        """
        return {}


class KeptOptions(DataOptions):
    """How much of its examples a user keeps, and which no user holds."""

    examples_per_user: int | None = Field(
        default=None,
        gt=0,
        description="largest number of examples that one user keeps, drawn at random; null: all",
    )
    evaluation: Evaluation = Field(
        default="test",
        description="test: evaluate on the data set's test examples; development: evaluate on a "
        "fixed eighth of the training side instead, which then belongs to no user (for tuning)",
    )

    #: Whether `examples_per_user` is how many a user is given, not a cap on what it has.
    gives_examples: ClassVar[bool] = False

    @property
    def most_examples(self) -> int | None:
        """The largest number of examples that a user has; None for any."""
        return self.examples_per_user

    def caps(self) -> Mapping[str, Any]:
        """Return, by key, what cuts off a user's examples, so that one more moves another out."""
        return {} if self.gives_examples else {"examples_per_user": self.examples_per_user}


class DealtOptions(KeptOptions):
    """How the examples of a collection become those of users."""

    partition: PartitionConfig = Field(
        default=PartitionConfig(), description="how the training examples are dealt to users"
    )


class FolderOptions(DealtOptions):
    """Of a data set whose files the user has."""

    path: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None, description="folder of the data set's files"
    )
