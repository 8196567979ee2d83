"""Generators have owners: no two purposes, places or runs share a stream."""

from itertools import combinations, product

import numpy as np

from fedpriv.privacy import Purpose, Randomness

# Paths as they are used: (round), (round, attempt), (round, attempt, node, user or silo).
PATHS = [*product((1, 2)), *product((1, 2), (0, 1)), *product((1, 2), (0, 1), (0, 7))]


def first_numbers(source: Randomness) -> dict[tuple, tuple[float, ...]]:
    return {
        (purpose, *path): tuple(source.numpy(purpose, *path).standard_normal(3))
        for purpose in Purpose
        for path in PATHS
    }


def test_every_part_of_a_path_leads_to_another_stream():
    drawn = first_numbers(Randomness.simulation(3, "run"))
    assert len(drawn) == len(Purpose) * 14
    assert len(set(drawn.values())) == len(drawn)
    seeds = {
        Randomness.simulation(3, "run").torch_seed(purpose, *path)
        for purpose in Purpose
        for path in PATHS
    }
    assert len(seeds) == len(drawn)


def test_simulations_of_other_seeds_or_settings_share_no_stream():
    sources = [Randomness.simulation(seed, run) for seed in (3, 4) for run in ("one", "other", "")]
    for one, other in combinations(sources, 2):
        assert not set(first_numbers(one).values()) & set(first_numbers(other).values())
    assert Randomness.simulation(3, "one") == sources[0]


def test_seeds_for_torch_use_all_of_their_64_bits():
    source = Randomness.simulation(3)
    seeds = np.array([source.torch_seed(Purpose.SERVER, i) for i in range(2000)], dtype=np.uint64)
    for bit in range(64):
        ones = float((seeds >> np.uint64(bit) & np.uint64(1)).mean())
        assert 0.4 < ones < 0.6


def test_the_root_of_a_deployment_cannot_be_guessed():
    """256 bits: of 200 roots each bit is set in about half."""
    roots = [Randomness.operating_system().root for _ in range(200)]
    for bit in range(256):
        assert 60 < sum(root >> bit & 1 for root in roots) < 140
    assert not Randomness.operating_system().reproducible
