"""What a run records of single classes."""

import dataclasses

import pytest
from in_process import InProcessGrid, Silent, drive_on, small_config

from fedpriv import experiment
from fedpriv.data.digits import build_digits
from fedpriv.data.facts import DataFacts
from fedpriv.data.options import DealtOptions
from fedpriv.data.registry import DATASETS


@pytest.mark.parametrize(("held_out", "public"), [("unnamed", True), ("same", False)])
def test_single_classes_are_recorded_of_public_data_alone(tmp_path, monkeypatch, held_out, public):
    def build(options: DealtOptions, seed: int):
        """Digits, of whose held-out part another thing is known."""
        return dataclasses.replace(
            build_digits(options, seed), facts=DataFacts(users="dealt", held_out=held_out)
        )

    monkeypatch.setitem(DATASETS.registered, "other", build)
    config = small_config(
        run_dir=str(tmp_path / "run"),
        rounds=1,
        data={"name": "other", "users": 60, "partition": {"kind": "iid"}},
    )
    prepared = experiment.prepare(config)
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, Silent(), drive_on(InProcessGrid()))
    (row,) = directory.read_metrics()
    count = row["held_out"]["examples"]
    assert count == sum(map(len, prepared.held_out))
    assert ("by_class" in row) == public
    if public:
        counted = row["by_class"]
        assert sum(counted["examples"]) == sum(counted["answers"]) == count
        assert sum(counted["right"]) / count == pytest.approx(row["held_out"]["accuracy"])
