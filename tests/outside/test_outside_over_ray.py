"""Components of others over Ray, whose actors see neither their files nor their folder.

One cluster and two actors serve all runs: each actor is handed what every run needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from in_process import Silent
from outside_cases import HANDED, KEYS, NAMED, by_python, by_yaml, write_people
from own_data import CASES, WRITERS, document_of

from fedpriv import experiment
from fedpriv.config_files import load_config
from fedpriv.federation.client_app import client_node
from fedpriv.federation.grids.ray import RayGrid
from fedpriv.federation.handing_over import HandOver
from fedpriv.federation.ray_cluster import cluster, ensure_started
from fedpriv.privacy import Ledger
from fedpriv.reporting.report import render
from fedpriv.runtime import RuntimeConfig

#: Several components a run, each at least once.
TOGETHER = (
    ("png_folders", "groupnorm_cnn", "soft_clipping", "running_scale"),
    ("timm", "own_mechanism"),
    ("hf_vit", "second_payload"),
    ("wav2vec2",),
    ("brightness",),
    ("letters",),
)


@dataclass(frozen=True)
class AcceptingAll:
    """Makes a node of a process that first accepts what all runs need."""

    handed: Sequence[HandOver]

    def __call__(self, partition: int, partitions: int) -> Any:
        for each in self.handed:
            each.accept()
        return client_node(partition, partitions)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each run prepared, by way and cases, and the grid that they are all trained over."""
    prepared, handed = {}, []
    with pytest.MonkeyPatch.context() as patched:
        for way, make in {"yaml": by_yaml, "python": by_python}.items():
            for cases in TOGETHER:
                folder = tmp_path_factory.mktemp(f"{way}-{cases[0]}")
                patched.chdir(folder)
                patched.syspath_prepend(str(folder))
                write_people(folder / "people")
                config = make(folder, cases, run_dir=str(folder / "run"))
                handed.append(HandOver.of(config))
                prepared[way, cases] = experiment.prepare(config)
        for case in CASES:
            folder = tmp_path_factory.mktemp("own")
            patched.chdir(folder)
            WRITERS[case](folder / "data")
            document = {**document_of(case), "runtime": {"workers": 2}}
            document["run_dir"] = str(folder / "run")
            (folder / "mine.yaml").write_text(yaml.safe_dump(document))
            config = load_config(folder / "mine.yaml")
            handed.append(HandOver.of(config))
            prepared["own", case] = experiment.prepare(config)
        runtime = RuntimeConfig(workers=2)
        with cluster(runtime):
            ensure_started(runtime)
            yield prepared, RayGrid(runtime, AcceptingAll(handed))


def test_each_is_among_them():
    everything = {case for cases in TOGETHER for case in cases}
    assert everything >= NAMED.keys() - {"root", "signed"}  # two simpler ones of their kinds
    assert everything <= HANDED.keys()


@pytest.mark.parametrize("way", ["yaml", "python"])
@pytest.mark.parametrize("cases", TOGETHER, ids="-".join)
def test_they_are_trained_over_ray_and_named(runs, way, cases, tmp_path):
    prepared, grid = runs
    directory = experiment.create(prepared[way, cases])
    experiment.train(
        prepared[way, cases], directory, Silent(), lambda strategy: strategy.start(grid)
    )
    assert [row["nodes_lost"] for row in directory.read_metrics()] == [0, 0]
    found = directory.environment()["outside"]
    assert sorted(found) == sorted(key for case in cases for key in KEYS[case])
    text = render([directory.path], "md")
    ledger = Ledger.open(directory.ledger)
    for named in found.values():
        assert named["name"] in text
        assert named["name"] in str(ledger.header.outside)


@pytest.mark.parametrize("case", CASES)
def test_data_of_ones_own_are_read_by_the_actors(runs, case):
    prepared, grid = runs
    own = prepared["own", case]
    directory = experiment.create(own)
    experiment.train(own, directory, Silent(), lambda strategy: strategy.start(grid))
    rows = directory.read_metrics()
    assert [row["nodes_lost"] for row in rows] == [0, 0]
    assert all(row["simulation_only"]["examples"] > 0 for row in rows)
