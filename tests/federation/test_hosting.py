import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedpriv.federation.hosting import Hosting, NodeUsers

COHORTS = st.lists(st.integers(0, 499), unique=True).map(
    lambda users: np.sort(np.array(users, int))
)


@given(COHORTS, st.integers(1, 9))
def test_in_a_simulation_every_user_has_one_stable_node(cohort, nodes):
    hosting = Hosting.of([NodeUsers(100 + i, i, None) for i in reversed(range(nodes))])
    shares = hosting.shares(cohort)
    assert [node.partition for node, _ in shares] == list(range(nodes))
    assert sorted(np.concatenate([users for _, users in shares]).tolist()) == cohort.tolist()
    for node, users in shares:
        assert (users % nodes == node.partition).all()


@given(COHORTS, st.lists(st.integers(0, 200), min_size=1, max_size=5))
def test_in_a_deployment_nodes_number_their_own_users(cohort, counts):
    hosting = Hosting.of([NodeUsers(i, i, count) for i, count in enumerate(counts)])
    first = 0
    for (_, users), count in zip(hosting.shares(cohort), counts, strict=True):
        expected = [user - first for user in cohort.tolist() if first <= user < first + count]
        assert users.tolist() == expected
        first += count
    assert hosting.population == sum(counts)
