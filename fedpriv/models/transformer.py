"""The transformer block that every model shares, and the stack of them.

Plain `nn.Linear`, `nn.LayerNorm` and functional attention only: the same block then runs under
`torch.func.functional_call` and `vmap`, Opacus' gradient-sample hooks, bfloat16, `torch.compile`
and on the meta device. Every parameter lives in a leaf module that is called once a forward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedpriv.errors import InputError
from fedpriv.models.options import ModelOptions
from fedpriv.models.packing import Packing, hiding
from fedpriv.models.products import products_are_routed
from fedpriv.models.stochastic import Dropout, LayerDrop

NormName = Literal["layernorm", "rmsnorm"]
BlockPlacement = Literal["pre", "post", "peri"]
NormPlacement = Literal["pre", "post", "peri", "mix"]

NORMS: dict[str, Callable[[int], nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class TransformerOptions(ModelOptions):
    """The shape that all our transformers have."""

    initialise: Literal["own", "fedpriv"] = Field(
        default="fedpriv",
        description="how parameters begin: fedpriv, normal with standard deviation "
        "1/√inputs; own, as torch's layers begin",
    )
    dim: int = Field(
        default=64, gt=0, le=65536, description="width of a token's vector (numbers); 1 to 65536"
    )
    depth: int = Field(
        default=4, gt=0, le=1024, description="number of transformer blocks; 1 to 1024"
    )
    heads: int = Field(
        default=4, gt=0, le=1024, description="attention heads in a block; 1 or more, divides dim"
    )
    mlp_ratio: float = Field(
        default=4.0,
        gt=0,
        le=64,
        description="hidden width of a block's MLP as a multiple of dim; above 0, at most 64",
    )
    norm: NormName = Field(
        default="layernorm",
        description="layernorm: centre and scale each token; rmsnorm: scale only",
    )
    norm_placement: NormPlacement = Field(
        default="pre",
        description="where a block normalises: pre, before its function; post, after the residual "
        "sum; peri, before and after its function; mix, post in the first quarter of the blocks "
        "and pre in the others (all pre below 4 blocks)",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that a number is dropped in training; 0 to below 1",
    )
    layer_drop: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that an example skips a block in training; 0 to below 1",
    )


def require_heads(options: TransformerOptions) -> None:
    """Refuse a number of heads that does not divide the width.

    Raises:
        InputError: it does not.
    """
    if options.dim % options.heads:
        raise InputError(
            f"model.heads must divide model.dim, got {options.heads} heads for dim {options.dim}"
        )


class Attention(nn.Module):
    """Multi-head self-attention: o(concat_h softmax(q_h k_hᵀ / √(dim/heads)) v_h)."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, *, causal: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.mixed = DotProductAttention(heads, dropout, causal=causal)
        self.o = nn.Linear(dim, dim)

    def forward(self, x: Tensor, valid: Tensor | Packing | None = None) -> Tensor:
        """Map tokens `[B, T, dim]` to `[B, T, dim]`.

        `valid`, boolean `[B, T]`, is true at real tokens: no token attends to the others, so that
        they change nothing at the real ones. Every row needs at least one real token. A `Packing`
        says that tokens are packed, `[users, n, dim]`.
        """
        return self.o(self.mixed(self.q(x), self.k(x), self.v(x), valid))


class DotProductAttention(nn.Module):
    """Values mixed by softmax(q_h k_hᵀ / √d) for each head h of size d; it has no parameters.

    Where it is `causal`, no token attends to one after it; sequences are then without padding.
    """

    def __init__(self, heads: int, dropout: float = 0.0, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.drop = Dropout(dropout)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | Packing | None = None
    ) -> Tensor:
        """Map queries, keys and values, `[B, T, dim]`, to the same; `valid` as in `Attention`."""
        if isinstance(valid, Packing):
            return self._attend_packed(q, k, v, valid)
        # The library's own dropout takes no stream of random numbers, and its attention on the CPU
        # is ten times slower where products are routed.
        if self.drop.active or (q.device.type == "cpu" and products_are_routed()):
            return self._attend(q, k, v, valid)
        mask = None if valid is None else valid[:, None, None, :]
        q, k, v = self._split(q), self._split(k), self._split(v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return mixed.transpose(1, 2).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Return attention written out, `[B, T, dim]`, with dropout from this layer's own stream.

        Heads lie in the batch, contiguous, which products of small matrices are fastest on.
        """
        batch, tokens, dim = q.shape
        q, v = (self._split(one).flatten(0, 1) for one in (q * (dim // self.heads) ** -0.5, v))
        turned = self._split(k).transpose(2, 3).flatten(0, 1)
        hidden = None if valid is None else hiding(valid, self.heads, q.dtype)
        if self.causal:
            hidden = q.new_full((tokens, tokens), float("-inf")).triu(1)
        mixed = self._mixed(q, turned, v, hidden)
        return mixed.view(batch, self.heads, tokens, -1).transpose(1, 2).flatten(2)

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """Return attention written out, `[users, n, dim]`, for one group after another."""
        heads = packing.heads(self.heads)
        groups = zip(
            heads.apart(q * (q.shape[-1] // self.heads) ** -0.5),
            heads.apart(k),
            heads.apart(v),
            heads.hidden,
            strict=True,
        )
        return heads.together(
            [self._mixed(q, k.transpose(1, 2), v, hidden) for q, k, v, hidden in groups]
        )

    def _mixed(self, q: Tensor, turned: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        """Return softmax(q·turned + hidden)·v: `[n·heads, T, dim/heads]` of n utterances."""
        scores = torch.bmm(q, turned)
        if hidden is not None:
            scores = scores.add_(hidden)
        weights = scores.softmax(dim=-1).view(-1, self.heads, *scores.shape[1:])
        # On a GPU autocast leaves softmax in float32, and a product would round its factors itself.
        return cast(Tensor, _Mixed.apply(self.drop(weights).flatten(0, 1).to(v.dtype), v))

    def _split(self, x: Tensor) -> Tensor:
        """Reshape `[B, T, dim]` to one slice a head: `[B, heads, T, dim/heads]`."""
        batch, tokens, dim = x.shape
        return x.reshape(batch, tokens, self.heads, dim // self.heads).transpose(1, 2)


class _Mixed(torch.autograd.Function):
    """weights · values, `[n, T, T]` and `[n, T, d]`.

    Autograd would take the gradient of the values as weightsᵀ·g, and libraries are slow to read so
    large a matrix across its rows: as (gᵀ·weights)ᵀ it takes half the time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, values: Tensor) -> Tensor:
        return torch.bmm(weights, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        weights, values = ctx.saved_tensors
        of_values = torch.bmm(gradient.transpose(1, 2), weights).transpose(1, 2)
        return torch.bmm(gradient, values.transpose(1, 2)), of_values


class Mlp(nn.Module):
    """Two linear maps around a GELU: down(gelu(up(x))), applied to each token by itself."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.activation = nn.GELU()
        self.drop = Dropout(dropout)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `[B, T, dim]` to `[B, T, dim]`."""
        return self.down(self.drop(self.activation(self.up(x))))


class Residual(nn.Module):
    """A residual branch around a function f, with the norm at the chosen place.

    - `pre`:  x + f(norm(x))                   (Xiong et al. 2020)
    - `post`: norm(x + f(x))                   (Vaswani et al. 2017)
    - `peri`: x + norm_out(f(norm(x)))         (Peri-LN, Kim et al. 2025)

    Dropout, if any, is on the branch, just before it is added.
    """

    def __init__(self, dim: int, placement: BlockPlacement, norm: NormName, dropout: float) -> None:
        super().__init__()
        self.placement = placement
        self.norm = NORMS[norm](dim)
        self.norm_out = NORMS[norm](dim) if placement == "peri" else nn.Identity()
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the formula above for tokens `[B, T, dim]`; f keeps their shape."""
        if self.placement == "post":
            return self.norm(x + self.drop(f(x)))
        return x + self.drop(self.norm_out(f(self.norm(x))))


class Block(nn.Module):
    """One transformer block: attention, then MLP, each inside a `Residual`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        placement: BlockPlacement = "pre",
        norm: NormName = "layernorm",
        dropout: float = 0.0,
        *,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout, causal=causal)
        self.attention_residual = Residual(dim, placement, norm, dropout)
        self.mlp = Mlp(dim, max(1, round(dim * mlp_ratio)), dropout)
        self.mlp_residual = Residual(dim, placement, norm, dropout)

    def forward(self, x: Tensor, valid: Tensor | Packing | None = None) -> Tensor:
        """Map tokens `[B, T, dim]` to `[B, T, dim]`; for `valid` see `Attention`."""
        x = self.attention_residual(x, partial(self.attention, valid=valid))
        return self.mlp_residual(x, self.mlp)


class Transformer(nn.Module):
    """A stack of `depth` blocks, and a final norm where the last block leaves none.

    After `pre` and `peri` blocks the output is a bare sum of all branches, whose scale grows with
    depth, so a norm follows; a `post` block has just normalised the sum itself, so none does.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        norm_placement: NormPlacement = "pre",
        norm: NormName = "layernorm",
        dropout: float = 0.0,
        layer_drop: float = 0.0,
        *,
        causal: bool = False,
    ) -> None:
        super().__init__()
        placements = block_placements(norm_placement, depth)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, placement, norm, dropout, causal=causal)
            for placement in placements
        )
        self.norm = nn.Identity() if placements[-1] == "post" else NORMS[norm](dim)
        self.layer_drop = LayerDrop(layer_drop)

    def forward(self, x: Tensor, valid: Tensor | Packing | None = None) -> Tensor:
        """Map tokens `[B, T, dim]` to `[B, T, dim]`; for `valid` see `Attention`."""
        for block in self.blocks:
            x = self.layer_drop(x, block(x, valid))
        return self.norm(x)


def block_placements(norm_placement: NormPlacement, depth: int) -> list[BlockPlacement]:
    """Return where each of `depth` blocks has its norms, first block first.

    `mix` (Mix-LN, Li et al. 2024, with its α = 1/4) makes the first ⌊depth/4⌋ blocks `post` and
    the others `pre`; below 4 blocks it is `pre`.

    >>> block_placements("mix", 5)
    ['post', 'pre', 'pre', 'pre', 'pre']
    """
    if norm_placement != "mix":
        return [norm_placement] * depth
    return ["post" if index < depth // 4 else "pre" for index in range(depth)]
