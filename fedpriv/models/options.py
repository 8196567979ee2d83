"""What configs say of any model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedpriv.components import Options
from fedpriv.sections import Positive, Section

#: Ways that LoRA begins, or scales, by the names that `peft` has for them.
LoraVariant = Literal["lora", "rslora", "dora", "pissa", "eva"]


def _whole_or_patterns(value: Any) -> Any:
    patterns = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    if value in ("all", "head", "lora") or (patterns and value):
        return value
    raise ValueError("write all, head, lora, or patterns of parameters' names: ['head.*']")


class LoraOptions(Section):
    """What is put beside frozen linear maps: a product of two thin matrices each (LoRA)."""

    r: Annotated[int, Field(ge=1)] = Field(default=8, description="rank of each product")
    alpha: Positive | None = Field(
        default=None,
        description="the product counts alpha / r times, or alpha / √r with rslora; null: 2 r",
    )
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description="which maps, by the ends of their names; null: all linear ones but the head",
    )
    variant: LoraVariant = Field(
        default="lora",
        description="lora; rslora, another scale; dora, with lengths of columns of their own; "
        "pissa, which begins with the largest singular values of the weights; eva, with the main "
        "directions of what the maps read of public, held-out examples",
    )
    head: bool = Field(
        default=True, description="whether the head is trained too, as one that is new must be"
    )


class ModelOptions(Options):
    """Which model is trained, its shape, and what of it; each model adds its own shape."""

    name: str = Field(description="name of the model, or package.module:object for your own")
    initialise: Literal["own", "fedpriv"] = Field(
        default="own",
        description="own: it begins with the numbers that its builder gave it, drawn from the "
        "run's seed; fedpriv: linear maps, norms and positions begin as those of our own models",
    )
    train: Annotated[
        Literal["all", "head", "lora"] | tuple[str, ...], BeforeValidator(_whole_or_patterns)
    ] = Field(
        default="all",
        description="what is trained, bounded, noised and sent: all; head, the last layer; lora, "
        "adapters by peft; or the parameters whose names match one of some patterns, such as "
        "['blocks.3.*', 'head.*']. All else stays as it is",
    )
    lora: LoraOptions | None = Field(
        default=None, description="the adapters of train: lora; null: the defaults"
    )
    convert: Literal["groupnorm"] | None = Field(
        default=None,
        description="groupnorm puts group normalisation in the place of batch normalisation, "
        "which would carry one user's data to the next; null leaves the model as it is",
    )
    frozen_sha256: str | None = Field(
        default=None,
        description="Digest of what is not trained: with another one nothing is trained. A run "
        "fills it in.",
    )
    start_sha256: str | None = Field(
        default=None,
        description="Digest of all numbers that a model begins with where they do not follow from "
        "the rest of the config: one from outside may have read them from anywhere, and eva reads "
        "examples. A run with others is another run. A run fills it in.",
    )

    @model_validator(mode="after")
    def _adapters_are_wanted(self) -> ModelOptions:
        if self.lora is not None and self.train != "lora":
            raise ValueError("lora has options of train: lora; write that too, or remove them")
        return self

    @property
    def reads_data(self) -> bool:
        """Whether what it begins with is read off examples, which must then be public."""
        return self.lora is not None and self.lora.variant == "eva"

    def shape(self) -> dict[str, Any]:
        """Return the options that are the model's own."""
        return self.model_dump(exclude=set(ModelOptions.model_fields))

    def whole(self) -> ModelOptions:
        """Return the options of the same model, of which all is trained."""
        parts = {"train": "all", "lora": None, "frozen_sha256": None, "start_sha256": None}
        return self.model_copy(update=parts)
