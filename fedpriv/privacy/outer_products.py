"""Ghost clipping: gradients of linear maps that are bounded and added up without being written out.

The gradient of a linear map's weight for one example is a sum over its tokens of outer products,
G_i = Σ_t l_t r_tᵀ, of the loss's gradient at the outputs l and the inputs r. Its norm needs tokens'
inner products alone, ‖G_i‖² = Σ_st ⟨l_s, l_t⟩⟨r_s, r_t⟩ (Goodfellow 2015; Li et al. 2022, section
4), and a weighted sum of all G_i is one matrix product (book-keeping: Bu et al. 2023).

Where tokens cancel, that norm is a small difference of large numbers: taken in float32, as usual,
it can come out as zero for a large gradient, which is then not clipped at all. Here all is float64,
and what rounding may hide is bounded by S_i = Σ_t ‖l_t‖‖r_t‖, which has no cancellation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_UNIT = 2.0**-53
# The rounding of a weighted sum, all its examples together, as a part of the clip bound.
_ROUNDING = 2.0**-22

# Numbers whose float64 copy is worked on at once, so that it stays in the processor's cache, and
# the most rows of a product, on which its rounding depends.
_CACHED_NUMBERS = 2**19
_ROWS = 2**10


@dataclass(frozen=True)
class OuterProducts:
    """The gradients of n examples, Σ_t left[i, t]·right[i, t]ᵀ, as their factors.

    Products of two float32 numbers are exact in float64 and neither overflow nor vanish there,
    also when they are multiplied once more. The bounds below rest on that.

    Attributes:
        left: `[n, T, p]`, at most float32.
        right: `[n, T, d]`, at most float32.

    Raises:
        TypeError: the factors are float64.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if torch.float64 in (self.left.dtype, self.right.dtype):
            raise TypeError("norms of outer products are bounded for factors of at most float32")

    @property
    def size(self) -> int:
        """How many numbers each gradient has."""
        return self.left.shape[2] * self.right.shape[2]

    def norm_bounds(self) -> Tensor:
        """Return for each example what its norm is not above: float64 `[n]`, not finite for NaN.

        √(ghost² + (γ + κ²)·S²), where ghost² is the sum of inner products as it was computed.

        γ·S² bounds its error: products are exact, so each inner product of K numbers is within
        (K - 1)·u·‖·‖‖·‖ of the true one, and adding up T² of their products is within (T² + 1)·u
        of the sum of their sizes (Higham 2002, section 3.1, in any order); twice that covers the
        second order and the rounding of S. κ·S is what `add_weighted` needs.
        """
        slack = self._error() + self._floor() ** 2
        return torch.cat([_norm_bounds(left, right, slack) for _, left, right in self._pieces()])

    def add_weighted(self, weights: Tensor, total: Tensor) -> None:
        """Add Σ_i w_i·G_i to `total` `[p·d]` in place, all in float64, `weights` being `[n]`.

        Examples of weight zero are left out, whatever they hold.

        Where every w_i times its norm bound is at most C, the sum is within 2^-22·C of the exact
        one: a product over m tokens rounds by at most (m + 1)·u·Σ_i w_i·S_i, and S_i is at most
        the norm bound over κ = 2^22·u·n·(m + 2). What was in `total` before rounds as in any sum.
        """
        matrix = total.view(self.left.shape[2], self.right.shape[2])
        for index, left, right in self._pieces():
            kept = weights[index] != 0  # zero times NaN is NaN
            weighted = left[kept] * weights[index][kept, None, None]
            matrix.addmm_(weighted.flatten(0, 1).T, right[kept].flatten(0, 1))

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the indices of some examples at a time, with their factors in float64."""
        for index in torch.arange(len(self.left), device=self.left.device).split(self._at_once()):
            yield index, self.left[index].double(), self.right[index].double()

    def _at_once(self) -> int:
        _, tokens, outputs = self.left.shape
        rows = min(_ROWS, _CACHED_NUMBERS // (outputs + self.right.shape[2]))
        return max(1, rows // max(1, tokens))

    def _error(self) -> float:
        """Return γ."""
        _, tokens, outputs = self.left.shape
        return 2 * _UNIT * (outputs + self.right.shape[2] + tokens**2)

    def _floor(self) -> float:
        """Return κ."""
        n, tokens, _ = self.left.shape
        return _UNIT / _ROUNDING * n * (min(n, self._at_once()) * tokens + 2)


def _norm_bounds(left: Tensor, right: Tensor, slack: float) -> Tensor:
    """Return √(ghost² + slack·S²), `[n]`, from float64 `[n, T, p]` and `[n, T, d]`."""
    gram_left, gram_right = left @ left.mT, right @ right.mT
    squares = (gram_left * gram_right).sum((1, 2)).clamp(min=0)
    sizes = [gram.diagonal(dim1=1, dim2=2).sqrt() for gram in (gram_left, gram_right)]
    size = (sizes[0] * sizes[1]).sum(1)
    return (squares + slack * size**2).sqrt()
