"""Images of any format and size, as a model reads them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from fedpriv.data.files import failure
from fedpriv.data.records import scaled
from fedpriv.errors import EnvironmentFault, InputError
from fedpriv.sections import Section

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
"""Files that are taken for images; others are passed over."""

_CHANNELS = {"grey": 1, "rgb": 3}
# With more bits a pixel than are kept, which Pillow would cut off.
_TOO_DEEP = ("I", "F")


def _side_or_sides(value: Any) -> Any:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if all(type(each) is int for each in sides):
        return value
    raise ValueError("write a number of pixels, or [height, width]")


class ImageForm(Section):
    """What images become, whatever size and colours their files have."""

    size: Annotated[int | tuple[int, int], BeforeValidator(_side_or_sides)] = Field(
        default=32, description="side of the square, or [height, width], that all are resized to"
    )
    color: Literal["rgb", "grey"] = Field(default="rgb", description="rgb: 3 channels; grey: 1")
    mean: float | tuple[float, ...] = Field(
        default=0.5,
        description="subtracted from pixels in [0, 1]: a public number, or one for each channel",
    )
    std: float | tuple[float, ...] = Field(
        default=0.5, description="what that is divided by: a public number, or one for each channel"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) not in (1, _CHANNELS[self.color]):
                raise ValueError(
                    f"{name} has {len(value)} numbers, and {self.color} has "
                    f"{_CHANNELS[self.color]} channels"
                )
        if min(self.std if isinstance(self.std, tuple) else (self.std,)) <= 0:
            raise ValueError("std must be above 0")
        if not all(1 <= side <= 4096 for side in self._sides):
            raise ValueError(f"size must be 1 to 4096 pixels, got {self.size}")
        return self

    @property
    def _sides(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return (_CHANNELS[self.color], *self._sides)

    def of(self, image: Any) -> Tensor:
        """Return a Pillow image as float32 `[channels, height, width]`.

        Raises:
            InputError: it has more than 8 bits a channel.
        """
        from PIL import Image, ImageOps

        if image.mode.split(";")[0] in _TOO_DEEP:
            raise InputError(f"has {image.mode} pixels; save it with 8 bits a channel")
        height, width = self._sides
        upright = ImageOps.exif_transpose(image)
        whole = upright.convert("RGB" if self.color == "rgb" else "L")
        pixels = np.array(whole.resize((width, height), Image.Resampling.BILINEAR))
        channels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
        return scaled(torch.from_numpy(channels.astype(np.float32) / 255), self.mean, self.std)

    def read(self, path: Path) -> Tensor:
        """Read an image file: see `of`.

        Raises:
            InputError: there is none, or it cannot be decoded.
            EnvironmentFault: the machine does not let it be read.
        """
        from PIL import Image

        try:
            file = path.open("rb")
        except OSError as error:
            raise failure(path, error) from None
        with file:
            return decoded(path, lambda: self.of(Image.open(file)))


def decoded(where: object, decode: Callable[[], Tensor]) -> Tensor:
    """Return what `decode` makes of one record's bytes.

    Raises:
        InputError: they are damaged, in whatever way that shows.
        EnvironmentFault: the machine does not let them be read.
    """
    try:
        return decode()
    except (MemoryError, EnvironmentFault):
        raise
    except OSError as error:
        if error.errno is not None:  # Pillow's own have none
            raise failure(Path(error.filename or str(where)), error) from None
        raise InputError(f"{where}: cannot be decoded ({_said(error)})") from None
    except Exception as error:  # whatever a decoder raises on bytes that are none of its format
        raise InputError(f"{where}: cannot be decoded ({_said(error)})") from None


def _said(error: Exception) -> str:
    # Pillow shows the open file as Python does, which says the path again.
    said = re.sub(r" <_io\..*>", "", " ".join(str(error).split()))
    return said[:200] or type(error).__name__
