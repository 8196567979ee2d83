"""What moves the model and comes from outside is tried before a round is paid for."""

from pathlib import Path

import pytest
from in_process import small_config

from fedpriv import experiment
from fedpriv.errors import InputError

FAILING = "failing_steps"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "outside"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("flat", r"server\.normalize: failing_steps:flat must return a dict"),
        ("listed", r"server\.normalize: failing_steps:listed must return a dict"),
        ("undefined", r"not finite; .*server\.normalize"),
        ("Second", r"failing_steps:Second fails: again \(failing_steps\.py, line \d+\)"),
        ("Grows", r"keeps what no checkpoint can hold \(seen is a \w+\)"),
    ],
)
def test_a_normaliser_that_fails_costs_nothing(tmp_path, name, why):
    config = small_config(
        run_dir=str(tmp_path / "run"), server__normalize={"name": f"{FAILING}:{name}"}
    )
    with pytest.raises(InputError, match=why):
        experiment.prepare(config)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_fails_costs_nothing(tmp_path):
    config = small_config(
        run_dir=str(tmp_path / "run"),
        server={"optimizer": f"{FAILING}:Halting", "lr": 0.1},
    )
    with pytest.raises(InputError, match=r"server\.optimizer: .*Halting fails: no step"):
        experiment.prepare(config)
    assert not (tmp_path / "run").exists()


def test_a_lack_of_memory_is_not_the_algorithms_fault(tmp_path):
    with pytest.raises(MemoryError, match="no room for the average"):
        experiment.prepare(small_config(algorithm={"name": f"{FAILING}:Large"}))


def test_an_algorithm_whose_server_fails_costs_nothing(tmp_path):
    config = small_config(run_dir=str(tmp_path / "run"), algorithm={"name": f"{FAILING}:Forgetful"})
    with pytest.raises(InputError, match=r"algorithm: its server must return .*\(1, \d+\)"):
        experiment.prepare(config)
    assert not (tmp_path / "run").exists()
