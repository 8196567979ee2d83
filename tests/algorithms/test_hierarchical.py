"""Edges with models of their own against their paper's equations, and what their release costs."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_process import (
    SILOS,
    SMALL,
    BreaksIn,
    InProcessGrid,
    resume_small,
    small_config,
    train_small,
)
from scipy.linalg import toeplitz
from torch import nn

import fedpriv
from fedpriv.algorithms.hierarchical import Hierarchical
from fedpriv.errors import InputError
from fedpriv.experiment import prepare
from fedpriv.federation.builders import build_trainer
from fedpriv.models.parameters import Layout, parameters_of
from fedpriv.models.registry import build_model
from fedpriv.privacy import Ledger, Purpose, Randomness
from fedpriv.privacy.randomness import id_words
from fedpriv.reporting.plots import noise_norms
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.report import render
from fedpriv.training.cohort import train_cohort
from fedpriv.training.local import batches

ROOT = Path(__file__).parents[2]
LR, COHORT, SIGMA = 0.2, 8, 0.1
SGD = {"optimizer": "sgd", "lr": 0.7}
PLAIN = {
    "local": {"steps": 3, "batch_size": 2, "lr": LR},
    "server": SGD,
    "privacy": None,
    "cohort": float(COHORT),
}


def named(edges=2, edge_rounds=1):
    return {"name": "hierarchical", "edges": edges, "edge_rounds": edge_rounds}


def edge(user, edges):
    digest = hashlib.sha256(f"edge/user-{user}".encode()).digest()
    return int.from_bytes(digest) % edges


def parameters(prepared):
    return prepared.server.parameters().double()


def edge_models(prepared):
    return parameters(prepared) + prepared.server.shared.double()


def gradients(prepared, user, round_):
    """The gradient of each local step of a user, as a function of where it is."""
    config, dataset = prepared.config, prepared.trainer.dataset
    model = build_model(config.model, dataset.input_shape, dataset.classes, config.seed).double()
    layout, source, examples = Layout.of(model), Randomness.simulation(5), dataset.user(user)
    own = source.torch(Purpose.LOCAL_TRAINING, round_, 0, *id_words(f"user-{user}"))
    shared = source.torch(Purpose.STEP_ORDER, round_)
    for index in batches(examples.sizes, prepared.trainer.recipe, own, shared):

        def gradient(y, index=index):
            y = y.detach().requires_grad_()
            inputs = examples.inputs[index].double()
            outputs = torch.func.functional_call(model, layout.split(y), inputs)
            return torch.autograd.grad(F.cross_entropy(outputs, examples.targets[index]), y)[0]

        yield gradient


def by_the_paper(prepared, rounds, edges, edge_rounds):
    """Every user alone, in float64, from the same cohorts and batches."""
    start = prepare(prepared.config)
    w = [parameters(start)] * edges
    for round_ in range(1, rounds + 1):
        generator = prepared.plan.randomness.numpy(Purpose.SAMPLING, round_, 0)
        moved = [torch.zeros_like(w[0]) for _ in range(edges)]
        for user in prepared.plan.sampling.draw(generator).tolist():
            own = edge(user, edges)
            y = w[own].clone()
            for gradient in gradients(prepared, user, round_):
                y = y - LR * gradient(y)
            moved[own] += w[own] - y
        rate = 0.7 * 0.5 ** (round_ - 1)
        w = [w[e] - rate * moved[e] / (COHORT / edges) for e in range(edges)]
        if round_ % edge_rounds == 0:
            w = [sum(w) / edges] * edges
    return torch.stack(w)


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
@pytest.mark.parametrize(("edges", "edge_rounds"), [(2, 1), (2, 2), (3, 2)])
def test_rounds_are_those_of_the_paper(tmp_path, engine, edges, edge_rounds):
    changes = {**PLAIN, "rounds": 3, "algorithm": named(edges, edge_rounds)}
    changes["server__schedule"] = {"kind": "exponential", "factor": 0.5}
    _, prepared = train_small(tmp_path / "run", **changes, runtime__engine=engine)
    expected = by_the_paper(prepared, 3, edges, edge_rounds)
    torch.testing.assert_close(edge_models(prepared), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parameters(prepared), expected.mean(0), rtol=1e-6, atol=1e-6)
    apart = (expected - expected.mean(0)).norm()
    assert (apart > 0.01) == (edge_rounds == 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy__clipping": {"kind": "adaptive", "bound": 0.1}},
        {"privacy__error_feedback": "user", "local__lr": 0.3},
        {"privacy__error_feedback": "dice", "local__lr": 0.3},
        {"local__proximal_mu": 0.5},
    ],
    ids=str,
)
def test_without_noise_edges_that_never_go_on_alone_are_fedavg(tmp_path, changes):
    changes = {
        "server": SGD,
        "privacy__noise_multiplier": 0.0,
        "privacy__sampling": {"kind": "all"},
        **changes,
    }
    ends = [
        train_small(tmp_path / str(n), **changes, algorithm=algorithm)[1]
        for n, algorithm in enumerate([{"name": "fedavg"}, named(3)])
    ]
    torch.testing.assert_close(*map(parameters, ends), rtol=0, atol=1e-6)
    start = parameters(prepare(ends[0].config))
    assert (parameters(ends[0]) - start).norm() > 0.01


def test_a_user_who_keeps_what_was_cut_off_sends_to_its_own_edge(tmp_path):
    """Where nothing is cut off it sends what it would send without a memory."""
    ends = []
    for kind in ("none", "user"):
        changes = {
            "server": SGD,
            "rounds": 2,
            "privacy__noise_multiplier": 0.0,
            "privacy__sampling": {"kind": "all"},
            "privacy__clipping": {"kind": "global", "bound": 100.0},
            "privacy__error_feedback": kind,
        }
        ends.append(edge_models(train_small(tmp_path / kind, **changes, algorithm=named(3, 3))[1]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
    assert (ends[0] - ends[0].mean(0)).norm() > 0.01


def test_a_model_that_vmap_runs_starts_from_its_edge_too():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(1, 1, 8, 8))
    trainer = build_trainer(
        small_config(**{**PLAIN, "model": model, "algorithm": named(2, 2), "server": SGD})
    )
    assert trainer.vmapped is not None
    start = _started(trainer, 2)
    found = train_cohort(trainer, start, range(40), 1)
    alone = train_cohort(dataclasses.replace(trainer, engine="sequential"), start, range(40), 1)
    torch.testing.assert_close(found.total, alone.total, rtol=1e-4, atol=1e-5)
    assert found.alone == 0


def _started(trainer, edges):
    """A model, and edges that are apart."""
    model = Layout.of(trainer.model).join(parameters_of(trainer.model))
    apart = 0.1 * torch.randn(edges, len(model), generator=torch.Generator().manual_seed(0))
    return torch.cat([model, apart.flatten()])


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("engine", ["stacked", "sequential"])
def test_one_user_moves_the_sum_of_its_own_edge_alone_by_the_bound_at_most(engine):
    changes = {"algorithm": named(3, 2), "server": SGD, "runtime__engine": engine}
    trainer = build_trainer(small_config(**changes, privacy__clipping__bound=0.01))
    start, size = _started(trainer, 3), Layout.of(trainer.model).total
    everybody = list(range(20))
    whole = train_cohort(trainer, start, everybody, 1).total.view(3, size)
    for user in everybody:
        others = [each for each in everybody if each != user]
        less = train_cohort(trainer, start, others, 1).total.view(3, size)
        moved = (whole - less).norm(dim=1)
        assert 0.0099 < moved[edge(user, 3)] <= 0.01 * (1 + 1e-6)
        others = [e for e in range(3) if e != edge(user, 3)]
        assert moved[others].max() < 1e-12
    assert {edge(user, 3) for user in everybody} == {0, 1, 2}
    # Replaced by a user of another edge, it moves two sums.
    one, other = 0, next(user for user in everybody if edge(user, 3) != edge(0, 3))
    pair = [train_cohort(trainer, start, [user], 1).total for user in (one, other)]
    assert 0.0099 * 2**0.5 < (pair[0] - pair[1]).norm() <= 0.01 * 2**0.5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy__noise": "per_block"},
        {"privacy__clipping": {"kind": "adaptive", "bound": 0.1}},
        {"privacy__sampling": {"kind": "fixed_size", "expected_cohort": COHORT}},
        {"privacy__sampling": {"kind": "random_allocation", "rounds": 4}},
        {"privacy__error_feedback": "user"},
        {"privacy__noise_by": "nodes"},
        {"privacy__mechanism": {"kind": "correlated", "bands": 2}},
    ],
    ids=str,
)
def test_a_run_costs_what_a_run_of_fedavg_costs(tmp_path, changes):
    changes = {**changes, "server": SGD}
    directory, prepared = train_small(tmp_path / "run", **changes, algorithm=named(2, 3))
    plain, flat = train_small(tmp_path / "flat", **changes)
    assert prepared.plan.planned_cost() == flat.plan.planned_cost()
    releases, of_flat = list(Ledger.open(directory.ledger)), list(Ledger.open(plain.ledger))
    assert [one.event() for one in releases] == [one.event() for one in of_flat]
    assert len(releases) == 4
    assert all(one.payloads is None for one in releases)
    said = "in one of 2 edges, by a public hash of its id"
    assert said in render([directory.path], "md")
    assert said not in render([plain.path], "md")


#: Next to nothing is learnt, and models move by the noise alone.
NOISE_ALONE = {"local__lr": 1e-6, "server": {"optimizer": "sgd", "lr": 1.0}, "rounds": 2}


def standard(prepared, purpose, *path, edges):
    """A draw for all edges, by the formula alone."""
    generator = prepared.plan.randomness.numpy(purpose, *path)
    return torch.from_numpy(generator.standard_normal((edges, prepared.plan.layout.total)))


def moved_by_noise(folder, edges, **changes):
    _, prepared = train_small(folder, **{**NOISE_ALONE, **changes, "algorithm": named(edges, 3)})
    return prepared, parameters(prepare(prepared.config)) - edge_models(prepared)


@pytest.mark.parametrize("edges", [2, 4])
def test_each_edge_has_all_of_the_noise_over_its_own_part_of_the_cohort(tmp_path, edges):
    prepared, moved = moved_by_noise(tmp_path / "run", edges)
    rounds = [standard(prepared, Purpose.NOISE, r, 0, edges=edges) for r in (1, 2)]
    expected = edges * SIGMA * sum(rounds) / COHORT
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4)
    # Against the noise of one flat round's average: E times in an edge, √E in the mean of edges.
    flat = SIGMA / COHORT * 2**0.5
    assert float(moved.std()) == pytest.approx(edges * flat, rel=0.1)
    assert float(moved.mean(0).std()) == pytest.approx(edges**0.5 * flat, rel=0.1)
    apart = (edges * (edges - 1)) ** 0.5 * flat
    assert float((moved - moved.mean(0)).std()) == pytest.approx(apart, rel=0.1)


def test_noise_per_block_is_that_of_each_edges_blocks(tmp_path):
    prepared, moved = moved_by_noise(tmp_path / "run", 2, privacy__noise="per_block")
    sizes = prepared.plan.layout.sizes
    bounds = [0.1 * (size / sum(sizes)) ** 0.5 for size in sizes]  # split: dim
    stddevs = [bound * len(sizes) ** 0.5 for bound in bounds]  # z·√H·C_h
    each = torch.cat([torch.full((n,), s).double() for n, s in zip(sizes, stddevs, strict=True)])
    rounds = [standard(prepared, Purpose.NOISE, r, 0, edges=2) for r in (1, 2)]
    torch.testing.assert_close(moved, 2 * each * sum(rounds) / COHORT, rtol=1e-3, atol=1e-4)


def test_nodes_add_their_shares_to_the_sums_of_all_edges(tmp_path):
    prepared, moved = moved_by_noise(tmp_path / "run", 2, privacy__noise_by="nodes")
    shares = [
        standard(prepared, Purpose.NOISE_SHARE, round_, 0, node, edges=2) / 2**0.5
        for round_ in (1, 2)
        for node in (0, 1)
    ]
    torch.testing.assert_close(moved, 2 * SIGMA * sum(shares) / COHORT, rtol=1e-3, atol=1e-4)


def test_correlated_noise_runs_on_for_each_edge(tmp_path):
    correlated = {"privacy__mechanism": {"kind": "correlated", "bands": 2}}
    prepared, moved = moved_by_noise(tmp_path / "run", 2, **correlated)
    column = np.array([1, 1 / 2]) / np.linalg.norm([1, 1 / 2])
    inverse = np.linalg.inv(toeplitz(column, [column[0], 0])).sum(0)
    rounds = [standard(prepared, Purpose.NOISE, r, 0, edges=2) for r in (1, 2)]
    noise = sum(float(w) * z for w, z in zip(inverse, rounds, strict=True))
    torch.testing.assert_close(moved, 2 * SIGMA * noise / COHORT, rtol=1e-3, atol=1e-4)


def test_what_is_recorded_of_the_noise_is_that_of_the_mean_of_edges(tmp_path):
    changes = {**NOISE_ALONE, "rounds": 1}
    plain, _ = train_small(tmp_path / "flat", **changes)
    directory, _ = train_small(tmp_path / "run", **changes, algorithm=named(4))
    (row,), (flat,) = directory.read_metrics(), plain.read_metrics()
    for name, norm in flat["noise_block_norms"].items():
        assert row["noise_block_norms"][name] == pytest.approx(2 * norm)
    # Users have sent next to nothing: what was released is the noise.
    expected = np.linalg.norm(list(row["noise_block_norms"].values()))
    assert row["aggregate_norm"] == pytest.approx(expected, rel=0.1)
    assert noise_norms(read_run(directory.path)) == [pytest.approx(expected)]


# ---------------------------------------------------------------- runs


def test_a_run_that_is_resumed_between_two_averages_goes_on_with_every_edge(tmp_path):
    settings = {"server": SGD, "algorithm": named(2, 3), "rounds": 4}
    whole, prepared = train_small(tmp_path / "whole", **settings)
    assert prepared.server.shared.norm() > 0

    with pytest.raises(RuntimeError, match="crash"):
        train_small(tmp_path / "other", BreaksIn(3), **settings)
    _, resumed = resume_small(tmp_path / "other")
    assert parameters(resumed).equal(parameters(prepared))
    assert resumed.server.shared.equal(prepared.server.shared)
    assert list(Ledger.open(tmp_path / "other" / "ledger.jsonl")) == list(Ledger.open(whole.ledger))


def test_over_ray_it_is_the_run_in_this_process_to_the_bit(tmp_path):
    settings = {**SMALL, "server": SGD, "algorithm": named(2, 2), "rounds": 3}
    runs = [
        fedpriv.Experiment(**settings).train(grid=grid, run_dir=tmp_path / grid, progress=False)
        for grid in ("local", "ray")
    ]
    one, other = (Ledger.open(run.path / "ledger.jsonl") for run in runs)
    assert [each.digest for each in one] == [each.digest for each in other]


def test_a_deployments_nodes_find_the_edges_of_their_users(tmp_path):
    deployed = {"runtime__deployment": True, "data__users": 60, "server": SGD}
    grid = InProcessGrid(2)
    directory, prepared = train_small(tmp_path / "run", grid, **deployed, algorithm=named(2, 3))
    assert len(Ledger.open(directory.ledger)) == 4
    assert prepared.server.shared.norm() > 0


def test_a_config_of_ours_trains_so_by_its_config_alone(tmp_path):
    loaded = fedpriv.Experiment.load(
        ROOT / "configs" / "vit_digits.yaml",
        {
            "algorithm": named(2, 2),
            "server": {"optimizer": "sgd", "lr": 1.0},
            "runtime.grid": "local",
            "evaluation.every": 3,
        },
        rounds=3,
    )
    run = loaded.train(run_dir=tmp_path / "run", progress=False)
    assert len(run.metrics) == 3
    assert run.epsilon("pld") <= 8.0


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"server": {"optimizer": "adam"}}, r"server\.optimizer other than sgd"),
        ({"server__options": {"momentum": 0.9}}, r"server\.optimizer other than sgd without"),
        ({"server__normalize": "scale"}, r"server\.normalize"),
        (SILOS, r"privacy\.unit: example: silos"),
        ({"privacy__noise_by": "users"}, r"privacy\.noise_by: users"),
        (
            {
                "privacy__clipping": {"kind": "global", "bound": 0.1, "undo": True},
                "local__layer_decay": 0.5,
            },
            r"privacy\.clipping\.undo",
        ),
        ({"algorithm": named(1)}, r"algorithm\.edges"),
        ({"algorithm": named(2, 0)}, r"algorithm\.edge_rounds"),
        ({"algorithm": {"name": "hierarchical"}}, r"algorithm\.edges"),
        ({"algorithm": named() | {"bounds": {"edge": 1.0}}}, r"algorithm\.bounds"),
    ],
    ids=str,
)
def test_what_has_no_meaning_or_no_proof_is_refused(changes, reason):
    with pytest.raises(InputError, match=reason):
        build_trainer(small_config(**{"algorithm": named(), "server": SGD} | changes))


class Mine(Hierarchical):
    """One from outside."""


def test_slots_of_an_algorithm_from_outside_are_refused():
    with pytest.raises(InputError, match=r"sums its users in 2 slots"):
        small_config(algorithm={"name": Mine, "edges": 2}, server=SGD)
