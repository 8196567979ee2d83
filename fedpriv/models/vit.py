"""The vision transformer (Dosovitskiy et al. 2021), for images small enough to simulate users."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedpriv.errors import InputError
from fedpriv.models.transformer import (
    NormName,
    NormPlacement,
    Transformer,
    TransformerOptions,
    require_heads,
)

Pooling = Literal["mean", "class"]


class ViTOptions(TransformerOptions):
    """The shape of a vision transformer."""

    name: str = Field(default="vit", description="vit: a vision transformer")
    patch: int = Field(
        default=2,
        gt=0,
        description="side of an image patch (pixels); 1 or more, divides the image's height and "
        "width",
    )
    pooling: Pooling = Field(
        default="mean",
        description="what the head reads: mean, the average of the final tokens; class, a token "
        "of its own",
    )


def build_vit(options: ViTOptions, input_shape: tuple[int, ...], classes: int) -> "ViT":
    """Return the transformer of these options for images of `input_shape`.

    Raises:
        InputError: the data are no images, or the options do not fit them or one another.
    """
    if len(input_shape) != 3:
        raise InputError(
            f"model.name: vit reads images (channels, height, width), the data are {input_shape}"
        )
    channels, height, width = input_shape
    if height % options.patch or width % options.patch:
        raise InputError(
            f"model.patch must divide the image's sides, got {options.patch} for {height}x{width}"
        )
    require_heads(options)
    shape = options.shape()
    return ViT((channels, height, width), classes, **shape)


class LearnedPositions(nn.Module):
    """x + weight: one learned vector a place, `[tokens, dim]`.

    A module of its own, since per-example and per-user engines find parameters by leaf module.
    """

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Add the place's vector to each of the tokens `[B, tokens, dim]`."""
        return x + self.weight


class ViT(nn.Module):
    """Images to logits: patches, linear embedding, positions, transformer, pooling, linear head.

    `pooling="mean"` averages the final tokens. `pooling="class"` puts one more token in front and
    reads the answer there; that token is zero before the positions are added, for its learned
    vector and its position's would only ever occur as their sum.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        patch: int = 2,
        mlp_ratio: float = 4.0,
        norm: NormName = "layernorm",
        norm_placement: NormPlacement = "pre",
        pooling: Pooling = "mean",
        dropout: float = 0.0,
        layer_drop: float = 0.0,
    ) -> None:
        """`input_shape` is (channels, height, width); `patch` divides both sides, `heads` dim."""
        super().__init__()
        channels, height, width = input_shape
        self.patch = patch
        self.pooling = pooling
        tokens = (height // patch) * (width // patch) + (pooling == "class")
        self.embed = nn.Linear(channels * patch * patch, dim)
        self.positions = LearnedPositions(tokens, dim)
        self.transformer = Transformer(
            dim, depth, heads, mlp_ratio, norm_placement, norm, dropout, layer_drop
        )
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, channels, height, width]` to logits `[B, classes]`."""
        x = self.embed(patches(images, self.patch))
        if self.pooling == "class":
            x = F.pad(x, (0, 0, 1, 0))
        x = self.transformer(self.positions(x))
        return self.head(x[:, 0] if self.pooling == "class" else x.mean(1))


def patches(images: Tensor, side: int) -> Tensor:
    """Cut images `[B, C, H, W]` into squares: `[B, (H/side)(W/side), C·side·side]`.

    Squares come row by row; in a square channel comes first, then row, then column, which is the
    order of a strided convolution's kernel.
    """
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
