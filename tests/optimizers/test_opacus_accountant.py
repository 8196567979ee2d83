"""Our ledger and accountants in a training loop of Opacus' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting import pld
from opacus import PrivacyEngine
from opacus.accountants import RDPAccountant
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fedpriv.errors import BudgetError, InputError
from fedpriv.opacus import DiceSGD, LedgerAccountant
from fedpriv.privacy.accounting import RdpAccountant
from fedpriv.privacy.ledger import read_ledger
from fedpriv.privacy.sampling import Adjacency

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Full backward hook")

DELTA, EXAMPLES, BATCH = 1e-3, 60, 12


class Training:
    """A loop of Opacus' own over made-up examples, whose optimizer says when it steps."""

    def __init__(self, path: Path | None, max_epsilon: float | None = None, **private: Any) -> None:
        torch.manual_seed(0)
        self.path, self.seen = path, list[int]()
        data = TensorDataset(torch.randn(EXAMPLES, 4), torch.randint(0, 2, (EXAMPLES,)))
        model = torch.nn.Linear(4, 2)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        step = sgd.step

        def watched(*args: Any) -> Any:
            self.seen.append(0 if path is None else len(read_ledger(path).releases))
            return step(*args)

        sgd.step = watched  # on this object alone
        self.engine = PrivacyEngine(accountant="rdp")
        given = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, **private}
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=model, optimizer=sgd, data_loader=DataLoader(data, batch_size=BATCH), **given
        )
        if path is not None:
            self.accountant = LedgerAccountant.in_engine(
                self.engine,
                self.optimizer,
                self.loader,
                ledger=path,
                delta=DELTA,
                max_epsilon=max_epsilon,
            )

    def epoch(self) -> None:
        for x, y in self.loader:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()


@pytest.mark.parametrize(
    ("z", "q", "steps"),
    [(1.0, 0.01, 1000), (1.1, 256 / 60000, 14000), (2.0, 0.2, 50), (20.0, 0.2, 100)],
)
def test_epsilon_by_rdp_is_opacus_own_and_by_pld_it_is_smaller(tmp_path, z, q, steps):
    """At whole orders the two are one number; between them dp-accounting rounds up, by 0.02%."""
    ours = LedgerAccountant(
        ledger=tmp_path / "a.jsonl", delta=1e-5, sample_rate=q, max_grad_norm=1.0
    )
    ours.step(noise_multiplier=z, sample_rate=q)
    (event,) = ours._charged
    ours._charged[event] = steps  # as many lines would take a minute
    theirs = RDPAccountant()
    theirs.history = [(z, q, steps)]
    cost, by_opacus = ours.cost(), theirs.get_epsilon(1e-5)
    whole = RdpAccountant(Adjacency.ZERO_OUT, orders=tuple(map(float, range(2, 64))))
    whole.compose(event, steps)
    at_whole = theirs.get_epsilon(1e-5, alphas=list(range(2, 64)))
    assert whole.epsilon(1e-5) == pytest.approx(at_whole, rel=1e-6)
    assert by_opacus * (1 - 1e-9) <= cost.epsilon_rdp <= by_opacus * (1 + 2e-4)
    assert ours.get_epsilon(1e-5) < by_opacus
    exact = pld.PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
    exact.compose(step, steps)
    assert cost.epsilon_pld == pytest.approx(exact.get_epsilon(1e-5), rel=1e-4)


def test_each_step_is_on_the_disk_before_it_moves_the_model(tmp_path):
    training = Training(tmp_path / "a.jsonl")
    for _ in range(2):
        training.epoch()
    assert training.seen == list(range(1, 2 * EXAMPLES // BATCH + 1))
    plain = Training(None)
    for _ in range(2):
        plain.epoch()
    for ours, theirs in zip(training.model.parameters(), plain.model.parameters(), strict=True):
        assert ours.equal(theirs)  # it changes nothing of what Opacus does
    by_opacus = plain.engine.get_epsilon(DELTA)
    assert training.accountant.cost().epsilon_rdp == pytest.approx(by_opacus, rel=5e-4)
    # Opacus' own accountant is still in it.
    assert RDPAccountant.get_epsilon(training.accountant, DELTA) == by_opacus
    assert training.engine.get_epsilon(DELTA) < by_opacus
    release = read_ledger(tmp_path / "a.jsonl").releases[0]
    assert (release.bound, release.noise_multiplier, release.sampling_rate) == (0.5, 1.0, 0.2)


def test_the_step_that_would_exceed_the_budget_is_not_taken(tmp_path):
    free = Training(tmp_path / "free.jsonl")
    costs = []
    for x, y in free.loader:
        free.optimizer.zero_grad()
        F.cross_entropy(free.model(x), y).backward()
        free.optimizer.step()
        costs.append(free.engine.get_epsilon(DELTA))
    training = Training(tmp_path / "a.jsonl", max_epsilon=(costs[2] + costs[3]) / 2)
    with pytest.raises(BudgetError, match="step 4 is not taken"):
        training.epoch()
    assert len(training.seen) == len(read_ledger(tmp_path / "a.jsonl").releases) == 3
    assert all(p.grad is None or not p.grad.any() for p in training.model.parameters())


def test_a_loop_that_is_started_again_goes_on_with_its_ledger(tmp_path):
    first = Training(tmp_path / "a.jsonl")
    first.epoch()
    saved = first.accountant.state_dict()
    again = Training(tmp_path / "a.jsonl")
    again.epoch()
    twice = Training(tmp_path / "b.jsonl")
    twice.epoch()
    with pytest.raises(ValueError, match="lacks steps"):
        twice.accountant.load_state_dict(again.accountant.state_dict())
    twice.epoch()
    assert len(again.accountant) == len(twice.accountant) == 2 * EXAMPLES // BATCH
    assert again.engine.get_epsilon(DELTA) == twice.engine.get_epsilon(DELTA)
    again.accountant.load_state_dict(saved)
    assert len(again.accountant) == 2 * EXAMPLES // BATCH
    with pytest.raises(InputError, match="delta differs"):
        LedgerAccountant(
            ledger=tmp_path / "a.jsonl", delta=1e-5, sample_rate=0.2, max_grad_norm=0.5
        )


def test_physical_batches_of_one_step_are_charged_once(tmp_path):
    training = Training(tmp_path / "a.jsonl")
    with BatchMemoryManager(
        data_loader=training.loader, max_physical_batch_size=4, optimizer=training.optimizer
    ) as loader:
        for x, y in loader:
            training.optimizer.zero_grad()
            F.cross_entropy(training.model(x), y).backward()
            training.optimizer.step()
    assert len(training.accountant) == EXAMPLES // BATCH


def test_what_has_no_proof_is_refused(tmp_path):
    with pytest.raises(InputError, match="poisson_sampling=True"):
        Training(tmp_path / "a.jsonl", poisson_sampling=False)
    with pytest.raises(InputError, match="is none whose noise"):
        Training(
            tmp_path / "a.jsonl",
            clipping="adaptive",
            target_unclipped_quantile=0.5,
            clipbound_learning_rate=0.2,
            max_clipbound=1.0,
            min_clipbound=0.1,
            unclipped_num_std=5.0,
        )
    late = Training(None)
    with pytest.raises(InputError, match="below 1/examples"):
        LedgerAccountant.in_engine(
            late.engine, late.optimizer, late.loader, ledger=tmp_path / "a.jsonl", delta=0.1
        )
    late.epoch()
    with pytest.raises(InputError, match="made steps already"):
        LedgerAccountant.in_engine(
            late.engine, late.optimizer, late.loader, ledger=tmp_path / "a.jsonl", delta=DELTA
        )
    assert not (tmp_path / "a.jsonl").exists()


def test_dice_sgd_is_there_as_before():
    from fedpriv.optimizers import dice_sgd

    assert DiceSGD is dice_sgd.DiceSGD
