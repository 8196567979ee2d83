"""A causal transformer: each token of a sequence from those before it (Radford et al. 2019)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from fedpriv.errors import InputError
from fedpriv.models.transformer import (
    NormName,
    NormPlacement,
    Transformer,
    TransformerOptions,
    require_heads,
)
from fedpriv.models.vit import LearnedPositions


class GPTOptions(TransformerOptions):
    """The shape of a causal transformer."""

    name: str = Field(default="gpt", description="gpt: a causal transformer over tokens")


class GPT(nn.Module):
    """Tokens to logits of the next one: embedding, positions, causal transformer, linear head."""

    def __init__(
        self,
        context: int,
        vocabulary: int,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        norm: NormName = "layernorm",
        norm_placement: NormPlacement = "pre",
        dropout: float = 0.0,
        layer_drop: float = 0.0,
    ) -> None:
        """`context` is the length of a sequence; `heads` divides dim."""
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = LearnedPositions(context, dim)
        self.transformer = Transformer(
            dim, depth, heads, mlp_ratio, norm_placement, norm, dropout, layer_drop, causal=True
        )
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens, int64 `[B, T]`, to logits `[B, T, vocabulary]`."""
        return self.head(self.transformer(self.positions(self.embed(tokens))))


def build_gpt(options: GPTOptions, input_shape: tuple[int, ...], classes: int) -> GPT:
    """Return the transformer of these options for sequences of `input_shape`, (tokens,).

    Raises:
        InputError: the data are no sequences, or the options do not fit one another.
    """
    if len(input_shape) != 1:
        raise InputError(f"model.name: gpt reads tokens (T,), the data are {input_shape}")
    require_heads(options)
    shape = options.shape()
    return GPT(input_shape[0], classes, **shape)
