"""The speed benchmark, but for its times: who takes part, what is compared, what it refuses."""

import importlib
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedpriv.config_files import load_config
from fedpriv.experiment import prepare

BENCHMARKS = Path(__file__).parents[2] / "simulations" / "benchmarks"
TINY = ["model.dim=8", "model.depth=1", "model.heads=2", "model.patch=14"]


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("speed")
    for name in ("speed", "contenders", "task", "gate"):
        sys.modules.pop(name, None)


def test_vanilla_flower_and_fedpriv_make_the_same_noise_free_round(speed, tmp_path):
    small = speed.WORKLOADS["vit-small"]
    check = [*small.check, "data.users=4", "runtime.workers=1", *TINY]
    tiny = speed.Workload(small.config, small.line_up, check)
    differences = speed.agree(tiny, tmp_path, speed.Peers(pfl_python=None))
    assert set(differences) == {"fedpriv", "Flower FedAvg"}
    assert max(differences.values()) <= 1e-4


def contender(speed, tmp_path, script):
    line = (sys.executable, "-c", f"from gate import pause\n{script}")
    return speed.Running(speed.Contender("someone", tmp_path, line))


def test_a_contender_is_led_round_by_round(speed, tmp_path):
    with contender(speed, tmp_path, "pause(0); print('noise'); pause(3); pause(3)") as running:
        running.stand_ready()
        with running.turn():
            assert running.round(3) > 0
        with running.turn():
            assert running.round(3) > 0
        running.end()


COUNTING = """
import sys, time
with open(sys.argv[-1], "wb", buffering=0) as file:
    while file.write(b"."):
        time.sleep(0.001)
"""
# Its process counts in a process group of its own, as those of torchrun work.
LEADING = f"""
import subprocess, sys, time
counting = [sys.executable, "-c", {COUNTING!r}, sys.argv[-1]]
counter = subprocess.Popen(counting, start_new_session=True)
time.sleep(0.5); pause(0); time.sleep(0.1); pause(1); pause(1)
counter.kill()
"""


def test_a_contender_whose_turn_it_is_not_does_nothing(speed, tmp_path):
    def counted() -> int:
        time.sleep(0.1)
        return (tmp_path / "n").stat().st_size

    line = (sys.executable, "-c", f"from gate import pause\n{LEADING}", str(tmp_path / "n"))
    with speed.Running(speed.Contender("someone", tmp_path, line)) as running:
        running.stand_ready()
        stood = counted()
        assert counted() == stood
        with running.turn():
            running.round(1)
        assert counted() > stood
        stood = counted()
        assert counted() == stood
        with running.turn():
            running.round(1)
        running.end()


def test_a_round_that_left_users_out_is_no_time(speed, tmp_path):
    with contender(speed, tmp_path, "pause(0); pause(2)") as running:
        running.stand_ready()
        with pytest.raises(Exception, match="someone trained 2 of 3 users"), running.turn():
            running.round(3)


def test_a_contender_that_fails_says_why(speed, tmp_path):
    failing = contender(speed, tmp_path, "raise OSError('no such thing')")
    with failing, pytest.raises(Exception, match=r"someone failed:[\s\S]*no such thing"):
        failing.stand_ready()


def test_other_updates_end_the_benchmark(speed, tmp_path, monkeypatch):
    found = {"one": np.array([1.0, -2.0]), "other": np.array([1.0, -1.9])}
    monkeypatch.setattr(speed, "updates", lambda *_: found)
    one = speed.Contender("one", tmp_path, ())
    workload = speed.Workload(speed.WORKLOADS["vit-small"].config, lambda *_: [one], [])
    with pytest.raises(SystemExit, match=r"updates differ from the first contender's: .*other"):
        speed.agree(workload, tmp_path, speed.Peers(None))


@pytest.mark.parametrize(
    ("update", "reference", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.5, 2.0], [1.0, 2.0], 0.25),
        ([np.nan, 2.0], [1.0, 2.0], np.inf),
        ([0.0, 0.0], [0.0, 0.0], np.inf),
    ],
)
def test_difference_is_in_units_of_the_references_largest_number(
    speed, update, reference, expected
):
    assert speed.difference(np.array(update), np.array(reference)) == pytest.approx(expected)


def test_summaries_are_medians_of_the_kept_rounds(speed):
    seconds = [9.0, 1.0, 4.0, 2.0, 8.0]
    rounds = [
        speed.Round("w", who, place, 100, factor * value, 0 < place < 4, 0.0)
        for who, factor in (("fedpriv", 1), ("Flower FedAvg", 3))
        for place, value in enumerate(seconds)
    ]
    ours, flower = speed.summaries(rounds)
    assert (ours.median, ours.slowest, ours.fastest) == (50.0, 25.0, 100.0)
    assert flower.median == pytest.approx(50 / 3)
    shown = speed.table([ours, flower])
    assert "÷ pfl" not in [column.header for column in shown.columns]
    ratios = next(column for column in shown.columns if column.header == "÷ Flower")
    assert list(ratios.cells) == ["3.00", "1.00"]


def test_without_an_interpreter_pfl_is_left_out(speed, tmp_path):
    config, overrides = speed.WORKLOADS["vit-small"].config, ["data.users=100", *TINY]
    alone = speed.against_peers(config, overrides, tmp_path / "a", speed.Peers(None))
    assert [one.name for one in alone] == ["fedpriv", "Flower FedAvg"]
    with_pfl = speed.against_peers(config, overrides, tmp_path / "b", speed.Peers("python"))
    assert [one.name for one in with_pfl] == ["fedpriv", "Flower FedAvg", "pfl-research"]
    assert with_pfl[2].command[0] == "python"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vit-small", 0.2e6), ("vit-large", 2.7e6), ("lognormal", 0.2e6), ("untuned", 0.46e6)],
)
def test_models_have_the_sizes_that_the_benchmark_names(speed, name, parameters):
    path = speed.WORKLOADS[name].config
    config = load_config(path)
    assert config.name == name == path.stem.replace("_", "-")
    assert prepare(config).plan.layout.total == pytest.approx(parameters, rel=0.03)
    assert config.privacy is not None
    assert speed.cohort_of(config) == 100


@pytest.mark.parametrize(
    "overrides",
    [
        ["local.momentum=0.9"],
        ["local.optimizer=adam"],
        ["local.schedule.kind=linear"],
        ["local.max_grad_norm=1.0"],
        ["local.steps=3"],
        ["server.optimizer=adam"],
        ["server.lr=0.5"],
        ["privacy.sampling.kind=poisson"],
    ],
)
def test_what_peers_could_not_do_alike_is_refused(speed, overrides):
    config = load_config(speed.WORKLOADS["vit-small"].config, overrides)
    with pytest.raises(ValueError):
        importlib.import_module("contenders").task_of(config)
