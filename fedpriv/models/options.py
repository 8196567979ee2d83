"""What configs say of any model."""

from typing import Literal

from pydantic import Field

from fedpriv.components import Options


class ModelOptions(Options):
    """Which model is trained, and its shape; each model adds its own."""

    name: str = Field(description="name of the model, or package.module:object for your own")
    initialise: Literal["own", "fedpriv"] = Field(
        default="own",
        description="own: it begins with the numbers that its builder gave it, drawn from the "
        "run's seed; fedpriv: linear maps, norms and positions begin as those of our own models",
    )
