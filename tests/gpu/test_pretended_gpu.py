"""What only a GPU would show, on a machine without one: see `pretend_gpu.py`."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from in_process import SILOS, small_config
from tiny_speech import SPEECH_CHANGES, build_tones

from fedpriv.data.registry import DATASETS
from fedpriv.errors import InputError
from fedpriv.federation.builders import build_example_level, build_randomness, build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.training import cohort
from fedpriv.training.cohort import CohortTrainer, train_cohort
from fedpriv.training.example_level import train_silos
from fedpriv.training.user_cache import UserCache

sys.path.insert(0, str(Path(__file__).parent))
from pretend_gpu import GPU, PretendGpu, pretended_gpu

DROPS = {"model__dropout": 0.2, "model__layer_drop": 0.2}
BF16 = {"local__precision": "bfloat16"}
WRITTEN_OUT = {"local__momentum": 0.9, "local__proximal_mu": 0.1, "local__max_grad_norm": 1.0}
MASKED = {"model__positions": "cape", "local__spec_augment": {"from_round": 1}}
CASES = {
    "images": {},
    "images, dropout": DROPS,
    "images, bfloat16": BF16,
    "images, bfloat16, dropout": {**BF16, **DROPS},
    "images, written out": WRITTEN_OUT,
    "images, one bound": {"privacy__clipping": {"kind": "global", "bound": 0.1}},
    "images, rmsnorm": {"model__norm": "rmsnorm", "model__pooling": "class", **BF16},
    "speech": SPEECH_CHANGES,
    "speech, all": {**SPEECH_CHANGES, **BF16, **DROPS, **MASKED, "local__max_grad_norm": 1.0},
}


@pytest.fixture(autouse=True)
def _tones(monkeypatch):
    monkeypatch.setitem(DATASETS.registered, "tones", build_tones)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def on_gpu(trainer: CohortTrainer) -> CohortTrainer:
    return replace(trainer, model=copy.deepcopy(trainer.model).to(GPU), device=GPU)


def start_of(trainer: CohortTrainer) -> torch.Tensor:
    return Layout.of(trainer.model).join(parameters_of(trainer.model))


def trained(case: str, engine: str, stack: int) -> tuple[float, PretendGpu]:
    changes = {**CASES[case], "runtime__engine": engine, "runtime__stack": stack}
    trainer = build_trainer(small_config(**changes, runtime__device="cpu"))
    start, users = start_of(trainer), range(8)
    expected = train_cohort(trainer, start, users, 1).total
    for user in users:  # what users' data take to be read is not what is looked at
        trainer.prepared(user)
    with pretended_gpu() as gpu:
        there = on_gpu(trainer)
        gpu.waits.clear()
        gpu.transfers.clear()
        total = train_cohort(there, start, users, 1).total
    return apart(total, expected), gpu


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
@pytest.mark.parametrize("case", CASES)
def test_no_two_devices_meet_and_cudas_autocast_is_borne(case, engine):
    difference, _ = trained(case, engine, stack=4)
    if "model__dropout" in CASES[case]:  # a GPU draws other numbers
        assert 0 < difference < 1
    else:
        assert difference < (0.05 if "local__precision" in CASES[case] else 1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("images")])
def test_how_often_a_gpu_is_waited_for_does_not_grow_with_users_or_steps(case):
    """Once to send the parameters, once for bounds, and once for the sum."""
    _, gpu = trained(case, "stacked", stack=2)
    assert sum(gpu.waits.values()) == 1, gpu.waits
    assert sum(gpu.transfers.values()) <= 2, gpu.transfers


def test_of_speech_the_loss_alone_is_waited_for():
    """PyTorch's CTC reads its lengths on the host, in both directions."""
    _, gpu = trained("speech, all", "stacked", stack=4)
    found = [line for line in gpu.waits if "ctc_loss" not in line and "backward" not in line]
    assert len(found) == 1, gpu.waits
    assert "self.total.cpu()" in found[0]
    assert sum(gpu.transfers.values()) <= 2, gpu.transfers


@pytest.mark.parametrize("tolerant", [True, False])
def test_a_label_of_no_class_never_reaches_a_gpu_whose_other_users_it_would_end(tolerant):
    trainer = build_trainer(small_config(runtime__device="cpu"))
    good, user = trainer.dataset.user(1), type(trainer.dataset).user

    def with_a_bad_one(dataset, index):
        examples = user(dataset, index)
        return replace(examples, targets=examples.targets + 10) if index == 1 else examples

    assert len(good) > 0
    start = start_of(trainer)
    expected = train_cohort(trainer, start, [0, 2], 1).total
    with mock.patch.object(type(trainer.dataset), "user", with_a_bad_one), pretended_gpu():
        there = replace(on_gpu(trainer), tolerant=tolerant, cache=UserCache(0))
        if not tolerant:
            with pytest.raises(InputError, match="a target is not one of the 10 classes"):
                train_cohort(there, start, [0, 1, 2], 1)
            return
        summed = train_cohort(there, start, [0, 1, 2], 1)
    assert summed.non_finite == 1
    assert apart(summed.total, expected) < 1e-4


@pytest.mark.parametrize("gradients", ["instantiated", "ghost"])
def test_silos_are_trained_on_one_device(gradients):
    config = small_config(**SILOS, runtime__device="cpu")
    trainer = build_trainer(config)
    layout, start = Layout.of(trainer.model), start_of(trainer)
    level = build_example_level(config, 1.0, layout)

    def total(of: CohortTrainer) -> torch.Tensor:
        delta, secret = config.privacy.delta, build_randomness(config, "data")
        return train_silos(of, level, start, [0, 1], 1, 0, secret, delta, gradients).total

    def with_a_bad_one(dataset, index):
        examples = user(dataset, index)
        targets = examples.targets.clone()
        targets[0] += 10
        return replace(examples, targets=targets)

    expected, user = total(trainer), type(trainer.dataset).user
    with pretended_gpu():
        assert apart(total(on_gpu(trainer)), expected) < 1e-4
    # An example that cannot be taken is left out alone, there as here, and decides nothing else.
    with mock.patch.object(type(trainer.dataset), "user", with_a_bad_one):
        tolerant = replace(trainer, tolerant=True, cache=UserCache(0))
        expected = total(tolerant)
        assert float(expected.norm()) > 0
        with pretended_gpu():
            assert apart(total(replace(on_gpu(tolerant), cache=UserCache(0))), expected) < 1e-4


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretended_gpu() as gpu:
        there = torch.randn(3, 4, device=GPU)
        with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
            there + torch.ones(3, 4)
        with pytest.raises(RuntimeError, match="for a tensor on the CPU"):
            torch.ones(3)[there[:, 0] > 0]
        assert sum(gpu.waits.values()) == 0
        bool((there > 0).all())
        there.cpu()
        there[there > 0]
        assert sum(gpu.waits.values()) == 3
        torch.tensor([1, 2], device=GPU)
        there[torch.tensor([0, 1])]
        assert sum(gpu.transfers.values()) == 2


@pytest.mark.parametrize("case", ["images", "images, dropout", "speech", "speech, all"])
def test_users_share_a_stack_on_a_gpu_only_where_nothing_is_drawn(case, monkeypatch):
    """A GPU's generators have other numbers for more rows: users would decide for one another."""
    stacks, together = [], cohort._train_together

    def counted(*args):
        stacks.append(len(args[3]))
        together(*args)

    monkeypatch.setattr(cohort, "_train_together", counted)
    trained(case, "stacked", stack=4)
    on_cpu, on_gpu = stacks[:2], stacks[2:]
    assert on_cpu == [4, 4]
    assert on_gpu == ([1] * 8 if "dropout" in case or "all" in case else [4, 4])


def test_canaries_are_bounded_and_added_up_on_a_gpu_as_on_the_cpu():
    trainer = build_trainer(small_config(runtime__device="cpu", runtime__stack=4))
    start, users = start_of(trainer), [5, 0, 3]
    planted = torch.randn(8, len(start), generator=torch.Generator().manual_seed(3))
    expected = train_cohort(replace(trainer, planted=planted), start, users, 1).total
    with pretended_gpu():
        there = replace(on_gpu(trainer), planted=planted.to(GPU))
        total = train_cohort(there, start, users, 1).total
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
