import pytest
import torch
from in_process import small_config

from fedpriv import experiment
from fedpriv.federation.builders import build_trainer
from fedpriv.training import stack_size
from fedpriv.training.stack_size import measured_stack, planned_stack

MIB = 2**20


@pytest.mark.parametrize(
    ("parameters", "memory", "long_examples", "expected"),
    [
        (2_762, 1024 * MIB, False, 64),  # as many as are ever stacked
        (2_762, 1024 * MIB, True, 12),  # the same, of utterances
        (1_000_000, 1024 * MIB, False, 40),
        (2_684_170, 1024 * MIB, False, 20),
        (5_000_000, 1024 * MIB, False, 20),  # as few as operations' overhead allows
        (5_000_000, 1024 * MIB, True, 8),
        (2_684_170, 50 * MIB, False, 2),  # as memory allows: 8 bytes a parameter
        (256_000_000, 1024 * MIB, True, 1),  # one always
    ],
)
def test_the_rule_weighs_overhead_cache_and_memory(parameters, memory, long_examples, expected):
    assert planned_stack(parameters, memory, long_examples) == expected


@pytest.mark.parametrize(("remembered", "expected"), [(0, 6), (1, 4), (2, 3)])
def test_what_an_optimizer_remembers_takes_as_much_memory_as_gradients(remembered, expected):
    assert planned_stack(2_684_170, 130 * MIB, remembered=remembered) == expected


@pytest.fixture
def timed(monkeypatch):
    """A clock that only training moves: `seconds[stack]` a cohort, as a test says."""
    seconds, now, tried = {}, [0.0], []

    def train_cohort(trainer, start, users, round_):
        assert list(users) == list(range(trainer.stack))
        now[0] += seconds[trainer.stack]
        tried.append(trainer.stack)

    monkeypatch.setattr(stack_size, "train_cohort", train_cohort)
    monkeypatch.setattr(stack_size.time, "perf_counter", lambda: now[0])
    return seconds, tried


def test_the_fastest_stack_is_found_and_clearly_slower_ones_end_the_search(timed):
    seconds, tried = timed
    seconds |= {1: 1.0, 2: 1.2, 4: 1.6, 8: 3.1, 16: 6.4, 32: 20.0}
    trainer = build_trainer(small_config())
    assert measured_stack(trainer, 1024 * MIB) == 8
    assert max(tried) == 32


def test_neither_memory_nor_the_population_is_exceeded(timed):
    seconds, _ = timed
    seconds |= dict.fromkeys((1, 2, 4, 8, 16, 32, 64), 1.0)  # the larger the better
    trainer = build_trainer(small_config())
    assert trainer.dataset.population == 60
    assert measured_stack(trainer, 1024 * MIB) == 32
    parameters = sum(p.numel() for p in trainer.model.parameters())
    assert measured_stack(trainer, 8 * parameters * 5) == 4
    assert measured_stack(trainer, 0) == 1


def test_a_run_writes_down_what_it_measured_and_keeps_it(tmp_path):
    config = small_config(run_dir=str(tmp_path / "run"), runtime__stack="measure")
    prepared = experiment.prepare(config)
    stack = prepared.config.runtime.stack
    assert isinstance(stack, int)
    assert prepared.trainer.stack == stack
    assert experiment.create(prepared).config().runtime.stack == stack
    untouched = experiment.prepare(small_config()).server.parameters()
    assert torch.equal(prepared.server.parameters(), untouched)


def test_where_users_are_not_stacked_nothing_is_tried(timed):
    _, tried = timed
    for changes in ({"runtime__engine": "sequential"}, {"runtime__deployment": True}):
        config = small_config(runtime__stack="measure", **changes)
        assert experiment.prepare(config).config.runtime.stack == 1
    assert tried == []


def test_a_number_that_is_written_is_taken():
    assert build_trainer(small_config(runtime__stack=5)).stack == 5
    assert build_trainer(small_config()).stack == 64
