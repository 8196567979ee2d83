"""DiceSGD for Opacus: a sibling of its `DPOptimizer`, for anybody's own training script.

    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(...)        # Opacus' DP-SGD
    optimizer = DiceSGD.in_engine(engine, optimizer, loader, memory_norm=0.01)
    ...
    engine.get_epsilon(delta)                                  # DiceSGD's own

It needs Opacus (`pip install 'fedpriv[opacus]'`), and nothing of fedpriv but its privacy package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.accountants import IAccountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor
from torch.optim import Optimizer

from fedpriv.privacy.clipping import (
    ClippingRule,
    GlobalClipping,
    PerLayerClipping,
    Unclipped,
    with_bounds,
)
from fedpriv.privacy.dice import BatchSums, DiceMechanism, dice_step, sum_batch
from fedpriv.privacy.dice_accounting import Accounting, DiceEpsilon, dice_epsilon
from fedpriv.privacy.sampling import PoissonSampling


class DiceSGD(DPOptimizer):
    """Clips, remembers what was clipped off, adds noise, and steps the wrapped optimizer.

    The step is `DiceMechanism`'s; any optimizer can be wrapped, for it sees v_t with its noise
    alone, and the memory sees v_t without it. Opacus' batch memory manager works as usual. The
    mechanism is fixed: a scheduler that changes its noise or its bound is refused.

    The state dict holds the memory, which is private: publish the model, never the state dict.

    Attributes:
        mechanism: what is released, with its bounds.
        memory: e_t, float64 `[P]`, parameter after parameter. Private.
        steps: the number of releases so far.
        non_finite: the number of gradients with a NaN or Inf so far; they count as zero. Private.

    Raises:
        ValueError: in `step`, where the noise or clip bound was changed, or several backward
            passes lie in one step without Opacus' batch memory manager.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        mechanism: DiceMechanism,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
    ) -> None:
        """`loss_reduction`, `generator` and `secure_mode` are those of Opacus."""
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.examples.bound,
            expected_batch_size=mechanism.batch,
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=secure_mode,
        )
        self.mechanism = mechanism
        self.sizes = [p.numel() for p in self.params]
        self.memory = torch.zeros(
            sum(self.sizes), dtype=torch.float64, device=self.params[0].device
        )
        self.steps = 0
        self.non_finite = 0
        self._sums: BatchSums | None = None

    @classmethod
    def in_engine(
        cls,
        engine: PrivacyEngine,
        optimizer: DPOptimizer,
        loader: DPDataLoader,
        *,
        memory_norm: float,
        gradient_norm: float | None = None,
        accounting: Accounting = "provable",
    ) -> DiceSGD:
        """Take the place of `optimizer`, one that `engine.make_private` made with `loader`.

        Noise multiplier, clip bound (flat or per layer) and wrapped optimizer stay. The engine's
        accountant is exchanged for DiceSGD's: its `get_epsilon` then says what DiceSGD costs.

        Args:
            engine: Opacus' engine, before the first step.
            optimizer: a `DPOptimizer` or `DPPerLayerOptimizer`.
            loader: the engine's loader, which draws Poisson batches.
            memory_norm: C2, shared among layers as the clip bounds are.
            gradient_norm: G, the bound on what a gradient adds to the memory; None for none.
            accounting: the accounting of `engine.get_epsilon`.

        Raises:
            ValueError: a loader without Poisson sampling, another kind of optimizer, or an engine
                that has made steps already.
        """
        if not isinstance(loader, DPDataLoader):
            raise ValueError("DiceSGD needs Poisson sampling: make_private(poisson_sampling=True)")
        if len(engine.accountant):
            raise ValueError("the engine has made steps already: take its optimizer's place first")
        examples = _clipping(optimizer)
        population = len(loader.dataset)
        mechanism = DiceMechanism(
            PoissonSampling(population, population * loader.sample_rate),
            optimizer.noise_multiplier,
            examples,
            _scaled(examples, memory_norm),
            Unclipped() if gradient_norm is None else _scaled(examples, gradient_norm),
        )
        dice = cls(
            optimizer.original_optimizer,
            mechanism=mechanism,
            loss_reduction=optimizer.loss_reduction,
            generator=optimizer.generator,
            secure_mode=optimizer.secure_mode,
        )
        engine.accountant = ACCOUNTANTS[accounting](mechanism)
        dice.attach_step_hook(engine.accountant.get_optimizer_hook_fn(loader.sample_rate))
        return dice

    def privacy_spent(
        self, delta: float, accounting: Accounting = "provable", accountant: str = "rdp"
    ) -> DiceEpsilon:
        """Return the ε of the steps so far, with the name of its accounting."""
        return dice_epsilon(self.mechanism, self.steps, delta, accounting, accountant)

    def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> None:
        """Attach the hook of a DiceSGD accountant.

        Raises:
            ValueError: another hook. Opacus' own accountants would charge DP-SGD.
        """
        if not isinstance(getattr(fn, "__self__", None), _DiceAccountant):
            raise ValueError(
                "Opacus' accountants would charge DiceSGD as DP-SGD: use DiceSGD.in_engine"
            )
        super().attach_step_hook(fn)

    def clip_and_accumulate(self) -> None:
        """Add the sums of a physical batch to those of the step."""
        if (self.noise_multiplier, self.max_grad_norm) != (
            self.mechanism.noise_multiplier,
            self.mechanism.examples.bound,
        ):
            raise ValueError("noise_multiplier and max_grad_norm of DiceSGD are fixed")
        if self.accumulated_iterations > 1:
            raise ValueError("call step and zero_grad after each backward, or BatchMemoryManager")
        for p in self.params:
            _check_processed_flag(p.grad_sample)
        sums = sum_batch(self._rows(), self.sizes, self.mechanism)
        self._sums = sums if self._sums is None else self._sums + sums
        for p in self.params:
            _mark_as_processed(p.grad_sample)

    def add_noise(self) -> None:
        """Put B·v_t with noise of standard deviation z·C1 into the gradients; move the memory."""
        assert self._sums is not None
        released, self.memory = dice_step(self.memory, self._sums, self.sizes, self.mechanism)
        self.non_finite += self._sums.non_finite
        self.steps += 1
        self._sums = None
        for p, block in zip(self.params, released.split(self.sizes), strict=True):
            p.summed_grad = (block * self.mechanism.batch).view_as(p).to(p.dtype)
        super().add_noise()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear gradients; the sums of a step whose batch has not ended stay."""
        if not self._is_last_step_skipped:
            self._sums = None
        super().zero_grad(set_to_none)

    def _rows(self) -> Tensor:
        """Return the gradients of each example, parameter after parameter: `[n, P]`."""
        blocks = [sample.flatten(1) for sample in self.grad_samples]
        return torch.cat(blocks, dim=1)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, and DiceSGD's under `dice`. Private."""
        dice = {"memory": self.memory.clone(), "steps": self.steps, "non_finite": self.non_finite}
        return {**super().state_dict(), "dice": dice}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict of DiceSGD.

        Raises:
            ValueError: it has no memory, or one of another shape.
        """
        dice = state_dict.get("dice")
        if dice is None or dice["memory"].shape != self.memory.shape:
            raise ValueError("not a state dict of DiceSGD over these parameters")
        inner = {key: value for key, value in state_dict.items() if key != "dice"}
        super().load_state_dict(inner)
        self.memory = dice["memory"].to(self.memory)
        self.steps, self.non_finite = dice["steps"], dice["non_finite"]


def _clipping(optimizer: DPOptimizer) -> ClippingRule:
    """Return the rule that an optimizer of Opacus clips by."""
    if type(optimizer) is DPOptimizer:
        return GlobalClipping(optimizer.max_grad_norm)
    if type(optimizer) is DPPerLayerOptimizer:
        bounds = tuple(float(bound) for bound in optimizer.max_grad_norms)
        return PerLayerClipping(math.hypot(*bounds), bounds)  # Opacus' own is rounded to float32
    raise ValueError(f"DiceSGD clips flat or per layer, not as {type(optimizer).__name__} does")


def _scaled(rule: ClippingRule, bound: float) -> ClippingRule:
    """Return `rule` with another bound, shared among blocks as its own is."""
    if isinstance(rule, PerLayerClipping):
        return with_bounds(rule, [bound * part / rule.bound for part in rule.block_bounds])
    return GlobalClipping(bound)


class _DiceAccountant(IAccountant):
    """Counts the steps of one mechanism for Opacus' engine; `get_epsilon` is RDP's."""

    accounting: Accounting

    def __init__(self, mechanism: DiceMechanism) -> None:
        super().__init__()
        self._mechanism = mechanism
        self._steps = 0

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Count a step, which must be one of the mechanism's."""
        expected = (self._mechanism.noise_multiplier, self._mechanism.sampling.probability)
        if (noise_multiplier, sample_rate) != expected:
            raise ValueError(f"the mechanism is fixed at (z, q) = {expected}")
        self._steps += 1
        self.history = [(noise_multiplier, sample_rate, self._steps)]

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[DPOptimizer], None]:
        """Return the hook that counts a step of its optimizer."""
        return self._count

    def _count(self, optimizer: DPOptimizer) -> None:
        self.step(
            noise_multiplier=optimizer.noise_multiplier,
            sample_rate=self._mechanism.sampling.probability,
        )

    def get_epsilon(self, delta: float, **kwargs: object) -> float:
        """Return ε of the steps so far, by RDP."""
        return dice_epsilon(self._mechanism, self._steps, delta, self.accounting).epsilon

    def __len__(self) -> int:
        return self._steps

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from an accountant's state dict."""
        super().load_state_dict(state_dict)
        self._steps = sum(count for _, _, count in self.history)


class ProvableDiceAccountant(_DiceAccountant):
    """The proved accounting: see `fedpriv.privacy.dice_accounting`."""

    accounting: Accounting = "provable"

    @classmethod
    def mechanism(cls) -> str:
        """Return the name under which Opacus knows this accountant."""
        return "DiceSGD, provable (rdp)"


class PublishedDiceAccountant(_DiceAccountant):
    """The accounting that the authors of DiceSGD claim, without a proof."""

    accounting: Accounting = "published"

    @classmethod
    def mechanism(cls) -> str:
        """Return the name under which Opacus knows this accountant."""
        return "DiceSGD, published: claimed by its authors, not proved (rdp)"


#: DiceSGD's accountants for Opacus' engine by the name of their accounting.
ACCOUNTANTS: dict[Accounting, Callable[[DiceMechanism], _DiceAccountant]] = {
    "provable": ProvableDiceAccountant,
    "published": PublishedDiceAccountant,
}
