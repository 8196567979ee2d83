"""The `data:` section of an experiment's configuration: public choices only, no data."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Evaluation = Literal["test", "development"]
PartitionKind = Literal["iid", "dirichlet", "shards", "natural"]


class PartitionConfig(BaseModel):
    """How the training examples are dealt to users."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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


class DataConfig(BaseModel):
    """Which federated data set a run trains and is evaluated on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="digits", description="name of the data set in the registry")
    users: int | None = Field(
        default=None,
        gt=0,
        description="population: number of users; null only for natural users, "
        "where the data set has its own number",
    )
    examples_per_user: int | None = Field(
        default=None,
        gt=0,
        description="largest number of examples that one user keeps, drawn at random; null: all",
    )
    partition: PartitionConfig = Field(
        default=PartitionConfig(), description="how the training examples are dealt to users"
    )
    path: Path | None = Field(
        default=None,
        description="folder of the data set's files; null for data that the package carries",
    )
    evaluation: Evaluation = Field(
        default="test",
        description="test: evaluate on the data set's test examples; development: evaluate on a "
        "fixed eighth of the training side instead, which then belongs to no user (for tuning)",
    )
