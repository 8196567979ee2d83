"""A server optimizer from outside: steps of one size, by the sign of the averaged update."""

import torch


class Signed(torch.optim.Optimizer):
    """θ ← θ - lr · sign(m), with m ← βm + (1-β)g."""

    def __init__(self, params: list[torch.Tensor], lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["beta"])
                parameter.sub_(group["lr"] * mean.sign())
