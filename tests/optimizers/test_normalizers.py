"""Normalisers against their papers' equations, number by number; what they keep is resumed."""

import numpy as np
import pytest
import torch
from in_process import train_small

from fedpriv.optimizers.normalize import NORMALIZERS, Normalization

SHAPES = {
    "embed": (5, 3),
    "positions.weight": (4, 3),
    "kernel": (4, 2, 3),
    "head": (3, 6),
    "bias": (6,),
}


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


@pytest.mark.parametrize("name", ["scale", "sinkgd", "swan"])
def test_zeros_stay_zeros(name):
    found = Normalization(NORMALIZERS.parse(name))({"w": torch.zeros(3, 4), "b": torch.zeros(4)})
    assert all(block.abs().max() == 0 for block in found.values())


@pytest.mark.parametrize("private", [True, False], ids=["private", "without privacy"])
@pytest.mark.parametrize("name", ["scale", "sinkgd", "swan"])
def test_each_trains_by_a_line_of_config(tmp_path, name, private):
    changes = {} if private else {"privacy": None}
    _, prepared = train_small(tmp_path / "run", rounds=2, server__normalize=name, **changes)
    assert prepared.server.parameters().isfinite().all()
