"""What the pages for those who come from elsewhere show, run: the other side too."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flower_apps import QUICKSTARTS, node_of
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedpriv
from fedpriv.federation.grids.local import LocalGrid
from fedpriv.privacy import GaussianMechanism, GlobalClipping, PoissonSampling
from fedpriv.privacy.charging import charge
from fedpriv.privacy.ledger import read_ledger
from fedpriv.privacy.sampling import Adjacency, FullParticipation

PAGES = Path(fedpriv.__file__).parents[1] / "docs" / "coming_from"
USERS = 8


def text_of(page: str) -> str:
    return (PAGES / f"{page}.md").read_text(encoding="utf-8")


def blocks_of(page: str, language: str) -> list[str]:
    pattern = re.compile(rf"^( *)```{language}\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
    found = pattern.findall(text_of(page))
    return [textwrap.dedent(code) for _, code in found]


def block_with(page: str, part: str, language: str = "python") -> str:
    (found,) = (block for block in blocks_of(page, language) if part in block)
    return found


def network() -> nn.Module:
    return nn.Linear(4, 2)


def train(message: Message, context: Context) -> Message:
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    with torch.no_grad():
        model.bias += 0.1
    content = RecordDict({"arrays": ArrayRecord(model.state_dict())})
    content["metrics"] = MetricRecord({"num-examples": 1})
    return Message(content, reply_to=message)


def test_the_task_of_a_flower_user_runs_in_flower():
    """With as few nodes and rounds as a test has; the rest is what the page shows."""
    code = block_with("flower", "DifferentialPrivacyClientSideFixedClipping(")
    for number, fewer in {"750": USERS, "375": USERS // 2, "120": 1}.items():
        assert number in code
        code = code.replace(number, str(fewer))
    names: dict[str, Any] = {"network": network}
    exec(code, names)
    names["client"].train()(train)
    grid = LocalGrid(USERS, node_of(names["client"]))
    names["server"](grid, Context(1, 0, {}, RecordDict(), {}))


def test_the_changes_that_are_shown_are_those_of_a_quickstart():
    folder = QUICKSTARTS / "text" / "text_app"
    after = "".join((folder / f"{each}_app.py").read_text() for each in ("client", "server"))
    before = "".join((folder / f"plain_{each}_app.py").read_text() for each in ("client", "server"))
    shown = "".join(blocks_of("flower", "diff")).splitlines()
    added = [line[1:] for line in shown if line.startswith("+")]
    removed = [line[1:] for line in shown if line.startswith("-")]
    assert (len(added), len(removed)) == (14, 2)
    assert [line for line in added if line not in after.splitlines()] == []
    assert [line for line in removed if line not in before.splitlines()] == []


def test_the_costs_that_are_shown_are_those_of_the_accountants():
    """Of 20 rounds with z = 0.8904: Poisson 30 of 100, and a cohort of fixed size."""
    rows = re.findall(
        r"^\| (.+) \| .+ \| ([\d.]+) \| ([\d.]+|none) \|$", text_of("flower"), re.MULTILINE
    )
    shown = {name: numbers for name, *numbers in rows}
    gaussian = GaussianMechanism(0.8904129, GlobalClipping(1.0))
    accounted = {
        "`PrivateStrategy`": PoissonSampling(100, 30),
        "the same with our `PrivacyAccountant`, `zero_out`": FullParticipation(
            100, Adjacency.ZERO_OUT
        ),
        "the same with our `PrivacyAccountant`": FullParticipation(100, Adjacency.REPLACE_ONE),
    }
    for name, sampling in accounted.items():
        cost = charge({sampling.event(gaussian): 20}, sampling.adjacency, [1e-3]).first
        found = [float(number) for number in shown[name]]
        assert found == pytest.approx([cost.epsilon_rdp, cost.epsilon_pld], rel=5e-3)
    flowers = RdpAccountant(
        PrivacyConfig(
            target_delta=1e-3,
            population_size=100,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
        )
    )
    flowers.compose(GaussianPrivacyEvent(0.8904129, 30, 100), 20)
    (by_flower, none) = shown["the same with Flower's `RdpAccountant`"]
    assert float(by_flower) == pytest.approx(flowers.get_epsilon(1e-3), rel=5e-3)
    assert none == "none"


def test_our_accountant_in_flowers_wrapper_runs_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = block_with("flower", "PrivacyAccountant(")
    code = code.replace("=100, delta", f"={USERS}, delta").replace("=30", "=4")
    code = code.replace("fraction_train=0.3", "fraction_train=0.5")
    names: dict[str, Any] = {}
    exec(code.replace("nodes=100", f"nodes={USERS}"), names)
    start = ArrayRecord(network().state_dict())
    names["strategy"].start(LocalGrid(USERS, node_of(train)), start, num_rounds=2)
    assert len(read_ledger(tmp_path / "mine.jsonl").releases) == 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Full backward hook")
def test_the_loop_of_an_opacus_user_runs_and_takes_our_accountant(tmp_path, monkeypatch, capsys):
    from opacus import PrivacyEngine

    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(50, 4), torch.randint(0, 2, (50,)))
    code = block_with("opacus", "make_private(")
    own = block_with("opacus", "LedgerAccountant.in_engine(")
    before, loop = code.split("for epoch in")
    for with_ours in (False, True):
        names = {"PrivacyEngine": PrivacyEngine, "torch": torch, "F": F, "network": network}
        names["loader"] = DataLoader(data, batch_size=10)
        exec(before, names)
        if with_ours:
            exec(own, names)
        exec(f"for epoch in{loop}", names)
    theirs, ours = map(float, capsys.readouterr().out.split())
    assert 0 < ours < theirs
    assert len(read_ledger(tmp_path / "mine.jsonl").releases) == 50
