"""The engine on a device, against float64 on the CPU and against what bounds promise.

`make gpu` runs these on a GPU; everywhere else they run on the CPU.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from in_process import SILOS, InProcessGrid, resume_small, small_config, train_small
from tiny_speech import SPEECH_CHANGES, build_tones

from fedpriv.data.registry import DATASETS
from fedpriv.federation.builders import build_example_level, build_randomness, build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.speech import LogMel
from fedpriv.privacy.clipping import GlobalClipping, PerLayerClipping, clip_and_sum, dim_split
from fedpriv.training import cohort
from fedpriv.training.cohort import CohortTrainer, train_cohort
from fedpriv.training.example_level import train_silos
from fedpriv.training.recordings import Recordings, recordings_of
from fedpriv.training.user_cache import UserCache

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
# Largest difference of a sum, in units of its largest number. Local training multiplies rounding.
CLOSE, TF32, BF16 = 2e-4, 2e-2, 1e-1
WRITTEN_OUT = {"local__momentum": 0.9, "local__proximal_mu": 0.1, "local__max_grad_norm": 1.0}


@pytest.fixture(autouse=True)
def _tones(monkeypatch):
    monkeypatch.setitem(DATASETS.registered, "tones", build_tones)


def trainer_on(device: torch.device, **changes: object) -> CohortTrainer:
    return build_trainer(small_config(**changes, runtime__device=str(device)))


def sum_of(trainer: CohortTrainer, users: int = 6) -> torch.Tensor:
    """Return the sum of a cohort whose features are the CPU's.

    Between the lines of a tone's spectrum there is nothing but rounding, whose logarithm is a
    feature as any other: `test_features_are_those_of_the_cpu` says how far they are apart.
    """
    on_cpu = replace(trainer, model=copy.deepcopy(trainer.model).to(CPU), cache=UserCache(0))
    for user in range(users):
        trainer.cache.put((trainer.dataset, user), on_cpu.prepared(user))
    start = Layout.of(trainer.model).join(parameters_of(trainer.model)).cpu()
    return train_cohort(trainer, start, range(users), round_=1).total


def apart(total: torch.Tensor, expected: torch.Tensor) -> float:
    assert total.device == expected.device == CPU
    assert torch.isfinite(total).all()
    return float((total - expected).abs().max() / expected.abs().max())


def test_features_are_those_of_the_cpu(device):
    torch.manual_seed(1)
    waves, lengths = 0.1 * torch.randn(3, 8000), torch.tensor([8000, 6000, 4000])
    front_end = LogMel(8000, 40)
    expected, _ = copy.deepcopy(front_end).double()(waves.double(), lengths)
    found, _ = front_end.to(device)(waves, lengths)
    assert float((found.cpu().double() - expected).abs().max()) < 1e-3


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
@pytest.mark.parametrize(
    "changes", [{}, WRITTEN_OUT, SPEECH_CHANGES], ids=["plain", "written out", "speech"]
)
def test_an_engine_gives_the_sum_of_one_after_another_on_the_cpu(device, engine, changes):
    expected = sum_of(trainer_on(CPU, **changes, runtime__engine="sequential"))
    assert apart(sum_of(trainer_on(device, **changes, runtime__engine=engine)), expected) < CLOSE


@pytest.mark.parametrize(
    ("changes", "engine", "dropout"),
    [
        ({}, "stacked", 0.2),
        ({}, "sequential", 0.2),
        (SPEECH_CHANGES, "stacked", 0.2),
        (SPEECH_CHANGES, "stacked", 0.0),
    ],
    ids=["images", "images, one by one", "speech", "speech without dropout"],
)
def test_bfloat16_trains_close_to_float32_and_sums_in_float64(device, engine, changes, dropout):
    shaped = {**changes, "model__dropout": dropout, "runtime__engine": engine}
    exact = sum_of(trainer_on(device, **shaped))
    rounded = sum_of(trainer_on(device, **shaped, local__precision="bfloat16"))
    assert rounded.dtype == torch.float64
    assert 0 < apart(rounded, exact) < BF16


def test_tf32_is_taken_where_it_is_asked_for_and_nowhere_else(device):
    if device.type != "cuda":
        pytest.skip("TF32 is for CUDA devices")
    factors = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(1))
    true = factors[0].double() @ factors[1].double()

    def error() -> float:
        product = factors[0].to(device) @ factors[1].to(device)
        return float((product.cpu().double() - true).abs().max() / true.abs().max())

    exact = sum_of(trainer_on(device))
    assert error() < 1e-5
    rounded = sum_of(trainer_on(device, local__precision="tf32"))
    assert error() > 1e-5
    assert apart(rounded, exact) < TF32
    sum_of(trainer_on(device))
    assert error() < 1e-5


@pytest.mark.parametrize("rule", ["global", "per_layer"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_no_contribution_is_above_the_bound_in_float64(device, rule, size):
    sizes = [3, 1000, 70_001]
    rows = size * torch.randn(5, sum(sizes), generator=torch.Generator().manual_seed(2))
    rows[3, 5] = math.nan
    bound = 0.3
    clipping = (
        GlobalClipping(bound)
        if rule == "global"
        else PerLayerClipping(bound, dim_split(bound, sizes), normalize=True)
    )
    for row in range(5):
        clipped = clip_and_sum(rows[row : row + 1].to(device), sizes, clipping)
        norm = math.sqrt(math.fsum((clipped.total.cpu() ** 2).tolist()))
        assert norm <= bound
        assert bool(clipped.finite[0]) == (row != 3)
    whole = clip_and_sum(rows.to(device), sizes, clipping).total.cpu()
    assert apart(whole, clip_and_sum(rows, sizes, clipping).total) < 1e-12


@pytest.mark.parametrize("gradients", ["instantiated", "ghost"])
def test_silos_take_the_gradients_of_examples_and_the_noise_of_the_cpu(device, gradients):
    config = small_config(**SILOS)

    def total(where: torch.device) -> torch.Tensor:
        trainer = trainer_on(where, **SILOS)
        layout = Layout.of(trainer.model)
        start = layout.join(parameters_of(trainer.model)).cpu()
        level = build_example_level(config, 1.0, layout)
        secret = build_randomness(config, "data")
        delta = config.privacy.delta
        return train_silos(trainer, level, start, [0, 1, 2], 1, 0, secret, delta, gradients).total

    assert apart(total(device), total(CPU)) < CLOSE


class Killed(InProcessGrid):
    """Ends the run when users are to be trained in round 3."""

    def answer(self, message):
        if message.metadata.message_type == "train" and message.metadata.group_id == "3":
            raise RuntimeError("killed")
        return super().answer(message)


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(device, tmp_path):
    """Noise is the CPU's; of classification all else is deterministic on one card."""
    on = {"runtime__device": str(device), "runtime__stack": 8}
    _, whole = train_small(tmp_path / "whole", **on)
    with pytest.raises(RuntimeError, match="killed"):
        train_small(tmp_path / "part", Killed(), **on)
    _, resumed = resume_small(tmp_path / "part")
    assert resumed.server.parameters().device.type == device.type
    assert apart(resumed.server.parameters().cpu(), whole.server.parameters().cpu()) == 0


@pytest.mark.parametrize("changes", [{}, WRITTEN_OUT], ids=["plain", "written out"])
def test_recorded_stacks_give_the_bits_of_those_that_are_not(device, changes):
    """A stack of five is filled up to six; the third round is the second replay."""
    trainer = trainer_on(device, **changes, runtime__stack=48)
    assert trainer.graphs == (device.type == "cuda")
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for CUDA devices; test_recordings.py tries them without")
    unrecorded = replace(trainer, model=copy.deepcopy(trainer.model))
    start = Layout.of(trainer.model).join(parameters_of(trainer.model))

    def totals(of: CohortTrainer) -> list[torch.Tensor]:
        return [train_cohort(of, start * (1 + 0.1 * n), range(5), n).total for n in (1, 2, 3, 4)]

    recorded = totals(trainer)
    assert recordings_of(trainer.stacked)._made
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Recordings, "_recorded", lambda *_: None)
        expected = totals(unrecorded)
    assert all(torch.equal(a, b) for a, b in zip(recorded, expected, strict=True))
    for total, other in zip(recorded, totals(replace(trainer, graphs=False)), strict=True):
        assert apart(total, other) < CLOSE


def test_nothing_waits_for_a_gpu_while_users_are_trained(device):
    if device.type != "cuda":
        pytest.skip("no GPU to wait for; test_pretended_gpu.py counts where one would be")
    trainer = trainer_on(device, runtime__stack=2)
    expected = sum_of(trainer)  # what is made once is made
    start = Layout.of(trainer.model).join(parameters_of(trainer.model))
    summed = cohort._Seen.summed

    def after_that(seen, watch):
        torch.cuda.set_sync_debug_mode("default")
        return summed(seen, watch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cohort._Seen, "summed", after_that)
        torch.cuda.set_sync_debug_mode("error")
        try:
            total = train_cohort(trainer, start, range(6), round_=1).total
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert apart(total, expected) < CLOSE


def test_a_model_is_on_the_device_and_users_are_on_the_host(device):
    trainer = trainer_on(device, **SPEECH_CHANGES)
    assert next(trainer.model.parameters()).device.type == device.type
    prepared = replace(trainer, model=copy.deepcopy(trainer.model)).prepared(1)
    assert prepared.inputs.device == prepared.lengths.device == CPU
