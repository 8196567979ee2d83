"""Every pair of settings of `fedpriv methods --pairs` trains, or is refused as the page says."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployed import COUNTS, Deployed, three_nodes, trained
from in_process import Silent, drive_on
from writers import by_writers, write_writers

from fedpriv import experiment
from fedpriv.config_files import parse_config
from fedpriv.errors import InputError
from fedpriv.privacy.ledger import Header, Release, read_ledger
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.refusals import Pair, pairs
from fedpriv.reporting.report import render
from fedpriv.reporting.spent import spent

PAIRS = pairs()
ALLOWED = [pair for pair in PAIRS if pair.reason is None]
REFUSED = [pair for pair in PAIRS if pair.reason is not None]
PAGE = Path(__file__).parents[2] / "docs" / "refusals.md"

#: What stands in the ledger of whoever bears on a release, read from its header and last line.
LEDGER: dict[str, Callable[[Header, Release], bool]] = {
    "algorithm: scaffold": lambda header, last: len(last.payloads or ()) == 2,
    "algorithm: scaffold_m": lambda header, last: len(last.payloads or ()) == 2,
    "clipping: adaptive": lambda header, last: last.counts > 0,
    "sampling: fixed_size": lambda header, last: last.sampling == "fixed_size",
    "sampling: all": lambda header, last: last.sampling == "all",
    "sampling: random_allocation": lambda header, last: last.sampling == "random_allocation",
    "mechanism: correlated": lambda header, last: (
        header.mechanism == "correlated" and last.bands == 2 and last.group == 1
    ),
    "noise_by: nodes": lambda header, last: header.noise_by == "nodes",
    "noise_by: users": lambda header, last: header.noise_by == "users",
    "unit: example": lambda header, last: header.unit == "example",
    "deployment: true": lambda header, last: header.mode == "deployment",
}
#: What its statement says, whatever else there is; of what costs nothing, the settings above it.
SAID = {
    "algorithm: fedavg_m": "| `algorithm.name` | fedavg_m |",
    "algorithm: scaffold": "SCAFFOLD (Karimireddy et al. 2020): each user sends more",
    "algorithm: scaffold_m": "SCAFFOLD-M (Cheng et al. 2024): each user sends more",
    "algorithm: fedspeed": "FedSpeed (Sun et al. 2023): what a user keeps",
    "algorithm: fednova": "| `algorithm.name` | fednova |",
    "algorithm: hidenseek": "| `algorithm.name` | hidenseek |",
    "algorithm: hierarchical": "HierFAVG (Liu et al. 2020): each user is in one of 2 edges",
    "algorithm: ofvl_ms": "After OFVL-MS (Xie et al. 2023): each user is in one of 3 tasks",
    "clipping: per_layer": "blocks clipped to its share of C",
    "clipping: adaptive": "quantile of the norms (Andrew et al. 2021)",
    "sampling: fixed_size": "exactly 8 of",
    "sampling: all": "| `privacy.sampling.kind` | all |",
    "sampling: random_allocation": "Random allocation (balls in bins",
    "mechanism: correlated": "Gaussian noise that is correlated over the rounds (2 bands",
    "noise_by: nodes": "Trust model: distributed noise.",
    "noise_by: users": "Trust model: local.",
    "error_feedback: user": "Error feedback: each user keeps what clipping cut off",
    "unit: example": "| `privacy.unit` | example |",
    "deployment: true": "| `runtime.deployment` | true |",
    "normalize: dp_adam_bc": "| `server.normalize.name` | dp_adam_bc |",
    "local: momentum": "| `local.momentum` | 0.5 |",
    "local: adam": "| `local.optimizer.name` | adam |",
    "local: epochs": "| `local.epochs` | 2 |",
}


def tiny(pair: Pair) -> dict[str, Any]:
    """The pair's config, with a model of a few hundred numbers and two rounds."""
    document = copy.deepcopy(pair.document)
    document["model"] = {"name": "vit", "dim": 4, "depth": 1, "heads": 1, "patch": 4}
    document["server"] = {"optimizer": "sgd", "lr": 1.0} | document.get("server", {})
    document["privacy"]["accountants"] = ["rdp"]
    document["rounds"], document["evaluation"] = 2, {"every": 2}
    document.setdefault("runtime", {})["workers"] = 2
    if "epochs" in document["local"]:
        document["local"]["epochs"] = 2  # one is the default, of which no report says anything
    return document


def named(these: list[Pair]) -> list[Any]:
    return [pytest.param(pair, id=f"{pair.one}, {pair.two}") for pair in these]


def train(document: dict[str, Any], folder: Path) -> Path:
    deployed = document["runtime"].get("deployment", False)
    if deployed and document["privacy"].get("unit") == "example":
        return train_silos(document, folder)
    prepared = experiment.prepare(parse_config(document | {"run_dir": str(folder)}))
    directory = experiment.create(prepared)
    experiment.train(prepared, directory, Silent(), drive_on(None))
    return directory.path


def train_silos(document: dict[str, Any], folder: Path) -> Path:
    """Silos of a deployment are of nodes whose policies let them, and whose own ledgers pay."""
    data = by_writers(write_writers(folder.parent / "server", COUNTS), users=12)
    folders, policy = three_nodes(folder.parent), folder.parent / "policy.yaml"
    policy.write_text(
        "unit: example\nnoise_by: [silos]\nsmallest_z: 1\nlargest_bound: 1\nrounds: 9\n"
    )
    document = document | data | {"run_dir": str(folder)}
    document["runtime"]["workers"] = 3

    class WithPolicies(Deployed):
        def context(self, number):
            context = super().context(number)
            context.node_config["policy"] = str(policy)
            return context

    return trained(parse_config(document), WithPolicies(folders), Silent()).path


@pytest.mark.parametrize("pair", named(ALLOWED))
def test_a_pair_that_is_allowed_trains_and_is_told(pair, tmp_path):
    folder = train(tiny(pair), tmp_path / "run")
    run = read_run(folder)
    assert [row["round"] for row in run.rows][-1] == 2
    ledger = read_ledger(folder / "ledger.jsonl")
    assert [release.round for release in ledger.releases] == [1, 2]
    account = spent(run)
    assert account.disagreements == ()
    assert account.epsilons["rdp"] == pytest.approx(run.rows[-1]["epsilon"]["rdp"], rel=1e-9)
    report = render([folder], "md")
    for setting in (pair.one, pair.two):
        assert SAID[setting] in report
        if setting in LEDGER:
            assert LEDGER[setting](ledger.header, ledger.releases[-1])


@pytest.mark.parametrize("pair", named(REFUSED))
def test_a_pair_that_is_refused_is_refused_with_the_reason_of_the_page(pair, tmp_path):
    with pytest.raises(InputError) as refused:
        train(tiny(pair), tmp_path / "run")
    why = " ".join(str(refused.value).removeprefix("config: ").split())
    row = f"| {pair.one} | {pair.two} | {why.replace('|', '/')} |"
    assert row in PAGE.read_text(encoding="utf-8").splitlines()
    assert not (tmp_path / "run").exists()


def test_what_is_allowed_and_refused_is_all_that_the_page_is_of():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    assert len(rows) == len(REFUSED) + 2  # a head, and a rule under it
    assert {each for pair in ALLOWED for each in (pair.one, pair.two)} == set(SAID)
    assert LEDGER.keys() < SAID.keys()


SEPARATED = [
    pair
    for pair in ALLOWED
    if pair.two == "mechanism: correlated" or pair.one == "mechanism: correlated"
]


@pytest.mark.parametrize("pair", named(SEPARATED))
def test_a_pair_with_correlated_noise_needs_no_trusted_coins(pair, tmp_path):
    """Where it is allowed with coins it is with groups that take part whole."""
    document = tiny(pair)
    document["privacy"]["sampling"] = {"kind": "min_separation", "rounds": 4}
    folder = train(document, tmp_path / "run")
    ledger = read_ledger(folder / "ledger.jsonl")
    assert [(each.sampling, each.group) for each in ledger.releases] == [
        ("min_separation", 0),
        ("min_separation", 1),
    ]
    report = render([folder], "md")
    assert "Nothing is claimed for these coins" in report
    assert all(SAID[setting] in report for setting in (pair.one, pair.two))
