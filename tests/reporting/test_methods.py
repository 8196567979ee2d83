"""`fedpriv methods`: complete, because it reads the registries, and with a source for each."""

import json

import pytest
import torch
from typer.testing import CliRunner

from fedpriv.algorithms.fedcompass import FedCompass
from fedpriv.algorithms.hierarchical import Hierarchical
from fedpriv.algorithms.registry import ALGORITHMS
from fedpriv.cli import app
from fedpriv.components import KINDS
from fedpriv.errors import InputError
from fedpriv.optimizers.normalize import NORMALIZERS
from fedpriv.optimizers.registry import UNSUITABLE, available_optimizers
from fedpriv.privacy.factorizations import MADE, Workload
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


def test_what_is_kept_is_counted_in_real_states():
    """Against the papers: moments, momenta, controls, directions, rows of noise."""
    found = {(m.key.rpartition(".")[2], m.name): m.memory for m in methods()}
    for name, numbers in {"adam": "2", "lamb": "2", "rmsprop": "1", "muon": "1"}.items():
        assert found["optimizer", name] == f"{numbers} at the server"
    assert found["optimizer", "sgd"] == ""
    # A row and a column of second moments, of 64 times 64.
    assert found["optimizer", "adafactor"] == "0.0312 at the server"
    # Two moments of 16 of 64 rows, and of the projection its seed alone.
    assert found["optimizer", "apollo"] == "0.5 at the server"
    of_apollo = next(each for each in methods() if each.name == "apollo")
    assert (of_apollo.reference, *of_apollo.options) == (
        "Zhu et al. 2024",
        *("betas", "eps", "rank", "scale", "scale_type", "update_proj_gap", "weight_decay"),
    )
    normalizers = {"scale": 1, "root": 1, "dp_adam_bc": 2, "sinkgd": 0, "swan": 0, "lanton": 2}
    for name, numbers in normalizers.items():
        assert found["normalize", name] == (f"{numbers} at the server" if numbers else "")
    assert found["algorithm", "fedavg"] == ""
    assert found["algorithm", "fedavg_m"] == "1 at the server"
    assert found["algorithm", "scaffold"] == "1 at the server, 1 at each user"
    assert found["algorithm", "scaffold_m"] == "2 at the server, 1 at each user"
    assert found["algorithm", "fedspeed"] == "1 at each user"
    assert found["algorithm", "fedcompass"] == "silos at the server"
    assert len(FedCompass((1.0, 2.0, 3.0), 1).shared) == 3
    assert found["algorithm", "hierarchical"] == "edges at the server"
    assert len(Hierarchical(5).shared) == 5
    assert found["algorithm", "hidenseek"] == "1 at the server"
    assert found["algorithm", "ofvl_ms"] == ""


@pytest.mark.parametrize(("name", "rows"), [("square_root", 3), ("bisr", 3), ("blt", 4)])
def test_of_correlated_noise_so_many_rows_are_kept(name, rows):
    stream = MADE[name](4, Workload((1.0,) * 9), 4).stream()
    for _ in range(9):
        stream.row(torch.ones(5, dtype=torch.float64))
    kept = [*getattr(stream, "_past", ()), *getattr(stream, "_buffers", ())]
    assert sum(row.numel() for row in kept) == 5 * rows
