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


def test_an_optimizer_may_differentiate_in_its_step():
    prepared = experiment.prepare(
        small_config(server={"optimizer": f"{FAILING}:Differentiating", "lr": 0.1})
    )
    assert prepared.server.parameters().isfinite().all()


@pytest.mark.parametrize("algorithm", ["fedavg", "hidenseek"])
def test_an_optimizer_that_leaves_no_numbers_costs_nothing(algorithm):
    config = small_config(
        server={"optimizer": f"{FAILING}:Undefined", "lr": 0.1}, algorithm={"name": algorithm}
    )
    with pytest.raises(InputError, match="numbers in the model that are not finite"):
        experiment.prepare(config)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("none", r"failing_steps:Begins fails to begin: 'NoneType'"),
        ("fails", r"failing_steps:Begins fails to begin: .*boom"),
        ("array", r"failing_steps:Begins fails to begin: 'numpy\.ndarray'"),
        ("undefined", r"failing_steps:Begins makes .* be finite"),
        ("flat", r"failing_steps:Begins makes \[1\] of a block \[.*\] .* keep its shape"),
    ],
)
def test_an_algorithm_that_cannot_begin_costs_nothing(how, why):
    with pytest.raises(InputError, match=why):
        experiment.prepare(small_config(algorithm={"name": f"{FAILING}:Begins", "how": how}))


def test_a_run_is_named_by_what_an_algorithm_from_outside_begins_with(monkeypatch):
    """Two runs that begin with other numbers must not share noise."""
    config = small_config(algorithm={"name": f"{FAILING}:Begins", "how": "shifted"})
    one, again = experiment.prepare(config), experiment.prepare(config)
    assert one.config.model.start_sha256 is not None
    assert one.plan.fingerprint == again.plan.fingerprint
    import failing_steps

    monkeypatch.setattr(failing_steps.Begins, "begun", lambda self, block: block + 0.02)
    other = experiment.prepare(config)
    assert other.plan.fingerprint != one.plan.fingerprint


def test_signs_from_outside_are_trained_by_plain_steps_alone():
    named = {"name": f"{FAILING}:OnlySigns"}
    assert experiment.prepare(small_config(algorithm=named)).trainer.recipe.optimizer.kept == 1
    with pytest.raises(InputError, match=r"local\.optimizer or local\.momentum: .* leave both out"):
        experiment.prepare(small_config(algorithm=named, local__optimizer="adam"))
