"""APOLLO (Zhu et al. 2024): Adam's moments of a projection decide how much of each channel moves.

pytorch_optimizer's class of this name moves a matrix by the projected gradient, projected back, as
GaLore does: an update of rank r. The paper projects for the moments alone, and scales the gradient
itself. So matrices are ours here, and all other parameters take the library's AdamW steps.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pytorch_optimizer import APOLLO
from torch import Tensor

#: γ: a step's norm is at most so many times that of the step before (Chen et al. 2024, Fira).
GROWTH = 1.01
# Keeps a division by a norm finite.
_TINY = 1e-8


class Apollo(APOLLO):
    """Algorithm 1 of "APOLLO: SGD-like Memory, AdamW-level Performance", for each matrix W.

    With G the gradient `[m, n]`, m < n (else all is transposed), in each step:

        every T steps P ~ N(0, 1/r) anew, [r, m];   R = PG
        M = β₁M + (1-β₁)R,   V = β₂V + (1-β₂)R²,   R̃ = M/(√V + ε)
        s_j = ‖R̃_j‖/‖R_j‖ for each column j, or s = ‖R̃‖/‖R‖ for all of them
        G̃ = αG·diag(s), shortened to γ = 1.01 times the norm of the step before where it is longer
        W ← W - η√(1-β₂ᵗ)/(1-β₁ᵗ)·G̃ - ηλW

    M and V are `[r, n]`, and of P its seed alone is kept, which is drawn from torch's generator: in
    a run from the round's own seed. So a matrix keeps 2rn numbers. After a step of norm 0 no growth
    is defined, and nothing is shortened. Parameters that are no matrices take steps of AdamW.

    APOLLO-Mini is `rank=1, scale_type="tensor", scale=128`.

    Args:
        params: parameters, or groups of them.
        lr: η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ, decoupled.
        rank: r, at most m.
        update_proj_gap: T.
        scale: α², as in the authors' code.
        scale_type: channel, or tensor: one s for all columns.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int = 16,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: Literal["channel", "tensor"] = "channel",
    ) -> None:
        of_ours: dict[str, Any] = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
        for name, value in of_ours.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.validate_non_negative(weight_decay, "weight_decay")
        super().__init__(params, lr, betas, scale_type, 0.0, eps=eps, **of_ours)
        # The library's decay follows the bias correction, the paper's does not: it is taken here.
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move each parameter that has a gradient."""
        assert closure is None, "the server has no loss"
        moved = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        matrices = [(group, p, p.grad) for group, p in moved if p.dim() == 2]
        for group, p in moved:
            p.mul_(1 - group["lr"] * self._weight_decay)
        for _, p, _ in matrices:
            p.grad = None
        super().step()
        for group, p, gradient in matrices:
            p.grad = gradient
            p.sub_(self._scaled(group, self.state[p], gradient))

    def _scaled(self, group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> Tensor:
        """Return what is taken from a matrix."""
        wide = gradient.shape[0] < gradient.shape[1]
        channels = gradient if wide else gradient.T
        projected = self._projection(group, state, channels) @ channels
        direction = _moved_average(group, state, projected)

        dim = 0 if group["scale_type"] == "channel" else (0, 1)
        scale = direction.norm(dim=dim) / (projected.norm(dim=dim) + _TINY)
        step = channels * scale * math.sqrt(group["scale"])

        norm = step.norm()
        if (before := state.get("norm")) is not None and before > 0:
            allowed = (GROWTH * before / (norm + _TINY)).clamp(max=1.0)
            step, norm = step * allowed, norm * allowed
        state["norm"] = norm

        beta1, beta2 = group["betas"]
        count = group["step"]
        step *= group["lr"] * math.sqrt(1 - beta2**count) / (1 - beta1**count)
        return step if wide else step.T

    def _projection(self, group: dict[str, Any], state: dict[str, Any], channels: Tensor) -> Tensor:
        """Return P `[r, m]`, made again from its seed."""
        if (group["step"] - 1) % group["update_proj_gap"] == 0:
            state["seed"] = int(torch.randint(2**62, ()))
        rank = min(group["rank"], len(channels))
        generator = torch.Generator().manual_seed(state["seed"])
        return torch.randn(rank, len(channels), generator=generator).to(channels) / math.sqrt(rank)


def _moved_average(group: dict[str, Any], state: dict[str, Any], projected: Tensor) -> Tensor:
    """Return M/(√V + ε) after a step of Adam's moments."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(projected)
        state["exp_avg_sq"] = torch.zeros_like(projected)
    beta1, beta2 = group["betas"]
    state["exp_avg"].lerp_(projected, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
