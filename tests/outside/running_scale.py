"""A normaliser with state, from outside: each block over the running mean of its own size."""

import torch


class RunningScale:
    """g_h / √(v_h / (1 - βᵗ)), with v_h ← βv_h + (1-β)·mean(g_h²): what is kept is v and t."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self.rounds, self.squares = decay, 0, {}

    def __call__(self, update: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the blocks of one round, scaled."""
        self.rounds += 1
        correction = 1 - self.decay**self.rounds
        scaled = {}
        for name, block in update.items():
            before, now = self.squares.get(name, 0.0), block.square().mean()
            self.squares[name] = self.decay * before + (1 - self.decay) * now
            scaled[name] = block / (self.squares[name] / correction).sqrt().clamp(min=1e-12)
        return scaled
