"""`fedpriv methods`: complete, because it reads the registries, and with a source for each."""

import json

import pytest
from typer.testing import CliRunner

from fedpriv.algorithms.registry import ALGORITHMS
from fedpriv.cli import app
from fedpriv.components import KINDS
from fedpriv.errors import InputError
from fedpriv.optimizers.normalize import NORMALIZERS
from fedpriv.optimizers.registry import UNSUITABLE, available_optimizers
from fedpriv.reporting.methods import OURS, methods


def test_every_component_of_every_kind_is_there_with_its_source():
    found = {(method.key, method.name): method for method in methods()}
    for key, kind in KINDS.items():
        for name in kind.registered:
            assert found[key, name].reference
            assert found[key, name].says
    assert {name for key, name in found if key == "server.optimizer"} == set(available_optimizers())
    for kind in (ALGORITHMS, NORMALIZERS):
        for name in set(kind.registered) - {"layer_norm_l2"}:
            assert found[kind.key, name].reference != OURS
    assert found["algorithm", "fedavg_m"].options == {"beta": "0.1"}
    assert found["algorithm", "fednova"].options == {"effective_steps": "needed"}
    assert found["privacy.clipping", "global"].options["undo"] == "False"


def test_refusals_are_those_of_the_code():
    refused = {method.name: method.refused for method in methods("optimizer", refusals=True)}
    assert refused == UNSUITABLE
    for method in methods("algorithm", refusals=True):
        with pytest.raises(InputError, match=f"{method.name} is refused: "):
            ALGORITHMS.find(method.name)


def test_a_kind_that_is_none_is_told():
    with pytest.raises(InputError, match=r"no kind 'algorithms'; there are algorithm, "):
        methods("algorithms")


def test_the_command_prints_one_document():
    made = CliRunner().invoke(app, ["methods", "algorithm", "--format", "json"])
    assert {each["name"] for each in json.loads(made.stdout)} == set(ALGORITHMS.registered)
    text = CliRunner().invoke(app, ["methods", "normalize"]).stdout
    assert "scale  (SCALE (Glentis et al. 2025))  momentum=0.9" in text
