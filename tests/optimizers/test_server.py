import pytest
import torch
from torch import nn

from fedpriv.errors import InputError
from fedpriv.optimizers.normalize import NORMALIZERS
from fedpriv.optimizers.registry import available_optimizers
from fedpriv.optimizers.schedules import ScheduleConfig
from fedpriv.optimizers.server import Server


def new_server(optimizer="adam", lr=0.05, normalize=None, schedule=None, width=6) -> Server:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4))
    return Server(model, optimizer, lr, {}, schedule or ScheduleConfig(), normalize, rounds=10)


def average(server: Server, round_: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(round_)
    return torch.randn(server.layout.total, generator=generator, dtype=torch.float64)


def test_sgd_subtracts_the_averaged_update():
    server = new_server("sgd", lr=0.5)
    before = server.parameters()
    update = average(server, 1)
    server.step(update, 1, seed=0)
    torch.testing.assert_close(server.parameters(), before - 0.5 * update.float())


def test_the_schedule_and_the_normalizer_are_applied():
    schedule = ScheduleConfig(kind="step", factor=0.1, every=1, start_round=1)
    unit = NORMALIZERS.parse("layer_norm_l2")
    server = new_server("sgd", lr=1.0, normalize=unit, schedule=schedule)
    for round_ in (1, 2, 3):
        before = server.parameters()
        server.step(average(server, round_), round_, seed=0)
        moved = server.layout.split(before - server.parameters())
        for block in moved.values():
            assert float(block.norm()) == pytest.approx(server.lr(round_), rel=1e-4)
    assert server.lr(3) < server.lr(1)


def test_the_average_is_left_as_it_was():
    for name in ("adam", "lamb", "ranger", "adalite"):
        server = new_server(name)
        update = average(server, 1)
        kept = update.clone()
        server.step(update, 1, seed=0)
        assert update.equal(kept), name


@pytest.mark.parametrize("name", available_optimizers())
def test_every_optimizer_continues_bit_for_bit_from_its_state(name):
    whole, first = new_server(name, 0.01), new_server(name, 0.01)
    for server, rounds in ((whole, range(1, 5)), (first, range(1, 3))):
        for round_ in rounds:
            server.step(average(server, round_), round_, seed=round_)
    second = new_server(name, 0.01)
    second.load_state(first.state())
    for round_ in (3, 4):
        second.step(average(second, round_), round_, seed=round_)
    assert second.parameters().equal(whole.parameters())


def test_the_state_of_another_model_or_optimizer_is_refused():
    with pytest.raises(InputError, match=r"does not fit the (model|optimizer)"):
        new_server(width=5).load_state(new_server(width=6).state())
    incomplete = {k: v for k, v in new_server().state().items() if k != "optimizer"}
    with pytest.raises(InputError, match="does not fit the optimizer"):
        new_server().load_state(incomplete)


def test_a_step_leaves_the_global_generator_alone():
    server = new_server("apollo")
    before = torch.get_rng_state()
    server.step(average(server, 1), 1, seed=3)
    assert torch.get_rng_state().equal(before)


def test_a_step_that_leaves_no_numbers_ends_the_run():
    """No round after it could teach the model anything, and each would be paid for."""
    server = new_server("sgd", lr=1e38)
    server.step(torch.full((server.layout.total,), 1e10), 3, seed=0)
    with pytest.raises(InputError, match=r"round 3 left numbers .* not finite; .*server\.lr"):
        server.require_finite(3)
