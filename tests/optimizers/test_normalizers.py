"""Normalisers against their papers' equations, number by number; what they keep is resumed."""

import numpy as np
import pytest
import torch
from in_process import SILOS, BreaksIn, resume_small, small_config, train_small

from fedpriv.errors import InputError
from fedpriv.optimizers.normalize import NORMALIZERS, Normalization
from fedpriv.reporting.reader import read_run
from fedpriv.reporting.settings import beside_defaults
from fedpriv.reporting.spent import spent

SHAPES = {
    "embed": (5, 3),
    "positions.weight": (4, 3),
    "kernel": (4, 2, 3),
    "head": (3, 6),
    "bias": (6,),
}


EACH = ["dp_adam_bc", "lanton", "root", "scale", "sinkgd", "swan"]


def updates(rounds=3):
    generator = torch.Generator().manual_seed(1)
    return [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
        for _ in range(rounds)
    ]


def test_scale_has_columns_of_one_and_momentum_on_the_last_matrix():
    normalize, kept = Normalization(NORMALIZERS.parse({"name": "scale", "momentum": 0.8})), 0.0
    for update in updates():
        found = normalize(update)
        kept = 0.8 * kept + 0.2 * update["head"].numpy()
        for name, block in {**update, "head": torch.as_tensor(kept)}.items():
            theirs = block.numpy().reshape(len(block), -1)
            # The paper's matrices are [inputs, outputs]; weights are stored the other way.
            turned = block.dim() > 1 and name != "positions.weight"
            theirs = theirs.T if turned else theirs
            expected = theirs / np.sqrt((theirs**2).sum(0))
            expected = expected.T if turned else expected
            got = found[name].numpy().reshape(expected.shape)
            np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("iterations", [1, 5])
def test_sinkgd_balances_rows_and_columns_in_turn(iterations):
    normalize = Normalization(NORMALIZERS.parse({"name": "sinkgd", "iterations": iterations}))
    (update,) = updates(1)
    found = normalize(update)
    for name, block in update.items():
        x = (
            block.numpy().reshape(1, -1)
            if block.dim() == 1
            else block.numpy().reshape(len(block), -1)
        )
        m, n = x.shape
        for _ in range(iterations):
            x = np.sqrt(n) * np.diag(1 / np.sqrt((x**2).sum(1))) @ x
            x = np.sqrt(m) * x @ np.diag(1 / np.sqrt((x**2).sum(0)))
        np.testing.assert_allclose(found[name].numpy().reshape(x.shape), x, rtol=1e-6)


def test_swan_normalises_whitens_and_keeps_the_norm():
    (update,) = updates(1)
    found = Normalization(NORMALIZERS.parse("swan"))(update)
    g = update["head"].numpy()
    g = (g - g.mean(1, keepdims=True)) / g.std(1, keepdims=True)
    values, vectors = np.linalg.eigh(g @ g.T)
    white = vectors @ np.diag(values**-0.5) @ vectors.T @ g
    white *= np.linalg.norm(g) / np.linalg.norm(white)
    np.testing.assert_allclose(found["head"].numpy(), white, rtol=1e-6)
    # More rows than columns: the Gram matrix has no inverse, and what is left out are its zeros.
    tall = found["embed"].numpy()
    values = np.linalg.svd(tall, compute_uv=False)
    np.testing.assert_allclose(values, [values[0], values[0], 0], atol=1e-6)


def test_lanton_takes_what_is_huge_and_what_is_empty():
    normalize = Normalization(NORMALIZERS.parse({"name": "lanton", "alpha": 1e-12}))
    for sign in (1, -1):
        blocks = {
            "w": sign * torch.full((3, 4), 1e200, dtype=torch.float64),
            "none": torch.zeros(0, 3),
            "v": torch.ones(4, dtype=torch.float64),
        }
        found = normalize(blocks)
        assert list(found) == list(blocks)
        assert all(block.isfinite().all() for block in found.values())


@pytest.mark.parametrize("name", EACH)
def test_zeros_stay_zeros(name):
    found = Normalization(NORMALIZERS.parse(name))(
        {"w": torch.zeros(3, 4), "b": torch.zeros(4)}, {"w": 0.1, "b": 0.1}
    )
    assert all(block.abs().max() == 0 for block in found.values())


@pytest.mark.parametrize("private", [True, False], ids=["private", "without privacy"])
@pytest.mark.parametrize("name", EACH)
def test_each_trains_by_a_line_of_config(tmp_path, name, private):
    changes = {} if private else {"privacy": None}
    _, prepared = train_small(tmp_path / "run", rounds=2, server__normalize=name, **changes)
    assert prepared.server.parameters().isfinite().all()


@pytest.mark.parametrize("name", EACH)
def test_a_run_with_each_as_it_comes_is_read_again_and_goes_on_to_the_bit(tmp_path, name):
    """The config on the disk has lists where defaults may be tuples."""
    changes = {"rounds": 3, "server__normalize": name}
    _, whole = train_small(tmp_path / "whole", **changes)
    with pytest.raises(RuntimeError, match="crash"):
        train_small(tmp_path / "run", BreaksIn(3), **changes)
    directory, resumed = resume_small(tmp_path / "run")
    assert resumed.server.parameters().equal(whole.server.parameters())
    assert spent(read_run(directory.path)).disagreements == ()
    assert [each.key for each in beside_defaults(directory.config())].count(
        "server.normalize.tables"
    ) == 0


def test_dp_adam_bc_takes_the_noise_out_of_the_second_moment():
    """Tang et al. 2024, number by number: 0.7² of noise, and a floor that one number falls to."""
    normalize = Normalization(
        NORMALIZERS.parse({"name": "dp_adam_bc", "beta2": 0.99, "floor": 0.25})
    )
    floored, m, v = 0, 0.0, 0.0
    for t, update in enumerate(updates(), 1):
        found = normalize(update, dict.fromkeys(SHAPES, 0.7))
        g = update["head"].numpy()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        second = v / (1 - 0.99**t) - 0.7**2
        floored += (second < 0.25).sum()
        expected = m / (1 - 0.9**t) / np.sqrt(np.maximum(second, 0.25))
        np.testing.assert_allclose(found["head"].numpy(), expected, rtol=1e-6)
    assert 0 < floored < 3 * g.size


def test_dp_adam_bc_without_noise_is_adam():
    weights = [torch.nn.Parameter(torch.ones(3, 6, dtype=torch.float64)) for _ in range(2)]
    adam = torch.optim.Adam([weights[0]], lr=0.1, eps=0)
    normalize = Normalization(NORMALIZERS.parse({"name": "dp_adam_bc", "floor": 1e-30}))
    for update in updates():
        weights[0].grad = update["head"].clone()
        adam.step()
        found = normalize({"head": update["head"]}, {"head": 0.0})["head"]
        weights[1].data.sub_(0.1 * found)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-9)


def test_the_noise_that_it_is_told_is_on_the_average(tmp_path, monkeypatch):
    """Per block, in a run: z, the bounds and the cohort of 8 say it."""
    from fedpriv.optimizers.normalizers.dp_adam_bc import DpAdamBc

    told, call = [], DpAdamBc.__call__
    monkeypatch.setattr(
        DpAdamBc, "__call__", lambda self, u, noise: told.append(noise) or call(self, u, noise)
    )
    _, prepared = train_small(
        tmp_path / "run", rounds=1, server__normalize="dp_adam_bc", privacy__noise="per_block"
    )
    gaussian, (noise,) = prepared.plan.mechanism.gaussian, told
    expected = [s / 8 for s in gaussian.block_stddevs(len(prepared.plan.sizes))]
    assert list(noise.values()) == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) > 1


@pytest.mark.parametrize("changes", [SILOS, {"privacy__noise_by": "users"}], ids=["silos", "users"])
def test_noise_of_the_drawn_is_not_known(changes):
    changes = {**changes, "server": {"optimizer": "sgd", "lr": 1.0, "normalize": "dp_adam_bc"}}
    with pytest.raises(InputError, match=r"server\.normalize\.name: dp_adam_bc takes the noise's"):
        small_config(**changes)


def test_root_cuts_outliers_off_and_iterates():
    """He et al. 2025, as in the authors' code, of singular values: the iteration keeps vectors."""
    normalize, m = Normalization(NORMALIZERS.parse("root")), 0.0
    for update in updates():
        found = normalize(update)["embed"].numpy()
        g = update["embed"].numpy()
        m = 0.95 * m + g
        ahead = g + 0.95 * m
        most = np.sort(np.abs(ahead).ravel())[round(0.9 * g.size) - 1]
        left, values, right = np.linalg.svd(np.clip(ahead, -most, most), full_matrices=False)
        values = values / np.sqrt((values**2).sum())
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        expected = 0.2 * np.sqrt(5) * left @ np.diag(values) @ right
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


#: How much each block changes from round to round.
LAYERS = {
    "positions.weight": ((4, 3), 1.0),
    "quiet": ((5, 3), 0.1),
    "loud": ((5, 3), 1.0),
    "kernel": ((4, 2, 3), 0.3),
    "gain": ((6,), 0.2),
    "bias": ((6,), 1.0),
    "head": ((3, 6), 0.2),
}
GROUPS = [["positions.weight", "head"], ["quiet", "loud", "kernel"], ["gain", "bias"]]


def layers(rounds=3):
    """Blocks that are the same in every round, but for noise."""
    generator = np.random.default_rng(2)
    means = {name: generator.standard_normal(shape) for name, (shape, _) in LAYERS.items()}
    return [
        {n: means[n] + noise * generator.standard_normal(s) for n, (s, noise) in LAYERS.items()}
        for _ in range(rounds)
    ]


def lmo_and_dual(name, b, change):
    """Table 1 of the paper; of RMS to RMS, of rows that are outputs."""
    if name in GROUPS[0]:
        return np.sign(b), np.abs(change).sum()
    if name in GROUPS[2]:
        return b / np.sqrt((b**2).mean()), np.sqrt(b.size) * np.sqrt((change**2).sum())
    b, change = b.reshape(len(b), -1), change.reshape(len(b), -1)
    left, _, right = np.linalg.svd(b, full_matrices=False)
    more = np.sqrt(b.shape[0] / b.shape[1])
    return more * left @ right, more * np.linalg.svd(change, compute_uv=False).sum()


def test_lanton_takes_smaller_steps_where_averages_are_noisier():
    """Hao et al. 2025, algorithm 1 with the practical option, against numbers by numpy."""
    options = {"name": "lanton", "alpha": 2.0, "beta1": 0.8, "beta2": 0.6}
    normalize, last = Normalization(NORMALIZERS.parse(options)), None
    b, h = dict.fromkeys(LAYERS, 0.0), dict.fromkeys(LAYERS, 0.0)
    for g in layers():
        found = normalize({name: torch.as_tensor(block) for name, block in g.items()})
        directions = {}
        for name in LAYERS:
            b[name] = 0.8 * b[name] + 0.2 * g[name]
            change = 0 * g[name] if last is None else g[name] - last[name]
            directions[name], dual = lmo_and_dual(name, b[name], change)
            h[name] = 0.6 * h[name] + 0.4 * dual**2
        alphas = {name: 2.0 / np.sqrt(2.0**2 + h[name]) for name in LAYERS}
        for group in GROUPS:
            rates = [np.sqrt(alphas[n] / max(alphas[m] for m in group)) for n in group]
            for name, rate in zip(group, rates, strict=True):
                expected = rate * directions[name].reshape(LAYERS[name][0])
                np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-6, atol=1e-9)
        # The rate of the least noisy is 1.
        quiet, loud = (np.linalg.norm(found[name].numpy(), 2) for name in ("quiet", "loud"))
        assert quiet == pytest.approx(np.sqrt(5 / 3))
        assert loud == pytest.approx(quiet) if last is None else loud < 0.8 * quiet
        last = g


def test_lanton_leaves_directions_of_nothing_out():
    """As momentum of rank 1 has them: its singular values are 1 and zeros."""
    block = torch.outer(torch.arange(1.0, 5.0), torch.ones(3))
    found = Normalization(NORMALIZERS.parse("lanton"))({"hidden": block, "head": torch.ones(1, 1)})
    values = np.linalg.svd(found["hidden"].numpy(), compute_uv=False)
    np.testing.assert_allclose(values, [np.sqrt(4 / 3), 0, 0], atol=1e-6)


@pytest.mark.parametrize("name", ["dp_adam_bc", "lanton", "root", "scale"])
def test_what_they_keep_goes_on_to_the_bit(name):
    first, second = (Normalization(NORMALIZERS.parse(name)) for _ in range(2))
    noise, (before, between, after) = dict.fromkeys(SHAPES, 0.1), updates()
    first(before, noise)
    first(between, noise)
    second.load_state(first.state())
    found, expected = second(after, noise), first(after, noise)
    assert all(torch.equal(found[key], expected[key]) for key in SHAPES)
