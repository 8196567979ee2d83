"""Utterances of many users without the padding between them.

Utterances differ in length, and a batch pads all of them to the longest: work that is thrown away.
What treats each token by itself takes a user's tokens end to end instead. Attention alone needs an
utterance's tokens together, and is given utterances of like length at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

# Matrix libraries compile a kernel for each shape they meet, so they should meet few.
_TOKENS_TO_A_MULTIPLE_OF = 8
_PACKED_TO_A_MULTIPLE_OF = 16
# Attention scores that are worked on at once, so that they stay in the processor's caches.
_CACHED_SCORES = 2**19


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """Return which of `size` places are real: boolean `[B, size]`."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def hiding(valid: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Return what hides padding when it is added to scores: `[B·heads, 1, T]`, 0 or -inf.

    `valid`, boolean `[B, T]`, is true at real tokens; scores have a head after the other of each.
    """
    added = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
    return added.masked_fill_(~valid, -torch.inf).repeat_interleave(heads, 0)[:, None]


class Ragged(nn.Module):
    """A model whose examples differ in length.

    An engine sets `users` where rows of so many lie end to end, equally many a user: padding is
    then left out. 0 says that nothing is known of the rows.
    """

    users: int = 0


@dataclass(frozen=True)
class _Move:
    """Rows go to new places.

    Attributes:
        there: int64 `[m]`, which row is put in each new place.
        back: int64 `[n]`, the new place of each row, the one that its gradient is taken from.
        lost: int64, rows whose gradient is zero: nothing depends on them.
    """

    there: Tensor
    back: Tensor
    lost: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the rows of `[n, d]` in their new places: `[m, d]`."""
        return cast(Tensor, _Moved.apply(x, self))


class _Moved(torch.autograd.Function):
    """Rows in new places, whose gradients go back the same way.

    A row may be in several places, as padding; its gradient is that of one, for nothing depends on
    padding. Autograd would add them all up, number by number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, move: _Move) -> Tensor:
        ctx.move = move
        return x.index_select(0, move.there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        move: _Move = ctx.move
        return gradients[0].index_select(0, move.back).index_fill_(0, move.lost, 0.0), None


@dataclass(frozen=True)
class Group:
    """Utterances whose attention is computed together.

    Attributes:
        utterances: int64 `[count]`, which they are: equally many of each user, user by user.
        tokens: of the longest.
        valid: `[count, tokens]`, true at real tokens.
    """

    utterances: Tensor
    tokens: int
    valid: Tensor


class Packing:
    """Where a batch's tokens lie when each user's are end to end: `[users, n, ...]`.

    n is that of the user with most tokens. The others' tokens are followed by copies of their own
    first token, which nothing depends on; no user's numbers are ever put among another's.
    """

    def __init__(self, lengths: Tensor, tokens: int, users: int) -> None:
        """Of `tokens`, `lengths` `[B]` are real, at least 1; B/users rows a user, in turn."""
        each = lengths.view(users, -1)
        self.users, self.utterances, self.tokens = users, len(lengths), tokens
        self.size = _rounded(int(each.sum(1).max()), _PACKED_TO_A_MULTIPLE_OF)
        self._lengths = lengths
        first = self.size * torch.arange(users, device=lengths.device)[:, None]
        self._starts = (first + each.cumsum(1) - each).flatten()
        real = valid_mask(lengths, tokens)
        packed = self._places(torch.arange(len(lengths), device=lengths.device), tokens)
        # Each user's first token, before its own tokens are put over it.
        origin = torch.arange(0, real.numel(), each.shape[1] * tokens, device=lengths.device)
        origin = origin.repeat_interleave(self.size)
        origin[packed[real]] = real.flatten().nonzero().flatten()
        filled = torch.ones(len(origin), dtype=torch.bool, device=lengths.device)
        filled[packed[real]] = False
        self._origin, self._filled = origin, filled.nonzero().flatten()
        self._unpacked = _Move(packed.flatten(), origin, self._filled)
        self._heads: dict[int, Heads] = {}

    def pack(self, rows: Tensor) -> Tensor:
        """Return `[B, tokens, ...]`, which take no gradient, as `[users, n, ...]`."""
        packed = rows.flatten(0, 1).index_select(0, self._origin)
        return packed.view(self.users, self.size, *rows.shape[2:])

    def unpack(self, packed: Tensor) -> Tensor:
        """Return `[users, n, d]` as `[B, tokens, d]`, in which padding may be anything."""
        return self._unpacked(packed.flatten(0, 1)).view(self.utterances, self.tokens, -1)

    def heads(self, heads: int) -> Heads:
        """Return where tokens go for attention with so many heads."""
        if heads not in self._heads:
            self._heads[heads] = self._made(heads)
        return self._heads[heads]

    def _places(self, utterances: Tensor, tokens: int) -> Tensor:
        """Return where utterances' first `tokens` lie: `[count, tokens]`; padding is the last."""
        places = torch.arange(tokens, device=utterances.device)
        within = torch.minimum(places, self._lengths[utterances][:, None] - 1)
        return self._starts[utterances][:, None] + within

    def _made(self, heads: int) -> Heads:
        groups = self._groups(heads)
        number = torch.arange(heads, device=self._lengths.device)[:, None]
        there, valid = [], []
        for group in groups:
            places = self._places(group.utterances, group.tokens)
            there.append((places[:, None] * heads + number).flatten())
            valid.append(group.valid[:, None].expand(-1, heads, -1).flatten())
        of_row, is_real = torch.cat(there), torch.cat(valid)
        real = is_real.nonzero().flatten()
        filled = (self._filled[:, None] * heads + number.T).flatten()
        place = torch.zeros(len(self._origin) * heads, dtype=torch.int64, device=of_row.device)
        place[of_row[real]] = real
        # What fills up a user is that user's own.
        place[filled] = place[filled // (self.size * heads) * (self.size * heads)]
        apart = _Move(of_row, place, filled)
        together = _Move(place, of_row, (~is_real).nonzero().flatten())
        return Heads(self.users, heads, groups, apart, together)

    def _groups(self, heads: int) -> list[Group]:
        """Put each user's shortest utterances together, then those next in length, and so on.

        As many ranks make a group as keep its scores in the caches.
        """
        each = self._lengths.view(self.users, -1)
        lengths, order = each.sort(dim=1)
        rows = order + each.shape[1] * torch.arange(self.users, device=order.device)[:, None]
        longest = [_rounded(one, _TOKENS_TO_A_MULTIPLE_OF) for one in lengths.amax(0).tolist()]
        groups, low = [], 0
        for high in range(1, len(longest) + 1):
            if high < len(longest):
                scores = (high + 1 - low) * self.users * heads * longest[high] ** 2
                if scores <= _CACHED_SCORES:
                    continue
            utterances, tokens = rows[:, low:high].flatten(), longest[high - 1]
            valid = valid_mask(self._lengths[utterances], tokens)
            groups.append(Group(utterances, tokens, valid))
            low = high
        return groups


class Heads:
    """Tokens of one attention layer: user by user, or group by group with each head by itself."""

    def __init__(
        self, users: int, heads: int, groups: Sequence[Group], apart: _Move, together: _Move
    ) -> None:
        self._users, self._heads, self._groups = users, heads, groups
        self._apart, self._together = apart, together
        self._sizes = [len(group.utterances) * heads * group.tokens for group in groups]
        #: For each group what hides its padding: `[count·heads, 1, tokens]`.
        self.hidden = [hiding(group.valid, heads, torch.float32) for group in groups]

    def apart(self, packed: Tensor) -> list[Tensor]:
        """Return `[users, n, dim]` as `[count·heads, tokens, dim/heads]` for each group."""
        rows = self._apart(packed.reshape(-1, packed.shape[-1] // self._heads))
        return [
            part.view(-1, group.tokens, part.shape[-1])
            for part, group in zip(rows.split(self._sizes), self._groups, strict=True)
        ]

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what `apart` makes such parts of: `[users, n, dim]`."""
        rows = self._together(torch.cat([part.flatten(0, 1) for part in parts]))
        return rows.view(self._users, -1, self._heads * rows.shape[1])


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
