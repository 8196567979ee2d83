"""What a config says of GPUs, where there is none: what is refused, and what is asked for."""

import io
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from in_process import Silent, small_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedpriv import experiment
from fedpriv.data.text import Alphabet
from fedpriv.errors import InputError
from fedpriv.federation import ray_cluster
from fedpriv.federation.builders import build_trainer
from fedpriv.models import SpeechOptions, build_model
from fedpriv.models.parameters import Layout
from fedpriv.optimizers.schedules import ScheduleConfig
from fedpriv.optimizers.server import Server
from fedpriv.privacy.clipping import PerLayerClipping
from fedpriv.privacy.error_feedback import Dice, feed_back
from fedpriv.runtime import RuntimeConfig
from fedpriv.tasks.decoding import greedy
from fedpriv.tasks.recognition import Recognition
from fedpriv.training import stack_size
from fedpriv.training.local import LocalTraining
from fedpriv.training.spans import Stopwatch
from fedpriv.training.stack_size import Room, fitting_stack, kept_bytes, measured_stack
from fedpriv.training.stacked import stacked_model

GIB = 2**30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime__gpus_per_worker": 1.5}, "only whole GPUs can be given, got 1.5"),
        (
            {"runtime__gpus_per_worker": 0.5, "runtime__device": "cuda:1"},
            "a worker sees no GPU but its own, got cuda:1; write cuda",
        ),
    ],
)
def test_what_ray_could_not_give_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        small_config(**changes)


def test_a_run_that_wants_gpus_where_none_are_says_so_and_charges_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = small_config(run_dir=str(tmp_path / "run"), runtime__gpus_per_worker=1.0)
    prepared = experiment.prepare(config)
    directory = experiment.create(prepared)
    with pytest.raises(InputError, match="a worker takes 1 and there are 0 CUDA devices here"):
        experiment.train(prepared, directory, Silent())
    assert not directory.ledger.exists()


@pytest.mark.parametrize(("share", "told"), [(0.0, None), (0.25, 2)])
def test_ray_is_told_how_many_gpus_there_are(monkeypatch, share, told):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = ray_cluster._arguments(RuntimeConfig(gpus_per_worker=share, device="cuda"))
    assert arguments.get("num_gpus") == told


def test_a_cluster_elsewhere_hides_no_gpus_of_workers_without_a_share():
    arguments = ray_cluster._arguments(RuntimeConfig(ray_address="10.0.0.9:1", device="cuda"))
    passed_on = arguments["runtime_env"]["env_vars"]
    assert passed_on["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "0"


# A worker is shown its GPUs after it has imported these: whoever had asked would see all or none.
_IMPORTS = """
import sys, torch
asked = []
torch._C._cuda_getDeviceCount = lambda: asked.append("count") or 0
torch.cuda._lazy_init = lambda: asked.append("init")
for name in sys.argv[1:]:
    __import__(name)
assert not asked, asked
assert not torch.cuda.is_initialized()
"""


def test_what_a_worker_imports_ahead_asks_for_no_gpu():
    command = [sys.executable, "-c", _IMPORTS, *ray_cluster._IMPORTED_BY_WORKERS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_of_a_gpu_is_read_where_the_model_is():
    model = torch.nn.Linear(2, 2)
    server = Server(model, "adam", 0.1, {}, ScheduleConfig(), None, 1)
    written = io.BytesIO()
    torch.save(torch.ones(3), written)
    # What a checkpoint says of where a tensor was.
    on_gpu = io.BytesIO(written.getvalue())
    storage = torch.load(on_gpu, weights_only=True).untyped_storage()
    for place in ("cuda:0", "cuda:3", "cpu"):
        assert server._place(storage, place).device == torch.device("cpu")


def test_a_span_on_a_gpu_ends_when_the_gpu_has_done_its_work(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for on, device, times in ((True, "cuda", 1), (True, "cpu", 0), (False, "cuda", 0)):
        waited.clear()
        watch = Stopwatch(on, device=torch.device(device))
        with watch.measure("work"):
            pass
        assert len(waited) == times
        assert len(watch.spans) == on


# Memory.


def large(rows: int, frames: int) -> SimpleNamespace:
    """The published model without any numbers, and what is known of its users."""
    with torch.device("meta"):
        shape = {"dim": 768, "depth": 36, "heads": 4, "mels": 80, "positions": "cape"}
        config = SpeechOptions(dropout=0.3, layer_drop=0.3, **shape)
        model = build_model(config, (16_000,), 30, seed=1)
    recipe = LocalTraining(batch_size=rows, batch_sizes=rows * frames, max_grad_norm=1.0)
    dataset = SimpleNamespace(input_shape=(1,))
    task = Recognition(Alphabet("ab"), greedy)
    given = {"dataset": dataset, "feedback": None, "task": task, "vmapped": None}
    return SimpleNamespace(model=model, recipe=recipe, **given)


def test_the_published_models_memory_is_known_without_it():
    trainer, tokens = large(8, 1500), 8 * 500
    parameters = Layout.of(trainer.model).total
    assert parameters == 256_049_694
    # Of each token a block keeps at least what its six linear maps and two norms read, and its MLP
    # is four times as wide; of each pair of tokens and head the attention keeps some numbers.
    least = 36 * 4 * (tokens * 768 * (6 + 2 * 4) + 4 * 8 * 500**2 * 2)
    kept = kept_bytes(trainer)
    assert least < kept < 3 * least
    room = Room.of(trainer, 64 * GIB)
    assert room.each == kept + 8 * parameters
    assert room.fixed == 16 * parameters
    users = fitting_stack(trainer, room)
    assert room.fixed + users * room.each <= room.free < room.fixed + (users + 1) * room.each
    assert 3 <= users <= 6
    assert fitting_stack(trainer, Room.of(trainer, GIB)) == 1


def test_what_is_kept_is_counted_as_a_real_pass_keeps_it():
    trainer = build_trainer(small_config(runtime__device="cpu"))
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(trainer.recipe.batch_size, *trainer.dataset.input_shape)
    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = trainer.model(images)
    for parameter in trainer.model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del outputs
    # Attention is another kernel there, which keeps other numbers of itself.
    assert kept_bytes(trainer) == pytest.approx(sum(kept.values()), rel=0.3)


def test_a_small_models_stack_ends_where_more_would_not_help():
    trainer = build_trainer(small_config(runtime__device="cpu"))
    assert fitting_stack(trainer, Room.of(trainer, 64 * GIB)) == 512


def test_a_stack_that_a_gpu_has_no_memory_for_ends_the_trial(monkeypatch):
    def train_cohort(trainer, start, users, round_):
        if trainer.stack > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stack_size, "train_cohort", train_cohort)
    monkeypatch.setattr(stack_size.time, "perf_counter", iter(range(1000)).__next__)
    trainer = build_trainer(small_config(runtime__device="cpu"))
    assert measured_stack(trainer, GIB) == 4


def test_a_trial_on_a_gpu_stays_below_the_most_and_leaves_the_memory_to_workers(monkeypatch):
    """Above the most rows an attention's kernel fails, which is no lack of memory."""
    tried, freed = [], []

    def train_cohort(trainer, start, users, round_):
        tried.append(trainer.stack)
        assert trainer.stacked is not None  # its memory would stay until another takes its place

    def empty_cache():
        freed.append(stacked_model.cache_info().currsize)

    monkeypatch.setattr(stack_size, "train_cohort", train_cohort)
    monkeypatch.setattr(stack_size.time, "perf_counter", count().__next__)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    trainer = build_trainer(small_config(runtime__device="cpu"))
    there = replace(trainer, device=torch.device("cuda"))
    assert measured_stack(there, GIB, most=4) <= 4
    assert max(tried) == 4
    assert freed == [0]


def test_the_room_of_a_stack_counts_what_error_feedback_holds():
    """The update, its memory and all that is made of them are there at once: `[users, P]` each."""
    trainer = build_trainer(small_config(runtime__device="cpu"))
    few = replace(trainer.recipe, batch_size=1)
    plain = replace(trainer, recipe=few)
    parameters, users = Layout.of(trainer.model).total, 64
    clipping = PerLayerClipping(0.1, (0.1,), normalize=False)
    memories = (torch.randn(users, parameters) for _ in range(2))
    held = Held()
    with held:
        feed_back(*memories, [parameters], clipping, Dice(clipping, norm_cap=1.0))
    room = Room.of(replace(plain, feedback=Dice(clipping)), GIB)
    beside = 3 * 4 * parameters  # parameters, update and memory
    assert room.each >= Room.of(plain, GIB).each
    assert room.each >= held.most / users + beside


class Held(TorchDispatchMode):
    """Counts the most float32 bytes that operations in its body have made and still hold."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        for one in tree_leaves(answer):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float32:
                self._follow(one.untyped_storage(), one)
        return answer

    def _follow(self, storage, tensor):
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key, size):
        self.known.discard(key)
        self.now -= size
