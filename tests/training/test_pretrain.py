import copy
import dataclasses
import math
import threading
from itertools import chain

import pytest
import torch
from tiny_speech import RATE, tiny_speech
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fedpriv.errors import InputError, Interrupted
from fedpriv.models import SpeechOptions, build_model
from fedpriv.models.parameters import parameters_of
from fedpriv.optimizers.schedules import ScheduleConfig
from fedpriv.optimizers.server import Server
from fedpriv.tasks.decoding import greedy
from fedpriv.tasks.recognition import Recognition
from fedpriv.tasks.spec_augment import SpecAugment
from fedpriv.training.checkpoint import checkpoint_files
from fedpriv.training.pretrain import Pretraining, measures_of, pretrain
from fedpriv.training.user_cache import UserCache

PRINT = "f" * 64
MASKS = SpecAugment(from_round=3, freq_width=3, time_masks=2, time_width=8)


class Watching:
    """A listener that stops the training after some step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop = threading.Event()
        self.stop_after = stop_after
        self.begun: list[int] = []
        self.losses: dict[int, float] = {}
        self.measures: dict[int, dict[str, float]] = {}

    def begin(self, steps: int, done: int, what: str) -> None:
        self.begun.append(done)

    def step(self, step: int, loss: float) -> None:
        self.losses[step] = loss
        if step == self.stop_after:
            self.stop.set()

    def measured(self, step: int, measures: dict[str, float]) -> None:
        self.measures[step] = measures


RANDOM = {"dropout": 0.1, "layer_drop": 0.1, "positions": "cape"}


def training(
    dataset=None, steps=12, memory=2**20, seed=5, optimizer="adamw", lr=0.01, random=True, **changes
) -> Pretraining:
    dataset = dataset or tiny_speech()
    shape = {"dim": 16, "depth": 1, "heads": 2, "mels": 8} | (RANDOM if random else {})
    model = build_model(SpeechOptions(**shape), (RATE,), dataset.classes, seed)
    server = Server(
        model=model,
        optimizer=optimizer,
        lr=lr,
        options={},
        schedule=ScheduleConfig(kind="linear" if random else "constant"),
        normalize=None,
        rounds=steps,
    )
    whole = Pretraining(
        dataset=dataset,
        model=model,
        task=Recognition(dataset.alphabet, greedy, MASKS if random else None),
        server=server,
        steps=steps,
        batch_size=4,
        max_grad_norm=1.0,
        every=5,
        evaluation_batch=4,
        seed=seed,
        device=torch.device("cpu"),
        cache=UserCache(memory),
    )
    return dataclasses.replace(whole, **changes)


def numbers(whole: Pretraining) -> dict[str, torch.Tensor]:
    return {name: block.clone() for name, block in parameters_of(whole.model).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def start(folder, whole: Pretraining, listener: Watching) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    return pretrain(whole, folder, PRINT, listener, listener.stop)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A training that nothing interrupts."""
    whole, listener = training(), Watching()
    measures = start(tmp_path_factory.mktemp("straight"), whole, listener)
    return numbers(whole), listener, measures


def test_a_training_learns_and_tells(straight):
    _, listener, measures = straight
    assert listener.begun == [0]
    assert list(listener.losses) == list(range(1, 13))
    assert listener.losses[12] < 0.8 * listener.losses[1]
    assert list(listener.measures) == [5, 10, 12]
    assert listener.measures[12] == measures


@pytest.mark.parametrize("stops", [(1,), (5,), (4, 7), (11,), (2, 3, 10)])
def test_an_interrupted_training_goes_on_to_the_same_numbers(tmp_path, straight, stops):
    expected, uninterrupted, measures = straight
    losses = {}
    for stop_after in stops:
        listener = Watching(stop_after)
        with pytest.raises(Interrupted, match=f"after step {stop_after}"):
            start(tmp_path / "folder", training(), listener)
        losses |= listener.losses
        assert len(checkpoint_files(tmp_path / "folder")) == 1
        torch.manual_seed(stop_after)  # another process has another global state
    whole, listener = training(), Watching()
    assert start(tmp_path / "folder", whole, listener) == measures
    assert listener.begun == [stops[-1]]
    assert losses | listener.losses == uninterrupted.losses
    assert same(numbers(whole), expected)


@pytest.mark.parametrize("changes", [{"every": 1}, {"every": 100}, {"evaluation_batch": 1}])
def test_how_often_it_measures_and_what_it_keeps_in_memory_change_nothing(
    tmp_path, straight, changes
):
    for memory in (0, 3_000):
        whole = training(memory=memory, **changes)
        start(tmp_path / str(memory), whole, Watching())
        assert same(numbers(whole), straight[0])


def test_a_process_that_dies_between_checkpoints_repeats_the_steps(tmp_path, straight):
    class Killed(Watching):
        def step(self, step, loss):
            if step == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "folder", training(), Killed())
    (tmp_path / "folder" / "round-000008.partial").write_bytes(b"torn")
    whole, listener = training(), Watching()
    start(tmp_path / "folder", whole, listener)
    assert listener.begun == [5]
    assert same(numbers(whole), straight[0])


def test_a_training_that_was_at_its_end_only_measures_again(tmp_path, straight):
    start(tmp_path / "folder", training(), Watching())
    whole, listener = training(), Watching()
    assert start(tmp_path / "folder", whole, listener) == straight[2]
    assert listener.begun == [12]
    assert listener.losses == {}
    assert same(numbers(whole), straight[0])


def test_a_stop_at_the_last_step_is_no_interruption(tmp_path, straight):
    whole = training()
    start(tmp_path / "folder", whole, Watching(stop_after=12))
    assert same(numbers(whole), straight[0])


def test_another_seed_trains_another_model(tmp_path, straight):
    whole = training(seed=6)
    start(tmp_path / "folder", whole, Watching())
    assert not same(numbers(whole), straight[0])


def test_steps_are_those_of_a_plain_loop(tmp_path):
    """Gradient descent on the mean loss of all public recordings, clipped, nothing random."""
    limit = 2.0
    whole = training(
        steps=3, optimizer="sgd", lr=0.2, random=False, batch_size=1_000, max_grad_norm=limit
    )
    model, dataset = copy.deepcopy(whole.model), whole.dataset
    heard = [torch.from_numpy(one.read(RATE, 9.0)) for one in dataset.public]
    lengths = torch.tensor([len(wave) for wave in heard])
    said = [dataset.alphabet.encode(one.text) for one in dataset.public]
    sizes = torch.tensor([len(target) for target in said])
    waves, targets = (pad_sequence(each, batch_first=True) for each in (heard, said))
    losses, norms, parameters = {}, [], list(model.parameters())
    for step in (1, 2, 3):
        log_probs, tokens = model(waves, lengths)
        each = F.ctc_loss(log_probs.transpose(0, 1), targets, tokens, sizes, reduction="none")
        loss = (each / sizes).mean()
        gradients = torch.autograd.grad(loss, parameters)
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= 0.2 * min(1.0, limit / norms[-1]) * g
        losses[step] = float(loss.detach())
    assert min(norms) < limit < max(norms)
    listener = Watching()
    start(tmp_path / "folder", whole, listener)
    assert listener.losses == pytest.approx(losses, rel=1e-4)
    for found, expected in zip(whole.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("random", [True, False])
def test_dropout_and_masks_are_other_ones_in_every_step(tmp_path, random):
    one = dataclasses.replace(tiny_speech(), public=tiny_speech().public[:1])
    listener = Watching()
    start(tmp_path / "folder", training(one, lr=1e-12, random=random), listener)
    for losses in ([listener.losses[1], listener.losses[2]], list(listener.losses.values())[2:]):
        assert len(set(losses)) == (len(losses) if random else 1)


def test_all_recordings_are_passed_over_in_turn_and_in_another_order_each_time(tmp_path):
    seen = []

    class Counting(Pretraining):
        def batch(self, indices):
            seen.append(indices.tolist())
            return super().batch(indices)

    count = len(tiny_speech().public)
    per_pass = -(-count // 4)
    whole = training(steps=2 * per_pass)
    counting = Counting(**{f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)})
    start(tmp_path / "folder", counting, Watching())
    batches = seen[-2 * per_pass :]  # before them it looks whether any can be used
    passes = [list(chain(*batches[:per_pass])), list(chain(*batches[per_pass:]))]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(count))
    assert passes[0] != passes[1]
    assert all(len(one) <= 4 for one in batches)


# What cannot be trained.


@dataclasses.dataclass(frozen=True)
class Unreadable:
    text: str = "a"

    def read(self, sample_rate, max_seconds):
        raise InputError("no sound")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"public": []}, r"seed_model\.pretrain needs public recordings"),
        ({"public_held_out": []}, r"seed_model\.pretrain needs public recordings"),
        ({"public": [Unreadable()] * 3}, "none of the public recordings can be used"),
        ({"public_held_out": [Unreadable()] * 3}, "none of the .*held-out recordings can be used"),
    ],
)
def test_without_public_recordings_it_says_so_in_a_line(tmp_path, changes, message):
    dataset = dataclasses.replace(tiny_speech(), **changes)
    with pytest.raises(InputError, match=message) as error:
        start(tmp_path / "folder", training(dataset), Watching())
    assert "\n" not in str(error.value)
    assert not checkpoint_files(tmp_path / "folder")


def test_recordings_that_cannot_be_used_are_left_out(tmp_path):
    dataset = tiny_speech()
    mixed = dataclasses.replace(dataset, public=[Unreadable()] * 9 + list(dataset.public))
    whole, listener = training(mixed), Watching()
    start(tmp_path / "folder", whole, listener)
    assert set(listener.measures[12]) >= {"wer", "cer", "loss"}
    assert all(torch.isfinite(block).all() for block in numbers(whole).values())


def test_the_checkpoint_of_another_training_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        start(tmp_path, training(), Watching(stop_after=3))
    with pytest.raises(InputError, match="belongs to another configuration") as error:
        pretrain(training(), tmp_path, "0" * 64, Watching(), threading.Event())
    assert "\n" not in str(error.value)
    assert len(checkpoint_files(tmp_path)) == 1


def test_a_damaged_checkpoint_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        start(tmp_path, training(), Watching(stop_after=3))
    (file,) = checkpoint_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="corrupt checkpoint"):
        start(tmp_path, training(), Watching())


def test_a_loss_that_is_no_longer_a_number_stops_it_in_a_line(tmp_path):
    whole = training(optimizer="sgd", lr=1e6, steps=200, max_grad_norm=None)
    with pytest.raises(InputError, match=r"seed_model\.pretrain\.lr: the loss of step \d+ is") as e:
        start(tmp_path / "folder", whole, Watching())
    assert "\n" not in str(e.value)


def test_a_finished_model_is_measured_on_both_kinds_of_held_out_recordings(tmp_path):
    whole = training()
    measures = start(tmp_path / "folder", whole, Watching())
    found = measures_of(whole)
    assert found["public_held_out"] == pytest.approx(measures)
    words = sum(len(one.text.split()) for one in whole.dataset.held_out)
    assert found["held_out"]["words"] == words != found["public_held_out"]["words"]
