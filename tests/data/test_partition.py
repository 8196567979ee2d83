import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpriv.data import partition
from fedpriv.errors import InputError

LABELS = st.lists(st.integers(0, 9), min_size=1, max_size=200).map(np.array)
SEEDS = st.integers(0, 2**32)


def assert_is_a_partition(parts: list[np.ndarray], examples: int) -> None:
    assert sorted(np.concatenate(parts).tolist()) == list(range(examples))
    assert min(len(part) for part in parts) > 0
    assert all((np.diff(part) > 0).all() for part in parts)


def assert_balanced(parts: list[np.ndarray]) -> None:
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def mean_label_entropy(labels: np.ndarray, parts: list[np.ndarray]) -> float:
    """Mean over users of the entropy of their labels, in nats."""
    shares = np.array([np.bincount(labels[part], minlength=10) / len(part) for part in parts])
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return float(-(shares * logs).sum(axis=1).mean())


@given(labels=LABELS, seed=SEEDS, data=st.data())
def test_iid_is_a_balanced_partition(labels, seed, data):
    users = data.draw(st.integers(1, len(labels)))
    parts = partition.iid(labels, users, np.random.default_rng(seed))
    assert len(parts) == users
    assert_is_a_partition(parts, len(labels))
    assert_balanced(parts)


@given(
    labels=LABELS,
    seed=SEEDS,
    log_alpha=st.floats(-300, 6),
    data=st.data(),
)
def test_dirichlet_is_a_balanced_partition(labels, seed, log_alpha, data):
    users = data.draw(st.integers(1, len(labels)))
    parts = partition.dirichlet(labels, users, 10.0**log_alpha, np.random.default_rng(seed))
    assert len(parts) == users
    assert_is_a_partition(parts, len(labels))
    assert_balanced(parts)


@given(labels=LABELS, seed=SEEDS, data=st.data())
def test_shards_is_a_partition_with_sizes_as_even_as_the_shards(labels, seed, data):
    users = data.draw(st.integers(1, len(labels)))
    per_user = data.draw(st.integers(1, len(labels) // users))
    parts = partition.shards(labels, users, per_user, np.random.default_rng(seed))
    assert len(parts) == users
    assert_is_a_partition(parts, len(labels))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= per_user


@given(groups=LABELS)
def test_natural_gives_every_group_its_own_examples(groups):
    parts = partition.natural(groups)
    assert_is_a_partition(parts, len(groups))
    assert [set(groups[part]) for part in parts] == [{group} for group in sorted(set(groups))]


@given(labels=LABELS, limit=st.integers(1, 20), seed=SEEDS)
def test_cap_keeps_a_subset_of_at_most_the_limit(labels, limit, seed):
    parts = partition.natural(labels)
    capped = partition.cap(parts, [f"user-{i}" for i in range(len(parts))], limit, seed)
    for before, after in zip(parts, capped, strict=True):
        assert len(after) == min(len(before), limit)
        assert set(after) <= set(before)
        assert len(set(after)) == len(after)


def test_cap_of_none_keeps_everything():
    parts = partition.natural([1, 1, 2])
    capped = partition.cap(parts, ["ann", "bob"], None, 0)
    assert [part.tolist() for part in capped] == [[0, 1], [2]]


def test_cap_draws_its_subset_at_random():
    draws = {int(partition.cap([np.arange(4)], ["ann"], 1, seed)[0][0]) for seed in range(60)}
    assert draws == {0, 1, 2, 3}


def test_smaller_alpha_means_fewer_labels_for_a_user():
    labels = np.repeat(np.arange(10), 400)
    entropies = [
        mean_label_entropy(labels, partition.dirichlet(labels, 80, alpha, np.random.default_rng(3)))
        for alpha in (0.01, 0.3, 100.0)
    ]
    assert entropies[0] < 0.5
    assert entropies[0] + 0.4 < entropies[1] < entropies[2] - 0.4
    assert entropies[2] > 0.9 * np.log(10)


def test_shares_of_the_first_label_follow_the_dirichlet_law():
    # With an endless stock the share has the Beta(a, a) law: variance 1 / (4 (2a + 1)).
    labels = np.repeat([0, 1], 400_000)
    parts = partition.dirichlet(labels, 4_000, 2.0, np.random.default_rng(5))
    shares = np.array([(labels[part] == 0).mean() for part in parts])
    sampling = 0.2 / 200  # mean of p(1-p) over Beta(2, 2), divided by the examples of a user
    assert np.var(shares) == pytest.approx(1 / 20 + sampling, rel=0.1)


def test_shards_give_a_user_few_labels():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    parts = partition.shards(labels, 50, 2, np.random.default_rng(1))
    # 100 shards of 10 examples fit the 100 examples of a label exactly.
    assert max(len(set(labels[part])) for part in parts) == 2


@pytest.mark.parametrize(
    "deal",
    [
        lambda labels, users, rng: partition.iid(labels, users, rng),
        lambda labels, users, rng: partition.dirichlet(labels, users, 0.3, rng),
        lambda labels, users, rng: partition.shards(labels, users, 1, rng),
    ],
    ids=["iid", "dirichlet", "shards"],
)
@pytest.mark.parametrize("users", [0, 31])
def test_a_number_of_users_that_would_leave_one_empty_is_refused(deal, users):
    with pytest.raises(InputError, match=rf"data\.users .*at most 30 .*got {users}"):
        deal(np.zeros(30, dtype=int), users, np.random.default_rng(0))


def test_too_many_shards_are_refused_with_the_largest_number_of_users():
    with pytest.raises(InputError, match=r"data\.users must be at most 10 .*shards_per_user=3"):
        partition.shards(np.zeros(30), 11, 3, np.random.default_rng(0))
