"""The `data:` section of an experiment's configuration: public choices only, no data."""

from typing import Annotated, Literal

from pydantic import Field

from fedpriv.sections import NO_BEARING, KeptPath, Section

Evaluation = Literal["test", "development"]
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


class SpeechConfig(Section):
    """What is read of recordings; for speech data sets only."""

    sample_rate: int = Field(
        default=16_000,
        ge=4_000,
        le=48_000,
        description="sample rate that the model hears (Hz); recordings are resampled to it",
    )
    max_seconds: float = Field(
        default=36.0,
        gt=0,
        le=3600,
        description="longest utterance that is used (seconds); a longer one is a bad recording",
    )
    max_seconds_per_user: float | None = Field(
        default=None,
        gt=0,
        description="a user's recordings are used up to this sum (seconds); null: all",
    )
    alphabet: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None,
        description="file with one character a line; null: the data set's own, which is public",
    )
    on_bad: Literal["skip", "stop"] = Field(
        default="skip",
        description="a recording that cannot be read, is silent or too long, or whose transcript "
        "is missing, empty or has unknown characters: skip and count it, or stop the run",
    )
    train_subsets: tuple[str, ...] = Field(
        default=(),
        description="librispeech, common_voice: parts whose speakers are the users; "
        "empty: all that are named train",
    )
    held_out_subsets: tuple[str, ...] = Field(
        default=(),
        description="librispeech, common_voice: parts to measure on; empty: test-clean or test, "
        "with data.evaluation: development dev-clean or dev",
    )
    public_subsets: tuple[str, ...] = Field(
        default=(),
        description="librispeech, common_voice: parts to pre-train the seed model on, whose "
        "speakers are taken out of the population; empty: none",
    )
    held_out_speakers: tuple[str, ...] = Field(
        default=(),
        description="fsdd: speakers to measure on, who are then nobody in the population; "
        "empty: held-out recordings of the same speakers",
    )
    public_speakers: int = Field(
        default=48,
        ge=0,
        description="synthetic_speech: speakers of one accent to pre-train the seed model on",
    )
    cache: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None,
        description="synthetic_speech: folder of generated recordings; null: fedpriv in the "
        "user's cache folder (XDG_CACHE_HOME)",
    )


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
    """What is made up; for synthetic_images only."""

    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="seed of the data set, of which every user is a function; runs with other "
        "seeds of their own have the same users",
    )
    side: int = Field(default=28, ge=4, le=512, description="height and width of an image (pixels)")
    sizes: SizesConfig = Field(default=SizesConfig(), description="how many examples a user has")


class DataConfig(Section):
    """Which federated data set a run trains and is evaluated on."""

    name: str = Field(default="digits", description="name of the data set in the registry")
    users: int | None = Field(
        default=None,
        gt=0,
        description="population: number of users; natural users may be fewer, then some places "
        "are empty, and where they are more so many are drawn; null, for natural users only: the "
        "data set's own number",
    )
    examples_per_user: int | None = Field(
        default=None,
        gt=0,
        description="largest number of examples that one user keeps, drawn at random; null: all",
    )
    partition: PartitionConfig = Field(
        default=PartitionConfig(), description="how the training examples are dealt to users"
    )
    path: Annotated[KeptPath | None, NO_BEARING] = Field(
        default=None,
        description="folder of the data set's files; null for data that the package carries",
    )
    speech: SpeechConfig = Field(
        default=SpeechConfig(), description="what is read of recordings, for speech data sets"
    )
    synthetic: SyntheticConfig = Field(
        default=SyntheticConfig(), description="what is made up, for synthetic_images"
    )
    evaluation: Evaluation = Field(
        default="test",
        description="test: evaluate on the data set's test examples; development: evaluate on a "
        "fixed eighth of the training side instead, which then belongs to no user (for tuning)",
    )
