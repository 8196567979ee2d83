import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from fedpriv.optimizers.registry import server_optimizer
from fedpriv.optimizers.schedules import ScheduleConfig, factor, scale_learning_rates


def factors(rounds: int, **settings) -> list[float]:
    schedule = ScheduleConfig(**settings)
    return [factor(schedule, t, rounds) for t in range(1, rounds + 1)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup_rounds": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"kind": "step", "factor": 0.5, "every": 2}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        (
            {"kind": "step", "factor": 0.1, "every": 2, "start_round": 3},
            [1, 1, 1, 1, 0.1, 0.1],
        ),
        ({"kind": "exponential", "factor": 0.5}, [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        (
            {"kind": "exponential", "factor": 0.5, "start_round": 4, "warmup_rounds": 2},
            [0.5, 1, 1, 1, 0.5, 0.25],
        ),
        (
            {"kind": "exponential", "factor": 0.5, "warmup_rounds": 2},
            [0.5, 0.5, 0.25, 0.125, 0.0625, 0.03125],
        ),
        ({"kind": "linear"}, [1, 0.8, 0.6, 0.4, 0.2, 0]),
        ({"kind": "linear", "final_factor": 0.5}, [1, 0.9, 0.8, 0.7, 0.6, 0.5]),
        ({"kind": "linear", "warmup_rounds": 2}, [0.5, 1, 0.75, 0.5, 0.25, 0]),
        ({"kind": "linear", "start_round": 5}, [1, 1, 1, 1, 1, 0]),
        ({"kind": "linear", "start_round": 9}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_written_out_numbers(settings, expected):
    assert factors(6, **settings) == pytest.approx(expected, abs=1e-12)


def test_a_run_of_one_round():
    assert factors(1, kind="linear") == [1]
    assert factors(1, warmup_rounds=10) == [0.1]


@given(
    kind=st.sampled_from(["constant", "step", "exponential", "linear"]),
    warmup=st.integers(0, 20),
    rounds=st.integers(1, 40),
)
def test_factors_lie_in_the_unit_interval_and_fall_after_the_warmup(kind, warmup, rounds):
    own = {
        "step": {"factor": 0.7, "every": 3},
        "exponential": {"factor": 0.9},
    }.get(kind, {})
    values = factors(rounds, kind=kind, warmup_rounds=warmup, **own)
    assert all(0 <= value <= 1 for value in values)
    after = values[warmup:]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cosine"}, "kind"),
        ({"kind": "step", "factor": 0.5}, "every must be set for kind step"),
        ({"kind": "step", "every": 5}, "factor must be set"),
        ({"kind": "exponential"}, "factor must be set"),
        ({"kind": "exponential", "factor": 0.5, "every": 5}, "every has no meaning"),
        ({"factor": 0.5}, "factor has no meaning for kind constant"),
        ({"start_round": 5}, "start_round has no meaning for kind constant"),
        ({"kind": "step", "factor": 0.5, "every": 5, "final_factor": 0.1}, "final_factor has no"),
        ({"kind": "exponential", "factor": 1.5}, "factor"),
        ({"kind": "exponential", "factor": 0}, "factor"),
        ({"kind": "exponential", "factor": float("nan")}, "factor"),
        ({"kind": "linear", "final_factor": -0.1}, "final_factor"),
        ({"kind": "linear", "start_round": 0}, "start_round"),
        ({"warmup_rounds": -1}, "warmup_rounds"),
        ({"warmup": 1}, "warmup"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**settings)


@pytest.mark.parametrize("round_", [0, 7])
def test_rounds_outside_the_run(round_):
    with pytest.raises(ValueError, match=f"round {round_} is not one of 1 to 6"):
        factor(ScheduleConfig(), round_, 6)


def test_scaling_keeps_each_groups_own_rate():
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    optimizer = server_optimizer("muon", parameters, 0.02, {"adamw_lr": 0.004})
    for by in (0.5, 0.25):
        scale_learning_rates(optimizer, by)
        assert [group["lr"] for group in optimizer.param_groups] == [0.02 * by, 0.004 * by]


def test_every_field_is_described():
    assert all(field.description for field in ScheduleConfig.model_fields.values())
