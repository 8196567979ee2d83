import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.data.federated import Examples
from fedpriv.data.utterances import Utterances
from fedpriv.training.user_cache import UserCache


def examples(size: int) -> Examples:
    """Examples of 8·(1 + size) bytes each: so many of them that it is `size` in all."""
    return Examples(torch.zeros(size, 2, dtype=torch.float32), torch.zeros(size, dtype=torch.int64))


def bytes_of(size: int) -> int:
    return 16 * size


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "get"]), st.integers(0, 5), st.integers(0, 12)), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), STEPS)
def test_it_is_the_plain_list_of_the_most_recently_used(limit, steps):
    cache, plain = UserCache(limit), []  # plain: (user, size), the most recent last
    held = {}
    for what, user, size in steps:
        kept = [entry for entry in plain if entry[0] == user]
        if what == "get":
            assert (cache.get(user) is not None) == bool(kept)
            if kept:
                assert cache.get(user) is held[user]
                plain = [entry for entry in plain if entry[0] != user] + kept
            continue
        held[user] = examples(size)
        assert cache.put(user, held[user]) is held[user]
        plain = [entry for entry in plain if entry[0] != user]
        if bytes_of(size) <= limit:
            plain.append((user, size))
            while sum(bytes_of(s) for _, s in plain) > limit:
                plain.pop(0)
        assert len(cache) == len(plain)
        assert cache.bytes == sum(bytes_of(s) for _, s in plain) <= limit
    for user in range(6):
        assert (cache.get(user) is not None) == any(entry[0] == user for entry in plain)


def test_the_least_recently_used_goes_first():
    cache = UserCache(bytes_of(3))
    for user in (1, 2, 3):
        cache.put(user, examples(1))
    cache.get(1)
    cache.put(4, examples(1))
    assert [user for user in (1, 2, 3, 4) if cache.get(user)] == [1, 3, 4]
    cache.put(5, examples(2))
    assert [user for user in range(6) if cache.get(user)] == [4, 5]


def test_the_same_user_twice_counts_once():
    cache = UserCache(bytes_of(4))
    for _ in range(10):
        cache.put(1, examples(3))
        assert (cache.bytes, len(cache)) == (bytes_of(3), 1)
    cache.put(1, examples(2))
    cache.put(2, examples(2))
    assert (cache.bytes, len(cache)) == (bytes_of(4), 2)


def test_what_is_larger_than_the_limit_is_not_kept_and_leaves_nothing_old_behind():
    cache = UserCache(bytes_of(2))
    cache.put(1, examples(1))
    cache.put(2, examples(1))
    large = examples(3)
    assert cache.put(1, large) is large
    assert cache.get(1) is None
    assert (cache.bytes, len(cache)) == (bytes_of(1), 1)


def test_nothing_is_kept_without_memory():
    cache = UserCache(0)
    cache.put(1, examples(1))
    assert cache.get(1) is None
    assert len(cache) == cache.bytes == 0


def test_all_tensors_of_utterances_count():
    spoken = Utterances.pack([torch.zeros(10, 3), torch.zeros(4, 3)], [torch.tensor([1, 2])] * 2)
    cache = UserCache(10**6)
    cache.put("anna", spoken)
    assert cache.bytes == 2 * 10 * 3 * 4 + 2 * 8 + 2 * 2 * 8 + 2 * 8
