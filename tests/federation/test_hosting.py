import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpriv.errors import InputError
from fedpriv.federation.hosting import Hosting, NodeUsers

COHORTS = st.lists(st.integers(0, 499), unique=True).map(
    lambda users: np.sort(np.array(users, int))
)


@given(COHORTS, st.integers(1, 9))
def test_in_a_simulation_nodes_train_equally_many_users_most_of_them_at_home(cohort, nodes):
    hosting = Hosting.of([NodeUsers(100 + i, i, nodes, None) for i in reversed(range(nodes))])
    shares = hosting.split(cohort)
    assert [node.partition for node, _ in shares] == list(range(nodes))
    assert sorted(np.concatenate([users for _, users in shares]).tolist()) == cohort.tolist()
    sizes = [len(users) for _, users in shares]
    assert max(sizes) - min(sizes) <= 1
    at_home = [int((cohort % nodes == i).sum()) for i in range(nodes)]
    for (node, users), home, size in zip(shares, at_home, sizes, strict=True):
        assert (np.diff(users) > 0).all()
        assert (users % nodes == node.partition).sum() == min(home, size)


@given(COHORTS, st.integers(1, 9))
def test_users_of_whom_something_is_kept_stay_at_home(cohort, nodes):
    hosting = Hosting.of([NodeUsers(100 + i, i, nodes, None) for i in reversed(range(nodes))])
    shares = hosting.split(cohort, at_home=True)
    assert [node.partition for node, _ in shares] == list(range(nodes))
    assert sorted(np.concatenate([users for _, users in shares]).tolist()) == cohort.tolist()
    for node, users in shares:
        assert (users % nodes == node.partition).all()


@given(COHORTS, st.lists(st.integers(0, 200), min_size=1, max_size=5))
def test_in_a_deployment_nodes_number_their_own_users(cohort, counts):
    firsts = itertools.accumulate(counts, initial=0)
    hosting = Hosting.of(
        [
            NodeUsers(i, i, len(counts), count, first=first)
            for i, (count, first) in enumerate(zip(counts, firsts, strict=False))
        ]
    )
    first = 0
    for (_, users), count in zip(hosting.split(cohort), counts, strict=True):
        expected = [user - first for user in cohort.tolist() if first <= user < first + count]
        assert users.tolist() == expected
        first += count
    assert hosting.population == sum(counts)


@pytest.mark.parametrize(
    "numbers", [[(0, 2), (0, 2)], [(0, 2), (2, 2)], [(0, 2), (1, 3)]], ids=["twice", "beyond", "of"]
)
def test_nodes_that_could_train_a_user_twice_are_refused(numbers):
    nodes = [NodeUsers(i, number, of, 10) for i, (number, of) in enumerate(numbers)]
    with pytest.raises(InputError, match="partition-id 0 to num-partitions - 1, each once"):
        Hosting.of(nodes)
