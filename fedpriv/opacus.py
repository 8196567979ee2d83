"""For a training loop with Opacus: a ledger, RDP and PLD beside its accountant, and DiceSGD.

    from fedpriv.opacus import LedgerAccountant

    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(...)
    LedgerAccountant.in_engine(engine, optimizer, loader, ledger="runs/mine.jsonl", delta=1e-4)

Each step is on the disk before it moves the model; `engine.get_epsilon` is the smallest ε that has
a proof. It needs Opacus: pip install 'fedpriv[opacus]'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opacus import PrivacyEngine
from opacus.accountants import RDPAccountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping, DPPerLayerOptimizer

from fedpriv.errors import BudgetError, InputError
from fedpriv.optimizers.dice_sgd import DiceSGD
from fedpriv.privacy.charging import Budget, Cost, charge
from fedpriv.privacy.clipping import GlobalClipping
from fedpriv.privacy.example_level import ExampleLevel
from fedpriv.privacy.figures import epsilon_text
from fedpriv.privacy.ledger import Header, Release
from fedpriv.privacy.loop_ledger import loop_ledger, require_small
from fedpriv.privacy.mechanisms.gaussian import GaussianMechanism
from fedpriv.privacy.mechanisms.silos import SiloMechanism
from fedpriv.privacy.sampling import Adjacency, FullParticipation

__all__ = ["DiceSGD", "LedgerAccountant"]

_KINDS = (DPOptimizer, DPPerLayerOptimizer, DPOptimizerFastGradientClipping)
# The accountant's units: one silo, which takes one step at a time, of its own examples.
_SILO = FullParticipation(1)
_MOST_STEPS = 2**20


class LedgerAccountant(RDPAccountant):
    """Opacus' RDP accountant, with a ledger on the disk, PLD, and a budget.

    Opacus calls it when a step's noise is drawn and before the step is taken. The unit is an
    example; how many there are is taken to be public, as in Opacus, which divides by it.
    """

    def __init__(
        self,
        *,
        ledger: str | Path,
        delta: float,
        sample_rate: float,
        max_grad_norm: float,
        max_epsilon: float | None = None,
    ) -> None:
        """Begin a ledger, or go on with it: `in_engine` knows the numbers.

        Args:
            ledger: its file.
            delta: δ.
            sample_rate: q, with which each example is in a step, by a coin of its own.
            max_grad_norm: C.
            max_epsilon: the budget; the step that would exceed it is not taken.

        Raises:
            InputError: the file is another ledger.
        """
        super().__init__()
        self._delta, self._rate, self._bound = delta, sample_rate, max_grad_norm
        self.history: list[tuple[float, float, int]] = []
        self._limit: Budget | None = None
        if max_epsilon is not None:
            at_most = _MOST_STEPS
            self._limit = Budget(max_epsilon, delta, Adjacency.ZERO_OUT, at_most=at_most)
        header = Header("", 1, delta, Adjacency.ZERO_OUT.value, unit="example", mode="deployment")
        self._ledger = loop_ledger(Path(ledger), header)
        self._charged: Counter[Any] = Counter()
        for release in self._ledger:
            self._count(release)

    @classmethod
    def in_engine(
        cls,
        engine: PrivacyEngine,
        optimizer: DPOptimizer,
        loader: DPDataLoader,
        *,
        ledger: str | Path,
        delta: float,
        max_epsilon: float | None = None,
    ) -> LedgerAccountant:
        """Take the place of the engine's accountant, beside what `make_private` returned.

        Raises:
            InputError: batches are not drawn by coins, the optimizer has noise that this does not
                account for, steps have been made already, δ is too large, or the file is another
                ledger.
        """
        if not isinstance(loader, DPDataLoader):
            raise InputError(
                "loader: ε holds for batches that are drawn by coins alone; write "
                "make_private(poisson_sampling=True)"
            )
        if type(optimizer) not in _KINDS:
            raise InputError(
                f"optimizer: {type(optimizer).__name__} is none whose noise is accounted for here; "
                "write clipping='flat' or 'per_layer', on one machine; DiceSGD has its own"
            )
        if len(engine.accountant):
            raise InputError("engine: it has made steps already; write this before the first")
        require_small(delta, len(loader.dataset), "examples")
        accountant = cls(
            ledger=ledger,
            delta=delta,
            sample_rate=loader.sample_rate,
            max_grad_norm=float(optimizer.max_grad_norm),
            max_epsilon=max_epsilon,
        )
        engine.accountant = accountant
        optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(loader.sample_rate))
        return accountant

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[DPOptimizer], None]:
        """Return the hook that charges a step of its optimizer before that is taken."""

        def charged(optimizer: DPOptimizer) -> None:
            self._bound = float(optimizer.max_grad_norm)  # a scheduler may change it
            try:
                self.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=sample_rate)
            except BudgetError:
                optimizer.zero_grad()  # or the noisy gradients would be there to be used
                raise

        return charged

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Charge one step, durably.

        Raises:
            BudgetError: it would exceed the budget; nothing is charged.
        """
        gaussian = GaussianMechanism(noise_multiplier, GlobalClipping(self._bound))
        level = ExampleLevel(gaussian, sample_rate, 1, Adjacency.ZERO_OUT)
        number = len(self._ledger) + 1
        release = Release.of(number, 0, SiloMechanism.of(_SILO, level), "", (0,))
        limit = self._limit
        if limit and (over := limit.refuses(self._charged, release.event())):
            raise BudgetError(
                f"step {number} is not taken: it would raise ε to {epsilon_text(over.epsilon)} by "
                f"{over.accountant.upper()}, above the budget of {limit.epsilon:g}"
            )
        self._ledger.append(release)
        self._count(release)

    def _count(self, release: Release) -> None:
        self._charged[release.event()] += 1
        super().step(noise_multiplier=release.noise_multiplier, sample_rate=release.sampling_rate)

    def get_epsilon(self, delta: float, **kwargs: Any) -> float:
        """Return the smallest ε that RDP or PLD proves for all steps."""
        return self.cost(delta).epsilon

    def cost(self, delta: float | None = None) -> Cost:
        """Return what all steps cost by each accountant, at `delta` or the ledger's own."""
        delta = self._delta if delta is None else delta
        return charge(self._charged, Adjacency.ZERO_OUT, [delta]).first

    def __len__(self) -> int:
        return len(self._ledger)

    @classmethod
    def mechanism(cls) -> str:
        """Return the name under which Opacus knows this accountant."""
        return "fedpriv: ledger, rdp and pld"

    def load_state_dict(self, state_dict: Any) -> None:
        """Check that the ledger has at least the steps of a checkpoint; it stays as it is.

        Raises:
            ValueError: the state is of another accountant, or the ledger lacks steps of it.
        """
        history = list(self.history)
        super().load_state_dict(state_dict)
        known, self.history = sum(count for _, _, count in self.history), history
        if known > len(self._ledger):
            raise ValueError(f"{self._ledger.path} lacks steps of that checkpoint")
